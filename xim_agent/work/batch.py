"""What the outbox holds: frames of streams, and calls that carry some of them. Pure."""

from collections import deque
from dataclasses import dataclass, field

SORTED_FROM = 16


class Frame:
    """`queued`: waits in the queue; `urgent`: does not wait for the 10 ms."""

    __slots__ = ("queued", "raw", "seq", "stream", "urgent")

    def __init__(self, stream: "Stream", seq: int, raw: bytes, urgent: bool) -> None:
        self.stream = stream
        self.seq = seq
        self.raw = raw
        self.urgent = urgent
        self.queued = True


@dataclass(eq=False, slots=True)
class Stream:
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
    frames: deque[Frame] = field(default_factory=deque)


@dataclass(eq=False, slots=True)
class Batch:
    """One call's worth. `left`: when it was taken."""

    left: float
    frames: list[Frame]
    streams: set[Stream]

    @property
    def raw(self) -> list[bytes]:
        """Encoded. Many are sorted by length: the router orders them anyway, and what is like its neighbour packs
        better (of 128 pieces of 200 bytes to 24 bytes each instead of 25).
        """
        raw = [frame.raw for frame in self.frames]
        return sorted(raw, key=len) if len(raw) >= SORTED_FROM else raw

    @property
    def leases(self) -> list[int]:
        return [stream.lease for stream in self.streams]
