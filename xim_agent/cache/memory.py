"""Memory of the pipeline: how much of it, and buffers that are used again, since memory costs most when it is new."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

import trio

from xim_agent.cache.manifest import CHUNK

# Stored bytes in flight: 8 whole chunks. Each of 4 worker threads (download.WORKERS) holds a chunk and a piece more
# while it decodes, each transfer what lies between socket and buffer (three reads of 512 KiB):
# 128 + 4 * 17 + 8 * 1.5 = 208 MiB.
MEMORY = 128 * 1024 * 1024
_SMALL = 256 * 1024  # bytes; of those there may be many at once
_STEP = 1024 * 1024  # chunks of one model differ a little in size, and shall fit into each other's buffers


@dataclass
class Memory:
    """Bytes that may be held; first come, first served. More than `free` at once waits until all else is back."""

    free: int = MEMORY
    _turn: trio.Lock = field(default_factory=trio.Lock)
    _back: trio.Event = field(default_factory=trio.Event)

    async def take(self, amount: int) -> None:
        async with self._turn:
            while self.free < amount:
                self._back = trio.Event()
                await self._back.wait()
            self.free -= amount

    def give(self, amount: int) -> None:
        self.free += amount
        self._back.set()


class Received:
    """The first `len` bytes of `memory`; grows and shrinks like a bytearray, but never beyond it."""

    def __init__(self, memory: bytearray) -> None:
        self._memory = memory
        self._filled = 0

    def __len__(self) -> int:
        return self._filled

    def __iadd__(self, piece: bytes) -> Self:
        end = self._filled + len(piece)
        if end > len(self._memory):
            raise ValueError(f"{end} bytes do not fit into {len(self._memory)}")
        self._memory[self._filled : end] = piece
        self._filled = end
        return self

    def __delitem__(self, tail: slice) -> None:
        """`del data[n:]` keeps the first n bytes."""
        self._filled = tail.indices(self._filled)[0]

    def room(self, size: int) -> memoryview:
        """For `size` bytes that somebody else fills in; they count."""
        self._filled = size
        return self.view()

    def view(self) -> memoryview:
        """Good until the memory is used for the next chunk."""
        return memoryview(self._memory)[: self._filled]


def cost(stored: int) -> int:
    """Bytes of memory for a chunk of `stored` bytes, the buffer of an earlier, larger one included."""
    return stored if stored <= _SMALL else CHUNK


class Buffers:
    """As many as were ever lent at once; what bounds them is the caller's."""

    def __init__(self) -> None:
        self._free: list[bytearray] = []

    @contextmanager
    def lent(self, stored: int) -> Iterator[Received]:
        """Nobody may use it when the block is left."""
        if stored <= _SMALL:
            yield Received(bytearray(stored))
            return
        self._free.sort(key=len)
        memory = self._free.pop() if self._free else bytearray()
        if len(memory) < stored:
            memory = bytearray(-(-stored // _STEP) * _STEP)
        try:
            yield Received(memory)
        finally:
            self._free.append(memory)
