"""Memory of the pipeline: buffers are used again, never by two at once, and counted as what they may grow to."""

import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from xim_agent.backoff import Backoff
from xim_agent.cache.download import Fetch
from xim_agent.cache.manifest import CHUNK, Chunk, File, Manifest
from xim_agent.cache.memory import MEMORY, Buffers, Received
from xim_agent.cache.partial import Partial
from xim_agent.cache.store import Store
from xim_agent.cache.transfer import Counters
from xim_agent.errors import AgentError
from xim_agent.outcome import RouterError

BIG = 300 * 1024  # stored bytes; more than a small one, so that it takes a whole buffer
COUNT = 12


@given(st.lists(st.binary(max_size=30) | st.integers(0, 200)))
def test_what_is_received_is_as_in_a_bytearray(steps: list[bytes | int]) -> None:
    data, model = Received(bytearray(1000)), bytearray()
    for step in steps:
        if isinstance(step, int):
            del data[step:]
            del model[step:]
        else:
            data += step
            model += step
        assert len(data) == len(model)
        assert data.view() == model


def test_nothing_is_received_beyond_the_memory() -> None:
    data = Received(bytearray(3))
    data += b"ab"
    with pytest.raises(ValueError, match="4 bytes do not fit into 3"):
        data += b"cd"
    assert data.view() == b"ab"


def test_memory_is_used_again_and_never_by_two_at_once() -> None:
    buffers = Buffers()
    with buffers.lent(CHUNK) as one, buffers.lent(CHUNK - 1) as two:
        one += b"one"
        two += b"two"
        assert (one.view(), two.view()) == (b"one", b"two")
        used = {id(one.view().obj), id(two.view().obj)}
    with suppress(KeyError), buffers.lent(BIG) as again:
        assert len(again) == 0
        assert id(again.view().obj) in used
        raise KeyError
    with buffers.lent(CHUNK) as a, buffers.lent(CHUNK) as b:
        assert {id(a.view().obj), id(b.view().obj)} == used
    assert len(buffers._free) == 2
    with buffers.lent(10) as small:
        assert len(small.view().obj) == 10


def test_memory_is_as_large_as_the_largest_chunk_and_what_is_too_small_goes() -> None:
    buffers = Buffers()
    for stored in (BIG, CHUNK // 2, BIG, CHUNK, BIG):
        with buffers.lent(stored):
            pass
    assert [len(memory) for memory in buffers._free] == [CHUNK]
    with buffers.lent(CHUNK), buffers.lent(BIG):
        pass
    assert sorted(len(memory) for memory in buffers._free) == [1024 * 1024, CHUNK]


BLOBS = {sha256(data).hexdigest(): data for data in (bytes([n]) * BIG for n in range(COUNT))}
MANIFEST = Manifest(
    1, "m", "r", tuple(File(f"f{n}", BIG, b, (Chunk(b, BIG, BIG, "raw"),)) for n, b in enumerate(BLOBS))
)


@dataclass
class Reply:
    data: bytes
    status: int = 200
    start: int = 0
    total: int | None = BIG

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        yield self.data


class Gated:
    """Blobs of which none comes before the gate is open."""

    def __init__(self) -> None:
        self.waiting = 0
        self.full = trio.Event()
        self.gate = trio.Event()
        self.error: RouterError | None = None

    @asynccontextmanager
    async def blob(self, sha256_hex: str, offset: int) -> AsyncIterator[Reply]:
        self.waiting += 1
        if self.waiting == MEMORY // CHUNK:
            self.full.set()
        await self.gate.wait()
        if self.error:
            raise self.error
        yield Reply(BLOBS[sha256_hex])

    async def manifest(self, sha256_hex: str) -> bytes:
        raise NotImplementedError


@pytest.fixture
def make_fetch(tmp_path: Path) -> Iterator[Callable[[Gated], Fetch]]:
    store = Store.open(tmp_path / "cache")

    async def room() -> None:
        raise AssertionError

    def make(source: Gated) -> Fetch:
        options: dict[str, Any] = {"downloads": 100, "counters": Counters(), "report": lambda p: None}
        options |= {"backoff": Backoff, "rand": lambda: 0.5, "trouble": lambda t: None, "room": room}
        return Fetch(store, source, Partial(tmp_path / "p", MANIFEST), **options)

    yield make
    store.close()


async def test_a_buffer_counts_as_a_whole_chunk_so_that_no_more_are_lent_than_memory_allows(
    make_fetch: Callable[[Gated], Fetch],
) -> None:
    source = Gated()
    fetch = make_fetch(source)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch.expand, True)
        await source.full.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert (source.waiting, fetch._memory.free) == (8, 0)
        source.gate.set()
    assert source.waiting == COUNT
    assert len(fetch._buffers._free) <= 8
    for n, data in enumerate(BLOBS.values()):
        assert (fetch.partial.files / f"f{n}").read_bytes() == data


async def test_buffers_and_memory_come_back_where_the_model_is_refused(make_fetch: Callable[[Gated], Fetch]) -> None:
    source = Gated()
    fetch = make_fetch(source)
    source.error = RouterError("blob_unknown", "gone", status=404)
    source.gate.set()
    with pytest.raises(AgentError, match="gone"):
        await fetch.expand(True)
    assert len({id(memory) for memory in fetch._buffers._free}) == len(fetch._buffers._free) <= 8
    assert fetch._memory.free == MEMORY


async def test_a_buffer_is_not_given_back_before_the_thread_that_reads_it_has_ended(
    make_fetch: Callable[[Gated], Fetch], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Gated()
    fetch = make_fetch(source)
    started, release, write = trio.Event(), threading.Event(), fetch.partial.write
    read: set[int] = set()

    def slow(i: int, j: int, data: Iterator[memoryview]) -> None:
        pieces = list(data)
        read.update(id(piece.obj) for piece in pieces)
        trio.from_thread.run_sync(started.set)
        release.wait()
        write(i, j, iter(pieces))

    monkeypatch.setattr(fetch.partial, "write", slow)
    source.gate.set()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch.expand, True)
        await started.wait()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await trio.testing.wait_all_tasks_blocked()
            idle = {id(memory) for memory in fetch._buffers._free}
            held = MEMORY - fetch._memory.free
            release.set()
    assert read
    assert not read & idle
    assert held >= CHUNK * len(read - idle)
    assert fetch._memory.free == MEMORY
    for i, j in fetch.partial.done:
        assert sha256((fetch.partial.files / f"f{i}").read_bytes()).hexdigest() == MANIFEST.files[i].chunks[j].blob
    assert fetch.partial.done
