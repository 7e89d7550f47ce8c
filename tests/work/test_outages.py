"""Router, agent and engine killed and started again, and routers that are away for a while."""

import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from fakes.data_path import COMPLETE, DataPath, data_path
from fakes.sse_engine import paced

from xim_agent.outcome import RouterError

pytestmark = pytest.mark.filterwarnings("ignore:Async generator 'http:ResourceWarning")  # of a call cut in its body
STREAMS = 1000
SEEDS = pytest.mark.parametrize("seed", [1, *(pytest.param(s, marks=pytest.mark.full) for s in (2, 3, 4))])


async def killing(path: DataPath, kill: Callable[[], Any], seconds: float, times: int = 6) -> dict[str, int]:
    """Streams, while something is killed every now and then; how many ended in which way, each once."""

    async def now_and_then() -> None:
        for _ in range(times):
            await trio.sleep(seconds)
            await kill()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(now_and_then)
        nursery.start_soon(path.ask_many, STREAMS)
    await path.flushed()
    path.check()
    assert path.outcomes()["complete"] > STREAMS / 2
    return dict(path.outcomes())


def lasting(body: bytes) -> Iterator[tuple[float, bytes]]:
    """Every tenth answer outlives an outage."""
    for n, (pause, piece) in enumerate(paced(body)):
        yield (2.0 if n == 0 and zlib.crc32(body) % 10 == 0 else pause), piece


@SEEDS
async def test_router_is_killed(tmp_path: Path, seed: int, autojump_clock: Any) -> None:
    """Its clients lose their answers; the agent drops what nobody knows any more, and all else is served."""
    async with data_path(tmp_path, seed=seed) as path:
        path.engine.script = lasting

        async def kill() -> None:
            path.kill_router()
            await trio.sleep(0.2)
            await path.start_router()
            killed = trio.current_time()
            await path.back()
            assert trio.current_time() - killed < 2

        outcomes = await killing(path, kill, 0.6, times=4)
        assert set(outcomes) <= {"complete", "gone"}
        ended = path.agent.statistics.ended
        assert ended.get("unknown", 0) + ended.get("cancelled", 0) > 0


@SEEDS
async def test_agent_is_killed(tmp_path: Path, seed: int, autojump_clock: Any) -> None:
    """Nothing is spooled: the router ends its leases at the next start, or gives them to it once more."""
    async with data_path(tmp_path, seed=seed) as path:

        async def kill() -> None:
            await path.kill_agent()
            await trio.sleep(0.3)
            await path.start_agent()

        assert set(await killing(path, kill, 0.7)) == {"complete", "engine_lost"}
        assert not (tmp_path / "spool").exists()
        cut = [client for client in path.clients if client.outcome is not COMPLETE]
        assert all(client.data or path.engine.asked[client.body] >= 3 for client in cut), "else it is tried again"


@SEEDS
async def test_engine_is_killed(tmp_path: Path, seed: int, autojump_clock: Any) -> None:
    async with data_path(tmp_path, seed=seed) as path:

        async def kill() -> None:
            path.kill_engine()
            await trio.sleep(0.5)
            await path.start_engine()

        assert set(await killing(path, kill, 0.7)) == {"complete", "engine_lost"}


async def test_spooled_endings_arrive_at_the_next_start(tmp_path: Path, autojump_clock: Any) -> None:
    """The endings are all that the router misses: it cannot be reached any more when they are there."""
    async with data_path(tmp_path, ceiling=250) as path:
        whole = path.engine.script

        def ends_late(body: bytes) -> Any:
            yield from whole(body)
            yield 30.0, b""

        path.engine.script = ends_late
        for _ in range(STREAMS // 250):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(path.ask_many, 250, at_once=250))
                await trio.sleep(20)
                path.proxy.unplug()
                await trio.sleep(15)
                await path.stop_agent()
                assert path.agent.statistics.held == 250
                assert path.outcomes()["none"] == 250
                await path.proxy.plug()
                await path.start_agent()
                await path.ready()
                assert not (tmp_path / "spool").exists()
        await path.ask_many(10)
        await path.flushed()
        path.check()
        assert path.outcomes() == {"complete": STREAMS + 10}
        assert set(path.engine.asked.values()) == {1}


@pytest.mark.parametrize(
    "seconds", [1, 50, 600, *(pytest.param(s, marks=pytest.mark.full) for s in (3, 10, 30, 120, 300))]
)
async def test_router_is_away(tmp_path: Path, seconds: int, autojump_clock: Any) -> None:
    async with data_path(tmp_path) as path:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(path.ask_many, STREAMS)
            await trio.sleep(0.5)
            before = path.outcomes()
            assert 0 < before["complete"] < STREAMS
            assert before["none"]
            path.proxy.unplug()
            calls = path.agent.router.statistics().calls
            await trio.sleep(seconds)
            assert (
                path.agent.router.statistics().calls - calls <= seconds + 3
            )  # two of events and a poll were under way
            assert not path.agent.link.up
            await path.proxy.plug()
            back = trio.current_time()
            await path.back()
            assert trio.current_time() - back < 2
        await path.flushed()
        path.check()
        outcomes = path.outcomes()
        if seconds < path.limits.queue_wait:
            assert outcomes == {"complete": STREAMS}
        else:
            assert set(outcomes) <= {"complete", "engine_lost", "endpoint_inactive", "capacity_exceeded"}
        await path.ask_many(10)
        assert path.outcomes()["complete"] == outcomes["complete"] + 10


@pytest.mark.parametrize(
    ("seconds", "accepts", "streams"),
    [
        (30, True, STREAMS), (60, False, 0),
        *(pytest.param(*case, marks=pytest.mark.full) for case in (
            (12, True, STREAMS), (12, False, STREAMS), (13, False, STREAMS), (14, True, STREAMS), (30, False, STREAMS),
            (120, True, STREAMS), (600, False, STREAMS), (600, True, STREAMS), (60, True, 0), (600, False, 0),
        )),
    ],
)  # fmt: skip
async def test_cable_is_pulled(tmp_path: Path, seconds: int, accepts: bool, streams: int, autojump_clock: Any) -> None:
    """No call ends by itself: those under way when it happens, and those that are made meanwhile."""
    async with data_path(tmp_path) as path:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(path.ask_many, streams)
            await trio.sleep(0.5)
            await path.proxy.pull(accepts=accepts)
            calls = path.agent.router.statistics().calls
            await trio.sleep(seconds)
            assert path.agent.router.statistics().calls - calls <= seconds + 3
            assert not path.agent.link.up
            await path.proxy.plug()
            back = trio.current_time()
            await path.back()
            assert trio.current_time() - back < 2
            if seconds < path.limits.queue_wait:
                assert (await path.ask(b"after it")).outcome is COMPLETE
                assert trio.current_time() - back < 5
        await path.flushed()
        path.check()
        outcomes = path.outcomes()
        if seconds < path.limits.queue_wait:
            assert set(outcomes) == {"complete"}
        assert set(outcomes) <= {"complete", "engine_lost", "endpoint_inactive", "capacity_exceeded"}


@pytest.mark.parametrize("status", [502, 503, 504])
async def test_proxy_in_front_of_a_router_that_restarts(
    bench: Any, router: Any, status: int, autojump_clock: Any
) -> None:
    router.cut(RouterError(f"http_{status}", "nothing behind the proxy", status=status))
    await bench.settle(300)
    router.attempts.clear()
    await bench.settle(100)
    assert len(router.attempts) <= 100
    router.cut(None)
    await bench.settle(2)
    assert bench.link.up
