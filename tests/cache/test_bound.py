"""The bound, the reserve and the full disk on real file systems: what `du` says at every file operation."""

import logging
import os
import random
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fakes.disk import Operations, fill, used

from xim_agent.cache.admin import Commands
from xim_agent.cache.manifest import Manifest, encode
from xim_agent.cache.operation import Operation, _need
from xim_agent.cache.plan import CacheRefused, Case, Reserves, plan
from xim_agent.cache.service import Cache
from xim_agent.files import disk_bytes
from xim_agent.mesh.messages import ModelRef, Progress
from xim_agent.router.publish import publish

Open = Callable[..., Cache]
Du = Callable[[Path], int]
Pair = tuple[tuple[ModelRef, Path], ...]
SMALL = Reserves(disk=1_000_000, compile=100_000)


def ignore(_: Progress) -> None:
    pass


def make(root: Path, seed: str, files: int = 12) -> Path:
    """Files in a deep tree each of its own, most of them of a few bytes; half of the rest can be compressed."""
    rand = random.Random(seed)
    for i in range(files):
        path = root / "/".join(f"{seed}{i}-{depth}" for depth in range(i % 5)) / f"{i}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rand.randbytes(1 + 40_000 * (i % 3)) + bytes(40_000 * (i % 2)))
    return root


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, published: Any) -> tuple[tuple[ModelRef, Path], ...]:
    made = []
    for name in ("one", "two"):
        root = make(tmp_path_factory.mktemp(name), name)
        p = publish(root, name, "r", published[0])
        made.append((ModelRef(p.id, p.name, p.revision, f"sha256:{p.manifest_sha256}", p.size_bytes), root))
    return tuple(made)


# -- the peak --------------------------------------------------------------------------------------------------------

# What is planned, from the roomiest to the tightest: (case, whether chunks are kept).
PLANS = [
    (Case.SERVE, True),
    (Case.SERVE, False),
    (Case.CHUNKS_FIRST, True),
    (Case.CHUNKS_FIRST, False),
    (Case.DRAIN_FIRST, True),
    (Case.DRAIN_FIRST, False),
]


async def tightest(cache: Cache, model: ModelRef, source: Any, goal: tuple[Case, bool]) -> int:
    """The smallest bound below which the plan for `model` is a tighter one than `goal`."""
    manifest = msgspec.json.decode(await source.manifest(model.manifest[7:]), type=Manifest)
    operation = Operation(cache, model, model.manifest[7:], ignore, None)
    operation.data = encode(manifest)
    need = _need(operation.digest, manifest, None, operation._unsaved())
    inventory, limits, holds = cache.survey(True)

    def rank(bound: int) -> int:
        try:
            found = plan(inventory, need, replace(limits, bound=bound), holds)
        except CacheRefused:
            return len(PLANS)
        return PLANS.index((found.case, bool(getattr(found.steps[-1], "keep", None))))

    return bisect_left(range(50_000_000), -PLANS.index(goal), key=lambda bound: -rank(bound))


@pytest.mark.parametrize("goal", [PLANS[0], PLANS[1], PLANS[2], PLANS[5]], ids=lambda goal: f"{goal[0].name}-{goal[1]}")
async def test_du_is_never_above_the_bound_however_tight(
    goal: tuple[Case, bool],
    open_cache: Open,
    pair: Pair,
    source: Any,
    disk_usage: Du,
    caplog: pytest.LogCaptureFixture,
    same_tree: Any,
) -> None:
    """At every single file operation; the bound is the smallest that gives this plan, to the byte."""
    (old, _), (new, files) = pair
    async with open_cache(reserves=SMALL) as cache:
        (cache.compile_cache_dir("1.0") / "kernel").write_bytes(bytes(SMALL.compile))  # nothing is left in reserve
        path = await cache.ensure(old, ignore)
        cache.pin(old)
        before = disk_usage(path)
        (cache.store.root / "compile/0.9").mkdir()
        (cache.store.root / "compile/0.9/x").write_bytes(bytes(100_000))
        (cache.store.root / "quarantine/x").write_bytes(bytes(50_000))
        cache.max_bytes = await tightest(cache, new, source, goal)
        ceiling, peaks = disk_usage(cache.store.root), [0]
        drained: list[bool] = []

        async def release() -> None:
            assert disk_usage(path) == before, "evicted while it served"
            drained.append(True)
            cache.unpin(old)

        def look() -> None:
            nonlocal ceiling
            total = disk_bytes(cache.store.root)  # as `du`, but what vanishes meanwhile is no error
            if total > max(cache.max_bytes, ceiling):
                peaks.append(total)
            ceiling = min(ceiling, total)

        caplog.set_level(logging.DEBUG, "xim_agent.cache")
        with Operations(lambda name, args: None, look):
            ready = await cache.ensure(new, ignore, release)
        assert max(peaks) == 0, f"{max(peaks)} bytes where {cache.max_bytes} are allowed"
        same_tree(ready, files)
        assert bool(drained) == (goal[0] in (Case.CHUNKS_FIRST, Case.DRAIN_FIRST))
        assert disk_usage(cache.store.root) <= cache.max_bytes
        assert not (cache.store.root / "compile/0.9").exists(), "that of another vLLM goes before any model"
        planned = next(r for r in caplog.records if r.msg == "cache plan")
        assert planned.__dict__["case"] == goal[0].value
        assert bool(planned.__dict__["outage_bytes"]) == bool(drained)
        assert next(s for s in planned.__dict__["steps"] if s != "drain") == "evict quarantine (53248 bytes)"
        assert ("drain" in planned.__dict__["steps"]) == bool(drained)


