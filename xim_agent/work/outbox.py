"""Frames on their way to the router: numbered, batched, kept until acknowledged, sent again byte for byte.

Pure: time comes in as `now` (seconds, monotonic), and whoever sends asks `take` for what may leave.

    head/data/end → encoded once under the next seq → queue → Batch in flight → delivered → acknowledged → gone
                                                        ↑__________ failed ________|  or not acknowledged for 1 s
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from msgspec import Raw

from xim_agent.mesh.codec import Kind, Payload, encode_frame
from xim_agent.mesh.messages import MAX_BATCH, End, Error, Head

MAX_IN_FLIGHT = 2
BATCH_SECONDS = 0.010
RESEND_SECONDS = 1.0
# Two fit into a batch, so that one big answer leaves room for the frames of others.
MAX_DATA = 120 * 1024
# The map around the frames: two keys, the boot id, the array's header.
_OVERHEAD = 256


class _Frame:
    """`queued`: waits in the queue; `urgent`: does not wait for the 10 ms."""

    __slots__ = ("queued", "raw", "seq", "stream", "urgent")

    def __init__(self, stream: "_Stream", seq: int, raw: bytes, urgent: bool) -> None:
        self.stream = stream
        self.seq = seq
        self.raw = raw
        self.urgent = urgent
        self.queued = True


@dataclass(eq=False, slots=True)
class _Stream:
    """One lease. `acked`, `sent`: highest seq acknowledged and ever sent, or -1; `flying`: batches with its frames."""

    lease: int
    credit: int
    used: int = 0
    chunks: int = 0
    next_seq: int = 0
    acked: int = -1
    sent: int = -1
    flying: int = 0
    ended: bool = False
    frames: deque[_Frame] = field(default_factory=deque)


@dataclass(eq=False, slots=True)
class Batch:
    """One call's worth. `left`: when it was taken."""

    left: float
    frames: list[_Frame]
    streams: set[_Stream]

    @property
    def raw(self) -> list[bytes]:
        return [frame.raw for frame in self.frames]

    @property
    def leases(self) -> list[int]:
        return [stream.lease for stream in self.streams]


@dataclass(frozen=True)
class OutboxStatistics:
    """`unacknowledged` frames and bytes are held in memory now; the rest counts since the start."""

    frames: int
    data_bytes: int
    sent_frames: int
    resent_frames: int
    unacknowledged: int
    unacknowledged_bytes: int
    open_streams: int


