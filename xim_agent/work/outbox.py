"""Frames on their way to the router: numbered, batched, kept until acknowledged, sent again byte for byte.

Pure: time comes in as `now` (seconds, monotonic), and whoever sends asks `take` for what may leave.

    head/data/end → encoded once under the next seq → queue → Batch in flight → delivered → acknowledged → gone
                                                        ↑__________ failed ________|  or not acknowledged for 1 s
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from msgspec import Raw

from xim_agent.mesh.codec import Kind, Payload, encode_frame
from xim_agent.mesh.messages import MAX_BATCH, End, Error, Head
from xim_agent.work.batch import Batch, Frame, Stream

MAX_IN_FLIGHT = 2
BATCH_SECONDS = 0.010
RESEND_SECONDS = 1.0
# Two fit into a batch, so that one big answer leaves room for the frames of others.
MAX_DATA = 120 * 1024
# The map around the frames: two keys, the boot id, the array's header.
_OVERHEAD = 256


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
        self._streams: dict[int, Stream] = {}
        self._queue: deque[Frame] = deque()
        self._urgent = 0
        self._in_flight = 0
        self._left = float("-inf")
        # Delivered without acknowledgement: when to send again, oldest first.
        self._overdue: dict[Stream, float] = {}
        # Of leases that are over.
        self._frames = self._data_bytes = 0
        self._sent = self._resent = 0

    # filling

    def open(self, lease: int, credit: int) -> None:
        assert lease not in self._streams
        self._streams[lease] = Stream(lease, credit)

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

    def data(self, lease: int, piece: bytes) -> tuple[int, bool]:
        """What was taken of it: as much as the router allows now. Cut here, once, if it is much. And as `_put`.

        Hundreds of streams come through here 50 times a second each, so that all is in one place.
        """
        stream = self._streams.get(lease)
        if stream is None or stream.ended:
            return len(piece), False
        size = len(piece)
        if size > stream.credit - stream.used:
            size = max(0, stream.credit - stream.used)
            piece = piece[:size]
        if size > MAX_DATA:
            earlier = False
            for start in range(0, size, MAX_DATA):
                earlier |= self.data(lease, piece[start : start + MAX_DATA])[1]
            return size, earlier
        if not size:
            return 0, False
        seq, urgent, queue = stream.next_seq, stream.chunks == 0, self._queue
        earlier = urgent or not queue
        frame = Frame(stream, seq, encode_frame(lease, seq, "data", piece), urgent)
        stream.frames.append(frame)
        queue.append(frame)
        stream.next_seq = seq + 1
        stream.used += size
        stream.chunks += 1
        if urgent:
            self._urgent += 1
        return size, earlier

    def end(self, lease: int, ending: End | Error) -> bool:
        """False when the lease has its ending already, or is gone."""
        stream = self._streams.get(lease)
        if stream is None or stream.ended:
            return False
        self._put(stream, "end" if isinstance(ending, End) else "error", ending, urgent=True)
        stream.ended = True
        return True

    def _put(self, stream: Stream | None, kind: Kind, payload: Payload, *, urgent: bool) -> bool:
        """Whether something is due earlier than before."""
        if stream is None or stream.ended:
            return False
        earlier = urgent or not self._queue
        frame = Frame(stream, stream.next_seq, encode_frame(stream.lease, stream.next_seq, kind, payload), urgent)
        stream.next_seq += 1
        stream.frames.append(frame)
        self._queue.append(frame)
        self._urgent += urgent
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
        frames: list[Frame] = []
        size = _OVERHEAD
        while self._queue:
            frame = self._queue[0]
            if frame.queued:
                size += len(frame.raw)
                if size > MAX_BATCH and frames:
                    break
                frames.append(frame)
                frame.queued = False
                if frame.urgent:
                    self._urgent -= 1
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
        over = []
        for lease, seq in acked.items():
            stream = self._streams.get(lease)
            if stream is None:
                continue
            # An acknowledgement of what was never sent must not lose it.
            self._forget(stream, min(seq, stream.sent))
            if stream.ended and not stream.frames:
                self._close(stream)
                over.append(lease)
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
        stream = self._streams.get(lease)
        if stream is None:
            return False
        self._forget(stream, stream.next_seq - 1)
        self._close(stream)
        return True

    def unacknowledged_endings(self) -> list[Raw]:
        """The last frames of leases that have ended, as they were cut."""
        return [Raw(s.frames[-1].raw) for s in self._streams.values() if s.ended and s.frames]

    def statistics(self) -> OutboxStatistics:
        live = self._streams.values()
        return OutboxStatistics(
            frames=self._frames + sum(stream.next_seq for stream in live),
            data_bytes=self._data_bytes + sum(stream.used for stream in live),
            sent_frames=self._sent,
            resent_frames=self._resent,
            unacknowledged=sum(len(stream.frames) for stream in live),
            unacknowledged_bytes=sum(len(frame.raw) for stream in live for frame in stream.frames),
            open_streams=len(self._streams),
        )

    # inside

    def _landed(self, batch: Batch) -> None:
        self._in_flight -= 1
        for stream in batch.streams:
            stream.flying -= 1

    def _close(self, stream: Stream) -> None:
        del self._streams[stream.lease]
        self._frames += stream.next_seq
        self._data_bytes += stream.used

    def _forget(self, stream: Stream, seq: int) -> None:
        """Frees the frames up to `seq`; those in the queue are passed over when their turn comes."""
        if seq > stream.acked:
            stream.acked = seq
        frames = stream.frames
        while frames and frames[0].seq <= seq:
            frame = frames.popleft()
            if frame.queued:
                self._unqueue(frame)
        if not frames:
            self._overdue.pop(stream, None)

    def _unqueue(self, frame: Frame) -> None:
        frame.queued = False
        self._urgent -= frame.urgent

    def _requeue(self, frames: list[Frame]) -> None:
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
