"""What evictions and transfers leave in the log and in the figures."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes.models import blob_of, status
from hypothesis import given
from hypothesis import strategies as st

from xim_agent.cache.inventory import Evict, Inventory, Model, Partial
from xim_agent.cache.ledger import Cause, cause
from xim_agent.cache.plan import GIB, STALE, Limits
from xim_agent.cache.service import Cache
from xim_agent.mesh.messages import ModelRef, Progress
from xim_agent.router.publish import PublishedModel, publish

Open = Callable[..., Cache]
NOW = 10 * STALE
HERE = Inventory(
    models={"m": Model("m", used=NOW - 50, ready=10 * GIB)},
    partials={"new": Partial(5, NOW - 60), "old": Partial(5, NOW - STALE - 1)},
)


@pytest.mark.parametrize(
    ("step", "bound", "free", "expected"),
    [
        (Evict("ready", "m", 1), 11 * GIB, 100 * GIB, Cause("bound", 50)),
        (Evict("ready", "m", 1), 100 * GIB, 3 * GIB, Cause("disk", 50)),
        (Evict("chunks", "m", 1), 5 * GIB, 100 * GIB, Cause("bound", 50)),
        (Evict("partial", "new", 1), 11 * GIB, 100 * GIB, Cause("bound", 60)),
        (Evict("partial", "old", 1), 11 * GIB, 100 * GIB, Cause("stale", STALE + 1)),
        (Evict("quarantine", "", 1), 11 * GIB, 100 * GIB, Cause("damaged")),
        (Evict("orphans", "", 1), 11 * GIB, 100 * GIB, Cause("unused")),
        (Evict("compile", "0.8", 1), 11 * GIB, 100 * GIB, Cause("other_vllm")),
    ],
)
def test_every_eviction_has_a_reason_and_what_was_used_an_age(
    step: Evict, bound: int, free: int, expected: Cause
) -> None:
    assert cause(step, HERE, Limits(bound, free, 100 * GIB, NOW)) == expected


@given(st.integers(0, 10**13), st.integers(0, 10**13), st.floats(-1e9, 1e12))
def test_no_clock_or_size_makes_an_age_negative(bound: int, free: int, now: float) -> None:
    why = cause(Evict("ready", "m", 1), HERE, Limits(bound, free, 10**13, now))
    assert why.reason in ("bound", "disk")
    assert why.age is not None
    assert why.age >= 0


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    (root / "model.safetensors").write_bytes(bytes(range(256)) * 900)
    (root / "config.json").write_bytes(b'{"a": 1}')
    return root


def lines(caplog: pytest.LogCaptureFixture, message: str) -> list[dict[str, Any]]:
    return [record.__dict__ for record in caplog.records if record.getMessage() == message]


async def test_a_transfer_has_a_first_and_a_last_line_with_its_figures(
    open_cache: Open, model: ModelRef, server: Any, published: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "xim_agent")
    digest = blob_of(published, "config.json")
    server.faults[digest] += [status(503), status(503)]
    async with open_cache() as cache:
        seen: list[Any] = []

        def report(progress: Progress) -> None:
            seen.append(cache.statistics())

        await cache.ensure(model, report)
        (begin,), (end,) = lines(caplog, "transfer begins"), lines(caplog, "model is ready in the cache")
        assert (begin["model"], begin["revision"], begin["bytes"]) == ("tiny", "r1", model.size_bytes)
        assert end["network_bytes"] > 0
        assert end["hit_bytes"] == 0
        assert end["seconds"] >= 0
        assert end["mb_per_s"] > 0
        (retry,) = lines(caplog, "transfer failed, trying again")  # the second one is counted only
        assert retry["code"] == "blob_failed"
        assert (cache.statistics().retries, cache.statistics().stalls) == (2, 0)
        assert all(s.fetch_done <= s.fetch_total for s in seen)
        assert seen[-1].fetch_done == seen[-1].fetch_total == model.size_bytes, "the last step verifies all files"
        assert cache.statistics().fetch_total is None
        await cache.ensure(model, report)
        assert len(lines(caplog, "transfer begins")) == 1, "a model that is ready needs none"

        cache.store.retire_damaged(model.manifest[7:])
        caplog.clear()
        await cache.ensure(model, report)
        (again,) = lines(caplog, "model is ready in the cache")
        assert again["network_bytes"] == 0
        assert again["hit_bytes"] > 0


async def test_a_transfer_that_is_refused_says_how_far_it_came(
    open_cache: Open, model: ModelRef, server: Any, published: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "xim_agent")
    server.faults[blob_of(published, "config.json")] += [status(404)] * 5
    async with open_cache() as cache:
        with pytest.RaisesGroup(Exception, allow_unwrapped=True, flatten_subgroups=True):
            await cache.ensure(model, lambda progress: None)
    (stopped,) = lines(caplog, "transfer stopped before its end")
    assert stopped["model"] == "tiny"
    assert "network_bytes" in stopped


async def test_an_eviction_is_logged_and_counted_by_kind_and_reason(
    open_cache: Open, model: ModelRef, published: tuple[Path, PublishedModel], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, "xim_agent")
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "config.json").write_bytes(b"{}" * 120_000)
    p = publish(tmp_path / "second", "second", "r1", published[0])
    second = ModelRef(p.id, p.name, p.revision, f"sha256:{p.manifest_sha256}", p.size_bytes)
    async with open_cache(max_bytes=600_000) as cache:
        await cache.ensure(model, lambda progress: None)
        await cache.ensure(second, lambda progress: None)
        stats = cache.statistics()
        assert stats.evictions == {"ready": {"bound": 1}}
        assert stats.evicted_bytes["ready"] > model.size_bytes
        assert stats.last_eviction_age is not None
        assert stats.bytes_used == sum(stats.tiers.values()) <= 600_000
        (line,) = lines(caplog, "evicted")
        assert (line["what"], line["reason"], line["model"]) == ("ready", "bound", "tiny")
        assert line["unused_seconds"] >= 0