async def test_one_byte_less_gives_the_next_plan(open_cache: Open, pair: Pair, source: Any) -> None:
    """So that the bounds of the test above are the tightest there are, and the last of all refuses."""
    (old, _), (new, _) = pair
    async with open_cache(reserves=SMALL) as cache:
        await cache.ensure(old, ignore)
        cache.pin(old)
        bounds = [await tightest(cache, new, source, goal) for goal in PLANS]
        assert bounds == sorted(bounds, reverse=True)
        cache.max_bytes = bounds[-1] - 1
        with pytest.raises(CacheRefused):
            await cache.ensure(new, ignore, cache_release(cache, old))


def cache_release(cache: Cache, model: ModelRef) -> Any:
    async def release() -> None:
        cache.unpin(model)

    return release


# -- a bound that was lowered ----------------------------------------------------------------------------------------


async def test_a_lowered_bound_costs_other_models_first_and_the_wanted_one_its_second_copy(
    open_cache: Open, pair: Pair, server: Any, disk_usage: Du
) -> None:
    (one, _), (two, _) = pair
    async with open_cache() as cache:
        await cache.ensure(one, ignore)
        path = await cache.ensure(two, ignore)
        bound = disk_usage(path) + 300_000
    server.asked.clear()
    async with open_cache(max_bytes=bound, reserves=SMALL) as cache:
        assert await cache.ensure(two, ignore) == path
        assert disk_usage(cache.store.root) <= bound
        tiers = cache.statistics().tiers
        assert tiers["ready"] == disk_usage(path)
        assert not [m for m in cache.statistics().models if m.name == "one"]
    assert not server.asked


async def test_a_bound_below_the_model_refuses_it_and_holds_all_the_same(
    open_cache: Open, pair: Pair, server: Any, disk_usage: Du
) -> None:
    one, _ = pair[0]
    async with open_cache() as cache:
        path = await cache.ensure(one, ignore)
    server.asked.clear()
    bound = disk_usage(path) - 1
    async with open_cache(max_bytes=bound, reserves=SMALL) as cache:
        with pytest.raises(CacheRefused) as e:
            await cache.ensure(one, ignore)
        assert (e.value.needed, e.value.bound) == (disk_usage(path) if path.exists() else e.value.needed, bound)
        assert disk_usage(cache.store.root) <= bound
        assert cache.statistics().tiers["blobs"] > 0, "what fits stays"
    assert not server.asked
    async with open_cache() as cache:
        await cache.ensure(one, ignore)
    assert not server.asked, "and the chunks that stayed are enough when the bound is raised again"


async def test_the_model_in_use_stays_where_the_bound_is_below_it(
    open_cache: Open, pair: Pair, server: Any, disk_usage: Du
) -> None:
    (one, files), (two, _) = pair
    async with open_cache() as cache:
        path = await cache.ensure(one, ignore)
        cache.pin(one)
        cache.max_bytes = disk_usage(path) // 2
        server.asked.clear()
        with pytest.raises(CacheRefused):
            await cache.ensure(two, ignore, cache_release(cache, two))
        assert len([p for p in path.rglob("*") if p.is_file()]) == len([p for p in files.rglob("*") if p.is_file()]) + 1
        assert not server.asked


async def test_what_vllm_wrote_above_its_reserve_is_made_up_for(open_cache: Open, pair: Pair, disk_usage: Du) -> None:
    """Without an operation, at the next look."""
    (one, _), (two, _) = pair
    async with open_cache(reserves=SMALL) as cache:
        path = await cache.ensure(one, ignore)
        await cache.ensure(two, ignore)
        cache.pin(one)
        cache.max_bytes = disk_usage(cache.store.root) + 10_000
        (cache.compile_cache_dir("1.0") / "kernel").write_bytes(bytes(50_000))
        await cache.watch_once()
        assert path.exists()
        assert {m.name: bool(m.ready) for m in cache.statistics().models}["two"] is False
    assert disk_usage(cache.directory) <= cache.max_bytes


# -- a disk that is really full --------------------------------------------------------------------------------------


