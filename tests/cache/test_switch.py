"""Changing models under a tight bound, on a real disk: what is served stays, and the bound holds at every step."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xim_agent.cache.plan import CacheRefused
from xim_agent.cache.service import Cache
from xim_agent.mesh.messages import ModelRef
from xim_agent.router.publish import publish

MB = 1_000_000


@pytest.fixture
def two(published: Any, tmp_path: Path) -> tuple[ModelRef, ModelRef]:
    """Two models of 12 MB, each 6 MB when stored."""
    made = []
    for name in ("one", "two"):
        root = tmp_path / name
        root.mkdir()
        rand = random.Random(name)
        for i in range(6):
            (root / f"{i}.safetensors").write_bytes(rand.randbytes(MB) + bytes(MB))
        p = publish(root, name, None, published[0])
        made.append(ModelRef(p.id, p.name, p.revision, f"sha256:{p.manifest_sha256}", p.size_bytes))
    return made[0], made[1]


class Engine:
    def __init__(self, cache: Cache, model: ModelRef, path: Path, server: Any) -> None:
        self.cache, self.model, self.path, self.server = cache, model, path, server
        self.asked_before: int | None = None

    async def release(self) -> None:
        assert len(list(self.path.glob("*.safetensors"))) == 6, "evicted while it served"
        self.asked_before = len(self.server.asked)
        self.cache.unpin(self.model)


# (usable MB, whether the engine is drained, chunks fetched before the drain, chunks of the new model kept)
CASES = [
    (40.0, False, None, True),
    (28.0, False, None, False),  # files fit beside the old ones only without chunks
    (20.0, True, 6, True),  # chunks first, then drain and expand
    (18.6, True, 6, True),
    (15.0, True, 0, False),  # drain first
]


@pytest.mark.parametrize(("usable", "drained", "before", "kept"), CASES)
async def test_cases(
    usable: float,
    drained: bool,
    before: int | None,
    kept: bool,
    open_cache: Callable[..., Cache],
    two: tuple[ModelRef, ModelRef],
    server: Any,
    disk_usage: Callable[[Path], int],
) -> None:
    old, new = two
    async with open_cache(max_bytes=int(usable * MB / 0.9)) as cache:
        path = await cache.ensure(old, lambda p: None)
        cache.pin(old)
        server.asked.clear()
        engine = Engine(cache, old, path, server)
        peak, hits = 0, cache.statistics().hit_bytes

        async def watch(digest: str) -> None:
            nonlocal peak
            peak = max(peak, disk_usage(cache.store.root))

        server.gate = watch
        ready = await cache.ensure(new, lambda p: None, engine.release)
        assert len(list(ready.glob("*.safetensors"))) == 6
        assert (engine.asked_before is not None) == drained
        assert engine.asked_before == before
        assert path.exists() == (not drained)
        assert max(peak, disk_usage(cache.store.root)) <= cache.max_bytes
        statistics = cache.statistics()
        assert statistics.hit_bytes == hits, "what was fetched just now is no hit"
        assert statistics.bytes_used == disk_usage(cache.store.root)
        assert (next(m for m in statistics.models if m.name == "two").stored > 0) == kept


async def test_without_a_way_to_drain_the_model_in_use_stays(
    open_cache: Callable[..., Cache], two: tuple[ModelRef, ModelRef], server: Any
) -> None:
    async with open_cache(max_bytes=int(15 * MB / 0.9)) as cache:
        path = await cache.ensure(two[0], lambda p: None)
        cache.pin(two[0])
        server.asked.clear()
        with pytest.raises(CacheRefused):
            await cache.ensure(two[1], lambda p: None)
        assert path.exists()
        assert not server.asked
        cache.unpin(two[0])
        await cache.ensure(two[1], lambda p: None)
        assert not path.exists()
