"""Is a hang found, and is nothing else taken for one? Scripted launchers in a time that runs faster than the real one.

Scored: `pytest -s` prints the board. What a look may decide is in test_liveness.py, to the second.
"""

import gc
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
from fakes.engine import Bench, until, write_model
from trio.testing import MockClock

from xim_agent.engine.client import EngineLost
from xim_agent.engine.guard import Guard
from xim_agent.engine.service import EngineService
from xim_agent.engine.state import EngineState
from xim_agent.engine.tree import descendants

RATE = 6.0  # more, and two busy cores are too slow for the looks of twenty agents
LIMIT = 60.0  # the default of ENGINE_HANG_SECONDS
WATCHED = 80.0  # how long an engine that works is watched
JSON = {"content-type": "application/json"}


def core(bench: Bench) -> int:
    """Pid of the process that plays EngineCore."""
    return next(p.pid for p in descendants(bench.guard.pid) if p.pid != bench.starts[-1])


def stop(bench: Bench, pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


async def ask(service: EngineService, body: bytes, pause: float = 0.0) -> None:
    """One request to its end; reads on only after `pause` seconds."""
    async with service.client.open("/v1/completions", JSON, body) as reply, aclosing(reply.chunks()) as chunks:
        async for _ in chunks:
            await trio.sleep(pause)


async def for_ever(service: EngineService, body: bytes, pause: float, again_after: float) -> None:
    with suppress(EngineLost):
        while True:
            await ask(service, body, pause)
            await trio.sleep(again_after)


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": "hi", **fields}).encode()


def every(seconds: float) -> dict[str, Any]:
    """A token every so many seconds of the test's time."""
    return {"stream": True, "max_tokens": 100_000, "fake": {"delay": seconds / RATE}}


@dataclass(frozen=True)
class Case:
    """`traffic`: bodies of requests, each asked again when it is answered. `strike` is done when they have begun."""

    name: str
    hangs: bool
    traffic: tuple[bytes, ...] = ()
    words: str = ""
    strike: Callable[[Bench], None] = lambda _: None
    pause: float = 0.0
    again_after: float = 1.0
    env: dict[str, str] = field(default_factory=dict)


STREAM = body(**every(0.5))
CORE = {"FAKE_VLLM_CORE": "1"}
LATE = {"FAKE_VLLM_LATE": str(6 / RATE)}
CASES = (
    Case("core stands still in a stream, /health 200", True, (STREAM,), "hang"),
    Case("core stands still in an unstreamed request", True, (body(max_tokens=9, fake={"first_delay": 9.0}),), "hang"),
    Case("core stands still, idle", True, (), "hang"),
    Case("core stands still, only refused requests come", True, (b"no JSON",), "hang"),
    Case("core stands still, clients give up and come again", True, (body(stream=True),), "hang", again_after=0.1),
    Case("EngineCore under SIGSTOP in a stream", True, (STREAM,), strike=lambda b: stop(b, core(b)), env=CORE),
    Case("EngineCore under SIGSTOP, idle", True, (), strike=lambda b: stop(b, core(b)), env=CORE),
    Case("API server under SIGSTOP, EngineCore works", True, (STREAM,), strike=lambda b: stop(b, b.starts[-1])),
    Case("API server under SIGSTOP, idle", True, (), strike=lambda b: stop(b, b.starts[-1])),
    Case("core stands still, /metrics late", True, (STREAM,), "hang late_metrics", env=LATE),
    Case("saturated: it moves, but for none of ours", False, (STREAM,), "saturated"),
    Case("long prefill: only the KV cache fills", False, (body(stream=True),), "prefill"),
    Case("slow CPU: one step over the whole prompt", False, (body(stream=True),), "compute", env=CORE),
    Case("slow CPU: a token every 20 s", False, (body(**every(20.0)),)),
    Case("client pauses in its answer", False, (body(stream=True, max_tokens=50),), pause=1000.0),
    Case("one lease silent, another streams", False, (body(stream=True, fake={"first_delay": 1000.0}), STREAM)),
    Case("/metrics late, tokens flow", False, (STREAM,), "late_metrics", env=LATE),
    Case("/health and /metrics late, tokens flow", False, (STREAM,), "late_health late_metrics", env=LATE),
    Case("idle", False),
)  # fmt: skip


@dataclass
class Bed:
    """Where one case lies: a guard is made before trio runs."""

    case: Case
    bench: Bench
    seconds: float | None = None  # from the strike until the engine was given up

    async def run(self) -> None:
        service = self.bench.service()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.run)
            await service.switch(self.bench.target())
            await service.wait_ready()
            for asked in self.case.traffic:
                nursery.start_soon(for_ever, service, asked, self.case.pause, self.case.again_after)
            await trio.sleep(4.0)
            self.bench.say(self.case.words)
            self.case.strike(self.bench)
            struck = trio.current_time()
            with trio.move_on_after(2 * LIMIT if self.case.hangs else WATCHED):
                await until(lambda: service.state is not EngineState.READY, 3 * LIMIT)
                self.seconds = trio.current_time() - struck
            nursery.cancel_scope.cancel()


@pytest.fixture
def beds(runtime: Path) -> Iterator[list[Bed]]:
    made = []
    for number, case in enumerate(CASES):
        place = runtime / str(number)
        place.mkdir()
        made.append(Bed(case, Bench(Guard.start(), place, write_model(place / "model"), env=dict(case.env))))
    yield made
    for bed in made:
        bed.bench.guard.close()


@pytest.fixture
def fast_clock() -> MockClock:
    return MockClock(rate=RATE)


def board(beds: list[Bed]) -> str:
    lines = []
    for bed in beds:
        found = "left alone" if bed.seconds is None else f"{bed.seconds:.0f} s"
        right = (bed.seconds is not None) == bed.case.hangs
        lines.append(f"{'ok   ' if right else 'WRONG'} {found:>10}  {bed.case.name}")
    return "\n".join(lines)


# httpx's generators left half-way are closed with their response, not by name; a connection cut while it is made is
# left to the collector by httpcore.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <(async_gen|socket):pytest.PytestUnraisableExceptionWarning")
async def test_hangs_are_found_and_nothing_else(beds: list[Bed], fast_clock: MockClock, error_logs: list[Any]) -> None:
    async with trio.open_nursery() as nursery:
        for bed in beds:
            nursery.start_soon(bed.run)
    gc.collect()  # here, where the warnings are expected
    print(f"\n{board(beds)}")
    assert "WRONG" not in board(beds), board(beds)


async def test_a_machine_that_was_suspended_is_no_hang(
    bench: Bench, fast_clock: MockClock, error_logs: list[Any], nursery: trio.Nursery
) -> None:
    """It stands still while we do; the clock has gone on."""
    fast_clock.rate = 20.0
    service = bench.service()
    nursery.start_soon(service.run)
    await service.switch(bench.target())
    await service.wait_ready()
    nursery.start_soon(for_ever, service, STREAM, 0.0, 1.0)
    await trio.sleep(4.0)
    bench.say("hang")
    await trio.sleep(20.0)
    fast_clock.jump(3600.0)
    await trio.sleep(10.0)
    assert service.ready
    bench.say("")
    await trio.sleep(30.0)
    assert service.ready
    assert len(bench.starts) == 1
    nursery.cancel_scope.cancel()