class Filler:
    """Another program: takes all there is once `when` says so, and gives it back when the cache says that it waits."""

    def __init__(self, disk: Path, cache: Cache, when: Callable[[str, tuple[Any, ...]], bool]) -> None:
        self.file, self.cache, self.when = disk / "other program", cache, when
        self.said: list[str] = []
        self.filled = 0
        cache.health.on_change = self.change

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        if not self.filled and self.when(name, args):
            self.filled = 1
            with self.file.open("wb") as file:
                info = os.statvfs(self.file.parent)
                os.posix_fallocate(file.fileno(), 0, info.f_bavail * info.f_frsize)

    def change(self) -> None:
        codes = [c.code for c in self.cache.health.conditions()]
        self.said += codes
        if "cache_disk_full" in codes:
            assert "free" in self.cache.health.hints["cache_disk_full"]
            self.file.unlink(missing_ok=True)


FULL = {
    "chunk": lambda name, args: name == "pwrite" and len(args[1]) > 30_000,
    "journal": lambda name, args: name == "write" and bytes(args[1]).endswith(b"\n"),
    "manifest": lambda name, args: name == "pwrite" and bytes(args[1][:10]).startswith(b'{"files"'),
    "marker": lambda name, args: name == "pwrite" and len(args[1]) == 64,
}


@pytest.mark.parametrize("what", FULL)
async def test_a_full_disk_pauses_the_operation_and_nothing_is_fetched_twice(
    what: str,
    tmpfs: Path,
    open_cache: Open,
    pair: Pair,
    server: Any,
    same_tree: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, files = pair[0]
    caplog.set_level(logging.INFO, "xim_agent.cache")
    async with open_cache(directory=tmpfs / "cache", reserves=SMALL, full_disk_look=0.01) as cache:
        filler = Filler(tmpfs, cache, FULL[what])
        with Operations(filler.before, lambda: None):
            same_tree(await cache.ensure(model, ignore), files)
        assert filler.filled
        assert "cache_disk_full" in filler.said
        assert not cache.health.conditions()
    assert set(server.times().values()) == {1}
    said = [r.msg for r in caplog.records]
    assert said.index("the disk is full, waiting for room") < said.index("the disk has room again, the model goes on")


async def test_a_full_disk_at_the_last_step_is_waited_out_too(
    tmpfs: Path, open_cache: Open, pair: Pair, server: Any
) -> None:
    """The index is written by SQLite, which says in its own way that the disk is full."""
    async with open_cache(directory=tmpfs / "cache", reserves=SMALL, full_disk_look=0.01) as cache:
        filler = Filler(tmpfs, cache, lambda name, args: name == "rmdir" and str(args[0]) == cache_partial(pair[0][0]))
        with Operations(filler.before, lambda: None):
            await cache.ensure(pair[0][0], ignore)
        assert filler.filled
        assert "cache_disk_full" in filler.said
        assert cache.store.index.entries()


def cache_partial(model: ModelRef) -> str:
    return model.manifest[7:]


async def test_it_starts_on_a_full_disk_and_a_removal_makes_room(
    tmpfs: Path, open_cache: Open, pair: Pair, server: Any
) -> None:
    """What a crash left out of the index, which cannot be written now, is a model all the same."""
    one, two = pair[0][0], pair[1][0]
    async with open_cache(directory=tmpfs / "cache", reserves=SMALL) as cache:
        await cache.ensure(one, ignore)
        await cache.ensure(two, ignore)
        cache.store.index.remove(two.manifest[7:])
    fill(tmpfs / "other program", 0)
    async with open_cache(directory=tmpfs / "cache", reserves=SMALL, full_disk_look=0.01) as cache:
        assert two.manifest[7:] in cache.store.ready
        gone = await Commands(cache, agent=True).rm("one")
        assert sum(one["bytes"] for one in gone) > 0
        await cache.ensure(two, ignore)


async def test_the_reserve_of_the_disk_is_left_to_others(tmpfs: Path, open_cache: Open, pair: Pair) -> None:
    """Chunks pass through where disk, not bound, is short; where even that does not fit it is refused."""
    (one, _), (two, _) = pair
    stored = 300_000
    async with open_cache(directory=tmpfs / "cache", reserves=replace(SMALL, disk=2_000_000)) as cache:
        reserve = cache.limits().reserve
        assert reserve == 2_000_000
        manifest_free = 64 * 1024 * 1024 - used(tmpfs)
        assert manifest_free > reserve
        fill(tmpfs / "other program", reserve + one.size_bytes + stored)
        low = [10**9]
        with Operations(lambda name, args: None, lambda: low.append(cache.limits().disk_free)):
            await cache.ensure(one, ignore)
            assert not [b for b in (cache.store.root / "blobs").rglob("*") if b.is_file()]
            cache.pin(one)
            with pytest.raises(CacheRefused) as e:
                await cache.ensure(two, ignore)
        assert e.value.hint == "free space on the disk of the cache"
        assert min(low) >= reserve
