"""The service with fakes in virtual time; every fake writes what it saw into one log."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from xim_agent.assignment.plan import RETRY_REFUSED, Change, EngineTarget, change
from xim_agent.assignment.service import AssignmentService
from xim_agent.errors import AgentError
from xim_agent.health import Health
from xim_agent.mesh.messages import Assignment, ModelRef, ModelState, Progress, Serving
from xim_agent.outcome import RouterError


def assignment(generation: int, name: str = "m", **serving: Any) -> Assignment:
    ref = ModelRef(name, name, "r", f"sha256:{name}", 10)
    return Assignment("iss", "agent", 0, generation, ref, Serving(name, **serving))


@dataclass
class World:
    """All parts around the service. `current`: what the router assigns; `errors`: raised by its next calls."""

    remembered: Assignment | None = None
    current: Assignment | None = None
    errors: list[AgentError] = field(default_factory=list)
    refused: dict[str, AgentError] = field(default_factory=dict)
    slow: dict[str, float] = field(default_factory=dict)
    tight: bool = False
    disk_full: bool = False
    drain_seconds: float = 0.0
    log: list[str] = field(default_factory=list)
    pins: set[str] = field(default_factory=set)
    paused: bool = False

    def __post_init__(self) -> None:
        self.health = Health(now=trio.current_time)
        self.service = AssignmentService(
            identity=self, router=self, cache=self, engine=self, intake=self, health=self.health, rand=lambda: 0.999
        )

    # identity and router
    def remembered_assignment(self) -> Assignment | None:
        return self.remembered

    async def verify_assignment(self, jws: str) -> Assignment:
        await trio.lowlevel.checkpoint()
        assert self.current is not None
        return self.current

    async def forget_assignment(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.disk_full:
            raise AgentError("state_write_failed", "no space left on device")
        self.remembered = None

    async def assignment(self) -> str | None:
        await trio.lowlevel.checkpoint()
        self.log.append("ask")
        if self.errors:
            raise self.errors.pop(0)
        return "jws" if self.current else None

    # cache
    async def ensure(
        self,
        model: ModelRef,
        report: Callable[[Progress], None],
        release: Callable[[], Awaitable[None]] | None = None,
    ) -> Path:
        self.log.append(f"fetch {model.name}")
        report(Progress("fetch", 1, 10, 1.0))
        if self.tight and release is not None:
            await release()
        try:
            await trio.sleep(self.slow.get(model.name, 1))
        except trio.Cancelled:
            self.log.append(f"stopped {model.name}")
            raise
        if model.name in self.refused:
            raise self.refused[model.name]
        return Path("/ready") / model.name

    def pin(self, model: ModelRef) -> None:
        self.pins.add(model.name)

    def unpin(self, model: ModelRef) -> None:
        self.pins.discard(model.name)

    # engine and intake
    async def switch(self, target: EngineTarget | None) -> None:
        await trio.lowlevel.checkpoint()
        if target is not None:
            assert target.assignment.model.name in self.pins
        self.log.append(f"engine {target.directory.name if target else None}{' paused' if self.paused else ''}")

    async def pause(self) -> None:
        self.paused = True
        await trio.sleep(self.drain_seconds)
        self.log.append("drained")

    def resume(self) -> None:
        self.paused = False

    def take(self) -> list[str]:
        log, self.log[:] = list(self.log), []
        return log


@pytest.fixture
async def start(nursery: trio.Nursery) -> Any:
    async def start(world: World, seconds: float = 5) -> World:
        nursery.start_soon(world.service.run)
        await trio.sleep(seconds)
        return world

    return start


async def test_the_remembered_assignment_starts_before_the_router_is_asked(
    start: Any, autojump_clock: MockClock
) -> None:
    w = await start(World(remembered=assignment(4), errors=[RouterError("x", "down")] * 99))
    assert w.take() == ["fetch m", "engine m"]
    assert w.service.model_state() == ModelState("m", "r", 4)
    w.service.generation_seen(4)
    await trio.sleep(1000)
    assert w.take() == []


async def test_without_one_the_router_is_asked_until_it_answers(start: Any, autojump_clock: MockClock) -> None:
    w = await start(World(current=assignment(1), errors=[RouterError("x", "down")] * 4), 30)
    assert w.take() == ["ask"] * 5 + ["fetch m", "engine m"]


async def test_another_model_is_fetched_while_the_old_one_serves_then_drained_and_switched(
    start: Any, autojump_clock: MockClock
) -> None:
    w = await start(World(remembered=assignment(1), drain_seconds=50))
    w.take()
    w.current = assignment(2, "n")
    w.slow["n"] = 100
    w.service.generation_seen(2)
    await trio.sleep(99)
    assert (w.take(), w.pins, w.paused) == (["ask", "fetch n"], {"m"}, False)
    assert w.service.model_state() == ModelState("m", "r", 1)
    assert w.service.progress is not None
    await trio.sleep(20)
    assert (w.pins, w.paused) == ({"m", "n"}, True)
    await trio.sleep(50)
    assert (w.take(), w.pins, w.paused) == (["drained", "engine n paused"], {"n"}, False)
    assert w.service.model_state() == ModelState("n", "r", 2)
    assert w.service.progress is None


async def test_only_another_generation_of_the_same_disturbs_no_lease(start: Any, autojump_clock: MockClock) -> None:
    w = await start(World(remembered=assignment(1)))
    w.take()
    w.current = assignment(2)
    w.service.generation_seen(2)
    await trio.sleep(5)
    assert w.take() == ["ask", "fetch m", "engine m"]
    assert w.service.model_state() == ModelState("m", "r", 2)


async def test_other_serving_of_the_same_model_drains(start: Any, autojump_clock: MockClock) -> None:
    w = await start(World(remembered=assignment(1)))
    w.take()
    w.current = assignment(2, max_model_len=5)
    w.service.generation_seen(2)
    await trio.sleep(5)
    assert w.take() == ["ask", "fetch m", "drained", "engine m paused"]
    assert w.pins == {"m"}


async def test_no_assignment_drains_stops_the_engine_and_lets_go_of_the_model(
    start: Any, autojump_clock: MockClock
) -> None:
    w = await start(World(remembered=assignment(1)))
    w.take()
    w.service.generation_seen(0)
    await trio.sleep(5)
    assert (w.take(), w.pins, w.paused) == (["ask", "drained", "engine None paused"], set(), False)
    assert w.service.model_state() is None
    assert w.remembered is None, "the next start must not begin with it"


async def test_under_a_tight_bound_the_engine_stops_where_the_cache_asks_for_it(
    start: Any, autojump_clock: MockClock
) -> None:
    w = await start(World(remembered=assignment(1), tight=True))
    w.take()
    w.current = assignment(2, "n")
    w.service.generation_seen(2)
    await wait_all_tasks_blocked()
    assert w.service.model_state() is None
    assert w.pins == set()
    await trio.sleep(5)
    assert w.take() == ["ask", "fetch n", "drained", "engine None paused", "engine n"]
    assert w.pins == {"n"}


async def test_a_newer_generation_stops_a_fetch(start: Any, autojump_clock: MockClock) -> None:
    w = await start(World(remembered=assignment(1)))
    w.take()
    w.current, w.slow["n"] = assignment(2, "n"), 10_000
    w.service.generation_seen(2)
    await trio.sleep(50)
    w.current = assignment(3, "o")
    w.service.generation_seen(3)
    await trio.sleep(5)
    assert w.take() == ["ask", "fetch n", "stopped n", "ask", "fetch o", "drained", "engine o paused"]
    assert w.pins == {"o"}


async def test_a_fetch_taken_back_leaves_the_running_model_alone(start: Any, autojump_clock: MockClock) -> None:
    w = await start(World(remembered=assignment(1)))
    w.take()
    w.current, w.slow["n"] = assignment(2, "n"), 10_000
    w.service.generation_seen(2)
    await trio.sleep(50)
    w.current = assignment(3)
    w.service.generation_seen(3)
    await trio.sleep(5)
    assert w.take() == ["ask", "fetch n", "stopped n", "ask", "fetch m", "engine m"]


async def test_a_newer_generation_does_not_cut_a_drain_short(start: Any, autojump_clock: MockClock) -> None:
    w = await start(World(remembered=assignment(1), tight=True, drain_seconds=20))
    w.take()
    w.current = assignment(2, "n")
    w.service.generation_seen(2)
    await trio.sleep(5)
    w.current = assignment(3, "o")
    w.service.generation_seen(3)
    await trio.sleep(30)
    assert w.take() == ["ask", "fetch n", "drained", "engine None paused", "stopped n", "ask", "fetch o", "engine o"]
    assert (w.pins, w.paused) == ({"o"}, False)


@pytest.mark.parametrize(
    "error", [AgentError("cache_refused", "too big"), RouterError("blob_unknown", "gone", status=404)]
)
async def test_a_refused_model_leaves_the_running_one_and_is_tried_again_after_10_minutes(
    start: Any, autojump_clock: MockClock, error: AgentError, error_logs: list[Any]
) -> None:
    w = await start(World(remembered=assignment(1), refused={"n": error}))
    w.take()
    w.current = assignment(2, "n")
    w.service.generation_seen(2)
    await trio.sleep(5)
    assert w.take() == ["ask", "fetch n"]
    assert [c.code for c in w.health.conditions()] == ["model_refused"]
    assert w.service.statistics().refused
    for _ in range(50):
        w.service.generation_seen(2)
        await trio.sleep(10)
    assert w.take() == []
    w.refused.clear()
    await trio.sleep(RETRY_REFUSED - 490)
    assert w.take() == ["ask", "fetch n", "drained", "engine n paused"]
    assert not w.health.conditions()
    assert w.service.statistics().refused is None


async def test_a_refused_model_gives_way_to_a_new_generation_at_once(
    start: Any, autojump_clock: MockClock, error_logs: list[Any]
) -> None:
    w = await start(World(current=assignment(1), refused={"m": AgentError("x", "bad")}))
    w.take()
    w.current = assignment(2, "n")
    w.service.generation_seen(2)
    await trio.sleep(5)
    assert w.take() == ["ask", "fetch n", "engine n"]
    assert not w.health.conditions()


async def test_an_assignment_that_does_not_verify_changes_nothing(
    start: Any, autojump_clock: MockClock, error_logs: list[Any]
) -> None:
    w = await start(World(remembered=assignment(1)))
    w.take()
    w.errors = [AgentError("assignment_refused", "wrong key")]
    w.service.generation_seen(2)
    await trio.sleep(300)
    assert w.take() == ["ask"]
    assert w.service.model_state() == ModelState("m", "r", 1)
    assert [c.code for c in w.health.conditions()] == ["model_refused"]


async def test_a_router_that_hands_out_another_generation_than_it_names_is_not_asked_in_a_loop(
    start: Any, autojump_clock: MockClock
) -> None:
    w = await start(World(remembered=assignment(1), current=assignment(1)))
    w.take()
    w.service.generation_seen(9)
    await trio.sleep(300)
    assert 5 < len(w.take()) < 20


async def test_no_model_is_obeyed_though_it_cannot_be_written_down(start: Any, autojump_clock: MockClock) -> None:
    w = await start(World(remembered=assignment(1), disk_full=True))
    w.service.generation_seen(0)
    await trio.sleep(5)
    assert w.take()[-2:] == ["drained", "engine None paused"]
    assert w.service.model_state() is None
    assert w.health.conditions() == []


@pytest.mark.parametrize(
    ("status", "code"), [(410, "agent_removed"), (426, "protocol_unsupported"), (409, "identity_in_use")]
)
async def test_what_ends_the_process_is_raised(autojump_clock: MockClock, status: int, code: str) -> None:
    w = World(errors=[RouterError(code, "no", status=status)])
    with pytest.raises(RouterError):
        await w.service.run()


A = assignment(1)
CHANGES = [
    (None, None, Change.NONE),
    (A, None, Change.STOP),
    (None, A, Change.SWITCH),
    (A, A, Change.NONE),
    (A, assignment(2), Change.RELABEL),
    (A, assignment(2, "n"), Change.SWITCH),
    (A, assignment(2, engine_args=("--x",)), Change.SWITCH),
]


@pytest.mark.parametrize(("running", "wanted", "expected"), CHANGES)
def test_change(running: Assignment | None, wanted: Assignment | None, expected: Change) -> None:
    assert change(running, wanted) is expected
