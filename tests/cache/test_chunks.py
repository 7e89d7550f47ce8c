"""Files of several chunks against a real server on loopback: the pipeline, resumption, room that is short."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from fakes.models import blob_of, cut, done_in, flip, hold, ignore_range

from xim_agent.cache.service import Cache
from xim_agent.errors import AgentError
from xim_agent.files import remove_tree
from xim_agent.mesh.messages import ModelRef, Progress

Open = Callable[..., Cache]
SameTree = Callable[[Path, Path], None]
ROOMY, TIGHT = 10**9, 60_000_000  # TIGHT holds the model's files (52 MB) but not its chunks (17 MB) beside them
PLACES = 6  # chunks of all files


def ignore(_: Progress) -> None:
    pass


async def test_a_model_arrives_whole_read_only_and_each_chunk_once(
    open_cache: Open, model: ModelRef, server: Any, model_files: Path, same_tree: SameTree
) -> None:
    seen: list[Progress] = []
    async with open_cache() as cache:
        path = await cache.ensure(model, seen.append)
        same_tree(path, model_files)
        assert path.relative_to(cache.store.root) == Path("ready/tiny/r1")
        assert {p.stat().st_mode & 0o777 for p in path.rglob("*") if p.is_file()} == {0o440}
        assert set(server.times().values()) == {1}
        assert [(m.name, m.revision, m.id) for m in cache.statistics().models] == [("tiny", "r1", "tiny")]
        assert not list((cache.store.root / "partial").iterdir())
    assert (seen[-1].stage, seen[-1].done) == ("verify", model.size_bytes)
    assert all(p.done <= p.total for p in seen)


async def test_a_connection_cut_in_a_chunk_goes_on_where_it_was(
    open_cache: Open, model: ModelRef, server: Any, published: Any, model_files: Path, same_tree: SameTree
) -> None:
    digest = blob_of(published, "model.safetensors", 1)
    server.faults[digest] += [cut, cut]
    async with open_cache() as cache:
        same_tree(await cache.ensure(model, ignore), model_files)
        assert cache.counters.network_bytes == cache_bytes(published)
    ranges = [r for d, r in server.asked if d == digest]
    assert ranges[0] == ""
    assert all(r.startswith("bytes=") for r in ranges[1:])


async def test_a_range_answered_with_the_whole_chunk_is_no_harm(
    open_cache: Open, model: ModelRef, server: Any, published: Any, model_files: Path, same_tree: SameTree
) -> None:
    digest = blob_of(published, "model.safetensors", 1)
    server.faults[digest] += [cut, ignore_range]
    async with open_cache() as cache:
        same_tree(await cache.ensure(model, ignore), model_files)


async def test_chunks_are_streamed_through_where_they_do_not_fit_beside_the_files(
    open_cache: Open, model: ModelRef, model_files: Path, same_tree: SameTree, disk_usage: Callable[[Path], int]
) -> None:
    async with open_cache(max_bytes=TIGHT) as cache:
        same_tree(await cache.ensure(model, ignore), model_files)
        assert not [p for p in (cache.store.root / "blobs").rglob("*") if p.is_file()]
        assert disk_usage(cache.store.root) == cache.statistics().bytes_used <= TIGHT


async def test_damaged_chunks_do_not_break_the_bound(
    open_cache: Open, model: ModelRef, server: Any, model_files: Path, same_tree: SameTree, disk_usage: Any
) -> None:
    bound = 80_000_000  # files and chunks (69 MB) and what is kept free for compile caches, not chunks twice
    async with open_cache() as cache:
        remove_tree(await cache.ensure(model, ignore))
        for path in (cache.store.root / "blobs").glob("*/*"):
            path.write_bytes(b"\0" + path.read_bytes()[1:])
    server.asked.clear()
    async with open_cache(max_bytes=bound) as cache:
        same_tree(await cache.ensure(model, ignore), model_files)
        assert set(server.times().values()) == {1}
        assert len(list((cache.store.root / "blobs").glob("*/*"))) == len(server.asked)
        assert disk_usage(cache.store.root) == cache.statistics().bytes_used <= bound


async def test_stored_chunks_are_eaten_where_they_do_not_fit_beside_the_files(
    open_cache: Open, model: ModelRef, model_files: Path, same_tree: SameTree, disk_usage: Callable[[Path], int]
) -> None:
    async with open_cache() as cache:
        path = await cache.ensure(model, ignore)
        cache.store._retire(path, "gone")
        cache.store.ready.clear()
    async with open_cache(max_bytes=90_000_000, source=None) as cache:
        same_tree(await cache.ensure(model, ignore), model_files)
        assert disk_usage(cache.store.root) == cache.statistics().bytes_used <= 90_000_000


async def test_a_resumed_file_that_does_not_verify_is_made_anew(
    open_cache: Open, model: ModelRef, server: Any, published: Any, model_files: Path, same_tree: SameTree
) -> None:
    digest = blob_of(published, "model.safetensors", 2)
    server.faults[digest] += [flip] * 2
    async with open_cache() as cache:
        server.gate = hold(digest, lambda: len(done_in(cache.store.root)) == PLACES - 1, lambda: None)
        with pytest.raises(AgentError, match=digest):
            await cache.ensure(model, ignore)
        broken = next((cache.store.root / "partial").glob("*/files/model.safetensors"))
        with broken.open("r+b") as file:
            file.write(b"damage")
        same_tree(await cache.ensure(model, ignore), model_files)


async def test_a_cut_fetch_resumes_without_the_chunks_that_are_done(
    open_cache: Open, model: ModelRef, server: Any, published: Any, model_files: Path, same_tree: SameTree
) -> None:
    last = blob_of(published, "model.safetensors", 1)
    with trio.CancelScope() as scope:
        async with open_cache(max_bytes=TIGHT) as cache:
            server.gate = hold(last, lambda: len(done_in(cache.store.root)) == PLACES - 1, scope.cancel)
            await cache.ensure(model, ignore)
    server.gate = None
    server.asked.clear()
    async with open_cache(max_bytes=TIGHT) as cache:
        same_tree(await cache.ensure(model, ignore), model_files)
    assert set(server.times()) == {last}


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import httpx, trio
from pathlib import Path
from fakes.models import Source
from xim_agent.cache.service import Cache
from xim_agent.clock import SystemClock
from xim_agent.health import Health
from xim_agent.mesh.messages import ModelRef
async def main():
    async with httpx.AsyncClient(base_url=sys.argv[2], trust_env=False) as client:
        async with Cache(directory=Path(sys.argv[3]), max_bytes=int(sys.argv[4]), downloads=8, source=Source(client),
                         allow_unsafe=False, clock=SystemClock(), health=Health(now=lambda: 0.0)) as cache:
            await cache.ensure(ModelRef(*sys.argv[5:9], int(sys.argv[9])), lambda p: None)
trio.run(main)
"""