class Outbox:
    def __init__(self) -> None:
        self._streams: dict[int, _Stream] = {}
        self._queue: deque[_Frame] = deque()
        self._urgent = 0
        self._in_flight = 0
        self._left = float("-inf")
        # Delivered without acknowledgement: when to send again, oldest first.
        self._overdue: dict[_Stream, float] = {}
        self._frames = self._data_bytes = self._sent = self._resent = self._held = self._held_bytes = 0

    # filling

    def open(self, lease: int, credit: int) -> None:
        assert lease not in self._streams
        self._streams[lease] = _Stream(lease, credit)

    def room(self, lease: int) -> int:
        """Bytes of data the router allows now; 0 for a lease that is gone."""
        stream = self._streams.get(lease)
        return 0 if stream is None or stream.ended else max(0, stream.credit - stream.used)

    def totals(self, lease: int) -> tuple[int, int]:
        """(bytes, frames) of data so far."""
        stream = self._streams.get(lease)
        return (0, 0) if stream is None else (stream.used, stream.chunks)

    def head(self, lease: int, head: Head) -> bool:
        """Leaves with the first data, or with the ending where none follows. As of `data` and `end`, see `_put`."""
        return self._put(self._streams.get(lease), "head", head, urgent=False)

    def data(self, lease: int, chunk: bytes) -> bool:
        """At most `room` bytes; cut here, once, if they are many."""
        stream = self._streams.get(lease)
        if stream is None or stream.ended:
            return False
        assert len(chunk) <= stream.credit - stream.used, "more data than credit"
        earlier = False
        for start in range(0, len(chunk), MAX_DATA):
            part = chunk if len(chunk) <= MAX_DATA else chunk[start : start + MAX_DATA]
            earlier |= self._put(stream, "data", part, urgent=stream.chunks == 0)
            stream.used += len(part)
            stream.chunks += 1
            self._data_bytes += len(part)
        return earlier

    def end(self, lease: int, ending: End | Error) -> bool:
        """False when the lease has its ending already, or is gone."""
        stream = self._streams.get(lease)
        if stream is None or stream.ended:
            return False
        self._put(stream, "end" if isinstance(ending, End) else "error", ending, urgent=True)
        stream.ended = True
        return True

    def _put(self, stream: _Stream | None, kind: Kind, payload: Payload, *, urgent: bool) -> bool:
        """Whether something is due earlier than before."""
        if stream is None or stream.ended:
            return False
        earlier = urgent or not self._queue
        raw = encode_frame(stream.lease, stream.next_seq, kind, payload)
        frame = _Frame(stream, stream.next_seq, raw, urgent)
        stream.next_seq += 1
        stream.frames.append(frame)
        self._queue.append(frame)
        self._urgent += urgent
        self._frames += 1
        self._held += 1
        self._held_bytes += len(raw)
        return earlier

    # sending

    def due(self, now: float) -> float | None:
        """When `take` has something, not before `now`; None while nothing waits or both calls are out."""
        if self._in_flight >= MAX_IN_FLIGHT:
            return None
        if self._urgent:
            return now
        times = []
        if self._queue:
            times.append(self._left + BATCH_SECONDS)
        if self._overdue:
            times.append(next(iter(self._overdue.values())))
        return max(now, min(times)) if times else None

    def take(self, now: float) -> Batch | None:
        """What leaves now; counts as in flight until `delivered` or `failed`."""
        self._queue_overdue(now)
        if self._in_flight >= MAX_IN_FLIGHT or (not self._urgent and now < self._left + BATCH_SECONDS):
            return None
        frames: list[_Frame] = []
        size = _OVERHEAD
        while self._queue:
            frame = self._queue[0]
            if frame.queued:
                size += len(frame.raw)
                if size > MAX_BATCH and frames:
                    break
                frames.append(frame)
                self._unqueue(frame)
                stream = frame.stream
                if frame.seq <= stream.sent:
                    self._resent += 1
                else:
                    stream.sent = frame.seq
            self._queue.popleft()
        if not frames:
            return None
        batch = Batch(now, frames, {frame.stream for frame in frames})
        for stream in batch.streams:
            stream.flying += 1
        self._sent += len(frames)
        self._in_flight += 1
        self._left = now
        return batch

    def failed(self, batch: Batch) -> None:
        """Nobody knows what arrived: all of it goes again, first."""
        self._landed(batch)
        self._requeue(batch.frames)

    def delivered(self, batch: Batch, acked: Mapping[int, int], now: float) -> list[int]:
        """`acked` of the reply. Returns the leases whose endings are acknowledged: they are over."""
        self._landed(batch)
        over = [lease for lease, seq in acked.items() if self._acknowledge(lease, seq)]
        for stream in batch.streams:
            if stream.frames and not stream.flying:
                self._overdue.setdefault(stream, now + RESEND_SECONDS)
        return over

    def grant(self, credit: Mapping[int, int]) -> list[int]:
        """Absolute totals; returns the leases that may send more than before."""
        grown = []
        for lease, total in credit.items():
            stream = self._streams.get(lease)
            if stream is not None and total > stream.credit:
                stream.credit = total
                grown.append(lease)
        return grown

    def drop(self, lease: int) -> bool:
        """The router does not know it: nothing more is sent. False when it was gone already."""
        stream = self._streams.pop(lease, None)
        if stream is None:
            return False
        self._forget(stream, stream.next_seq - 1)
        return True

    def unacknowledged_endings(self) -> list[Raw]:
        """The last frames of leases that have ended, as they were cut."""
        return [Raw(s.frames[-1].raw) for s in self._streams.values() if s.ended and s.frames]

    def statistics(self) -> OutboxStatistics:
        return OutboxStatistics(
            frames=self._frames,
            data_bytes=self._data_bytes,
            sent_frames=self._sent,
            resent_frames=self._resent,
            unacknowledged=self._held,
            unacknowledged_bytes=self._held_bytes,
            open_streams=len(self._streams),
        )

    # inside

    def _landed(self, batch: Batch) -> None:
        self._in_flight -= 1
        for stream in batch.streams:
            stream.flying -= 1

    def _acknowledge(self, lease: int, seq: int) -> bool:
        stream = self._streams.get(lease)
        if stream is None:
            return False
        # An acknowledgement of what was never sent must not lose it.
        self._forget(stream, min(seq, stream.sent))
        if stream.frames or not stream.ended:
            return False
        del self._streams[lease]
        return True

    def _forget(self, stream: _Stream, seq: int) -> None:
        """Frees the frames up to `seq`; those in the queue are passed over when their turn comes."""
        stream.acked = max(stream.acked, seq)
        while stream.frames and stream.frames[0].seq <= seq:
            frame = stream.frames.popleft()
            self._held -= 1
            self._held_bytes -= len(frame.raw)
            if frame.queued:
                self._unqueue(frame)
        if not stream.frames:
            self._overdue.pop(stream, None)

    def _unqueue(self, frame: _Frame) -> None:
        frame.queued = False
        self._urgent -= frame.urgent

    def _requeue(self, frames: list[_Frame]) -> None:
        for frame in reversed(frames):
            stream = frame.stream
            alive = self._streams.get(stream.lease) is stream and frame.seq > stream.acked
            if alive and not frame.queued:
                frame.queued = True
                self._urgent += frame.urgent
                self._queue.appendleft(frame)

    def _queue_overdue(self, now: float) -> None:
        while self._overdue:
            stream, when = next(iter(self._overdue.items()))
            if when > now:
                return
            del self._overdue[stream]
            if not stream.flying:
                self._requeue([frame for frame in stream.frames if frame.seq <= stream.sent])