@pytest.mark.parametrize("bound", [ROOMY, TIGHT], ids=["stored", "streamed"])
async def test_after_kill_9_only_what_is_missing_is_fetched(
    bound: int,
    open_cache: Open,
    model: ModelRef,
    server: Any,
    published: Any,
    model_files: Path,
    tmp_path: Path,
    same_tree: SameTree,
) -> None:
    last = blob_of(published, "model.safetensors", 1)
    root = tmp_path / "cache"
    stuck = trio.Event()

    async def block() -> None:
        stuck.set()
        await trio.sleep_forever()

    server.gate = hold(last, lambda: len(done_in(root)) == PLACES - 1, block)
    words = [Path(__file__).parents[1], server.url, root, bound, *msgspec.structs.astuple(model)]
    process = await trio.lowlevel.open_process([sys.executable, "-c", CHILD, *map(str, words)])
    await stuck.wait()
    process.send_signal(signal.SIGKILL)
    await process.wait()
    server.gate = None
    server.asked.clear()
    async with open_cache(max_bytes=bound) as cache:
        same_tree(await cache.ensure(model, ignore), model_files)
    assert set(server.times()) == {last}


def cache_bytes(published: Any) -> int:
    """What one fetch of everything takes."""
    data, p = published
    return int(p.stored_bytes + (data / "models/manifests" / f"{p.manifest_sha256}.json").stat().st_size)
