"""The service over scripted runs: no order of what operators ask and what happens breaks its state machine."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from fakes.engine import CPU_HOST, assignment
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xim_agent.assignment.plan import EngineTarget
from xim_agent.clock import SystemClock
from xim_agent.config.fields import Config
from xim_agent.engine import gate
from xim_agent.engine import service as module
from xim_agent.engine.process import Ended, Hooks
from xim_agent.engine.service import EngineService
from xim_agent.engine.state import LONGEST_DELAY, EngineState, may_follow
from xim_agent.errors import AgentError
from xim_agent.health import Health

FLAG = "vllm: error: unrecognized arguments: --x"
# What a run does next, as long as it lasts. The first two end it by themselves.
HAPPENS = ("crash", "unknown flag", "corrupt weights", "ready", "nothing")
LASTING = {"corrupt_weights", "engine_flag_unknown"}  # the same start fails the same way: it need not be tried again
ASKED = ("switch to a", "switch to b", "switch to what cannot be", "no target", "stop")


@dataclass(frozen=True)
class ScriptedPlan:
    argv: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    ceiling: int = 4

    def same_engine(self, other: "ScriptedPlan") -> bool:
        return self.argv == other.argv

    def ceiling_for(self, _: int) -> int:
        return self.ceiling


@dataclass
class ScriptedPlanner:
    """`flags_known` after it has asked once, which takes 10 s."""

    socket: str = "/nowhere"
    runtime: Path = Path("/nowhere")
    notes: str = "/nowhere"
    flags_known: bool = False

    async def own_runtime(self) -> None:
        await trio.lowlevel.checkpoint()

    async def clean(self) -> None:
        await trio.sleep(0.1)

    async def plan(self, target: EngineTarget) -> ScriptedPlan:
        await trio.sleep(0.1)
        name = target.assignment.serving.served_model_name
        if name == "impossible":
            raise AgentError("model_does_not_fit", "too large")
        return ScriptedPlan((name, "known" if self.flags_known else "unknown"))

    async def learn_flags(self, _: ScriptedPlan) -> bool:
        await trio.sleep(10.0)
        learnt, self.flags_known = not self.flags_known, True
        return learnt

    def environment(self, _: ScriptedPlan) -> dict[str, str]:
        return {}


@dataclass
class ScriptedRun:
    """As EngineRun. Stopping takes 2 s."""

    hooks: Hooks
    world: "World"
    argv: tuple[str, ...] = ()
    began_at: float = 0.0
    ready_at: float | None = None
    over: trio.Event = field(default_factory=trio.Event)
    ended: Ended | None = None
    stopping: bool = False

    def stop(self) -> None:
        self.stopping = True
        self.over.set()

    def happens(self, what: str) -> None:
        if what == "ready" and self.ready_at is None:
            self.ready_at = trio.current_time()
            self.hooks.ready()
        if what in ("crash", "unknown flag", "corrupt weights"):
            tail = {"unknown flag": FLAG, "corrupt weights": "SafetensorError: x"}.get(what, "")
            ready_for = 0.0 if self.ready_at is None else trio.current_time() - self.ready_at
            self.ended = Ended(1, "", tail, ready_for)
            self.over.set()

    async def run(self, argv: tuple[str, ...], *_: Any) -> Ended:
        self.argv = argv
        self.world.live.append(self)
        assert len(self.world.live) == 1, "one engine at a time"
        try:
            await self.over.wait()
            if self.stopping:
                await trio.sleep(2.0)
            self.hooks.over()
            assert self.world.service is not None
            assert not self.world.service.ready, "at once"
            await trio.sleep(0.1)
        finally:
            self.world.live.remove(self)
        return self.ended or Ended(None, "", "", 0.0)


class Watched(EngineService):
    """Notes each change of state."""

    world: "World"

    def _become(self, state: EngineState) -> None:
        if state is not self.state:
            self.world.seen.append((self.state, state, trio.current_time()))
        super()._become(state)


@dataclass
class World:
    live: list[ScriptedRun] = field(default_factory=list)
    seen: list[tuple[EngineState, EngineState, float]] = field(default_factory=list)
    health: Health = field(default_factory=lambda: Health(now=lambda: 0.0))
    service: EngineService | None = None

    def make(self, patch: pytest.MonkeyPatch) -> EngineService:
        class Guard:
            async def kill_all(self) -> list[int]:
                await trio.lowlevel.checkpoint()
                return []

        def made(_guard: Any, _probe: Any, hooks: Hooks, *_: Any, **__: Any) -> ScriptedRun:
            return ScriptedRun(hooks, self)

        patch.setattr(module, "EngineRun", made)
        patch.setattr(module, "Planner", lambda *_: ScriptedPlanner())
        patch.setattr(gate, "needed_memory", lambda _: {})
        patch.setattr(module, "Probe", lambda *_: None)
        patch.setattr(gate, "shown", str)
        self.service = service = Watched(
            config=Config(), hardware=CPU_HOST, guard=Guard(), runtime_dir=Path("/nowhere"), clock=SystemClock(),
            health=self.health, compile_cache=lambda _: Path("/nowhere"), changed=lambda: None,
        )  # type: ignore[arg-type]  # fmt: skip
        service.world = self
        return service


def named(name: str) -> EngineTarget:
    return EngineTarget(assignment(served_model_name=name), Path("/"))


async def asks(service: EngineService, what: str) -> None:
    match what:
        case "stop":
            await service.stop()
        case "no target":
            await service.switch(None)
        case "switch to what cannot be":
            with pytest.raises(AgentError):
                await service.switch(named("impossible"))
        case _:
            await service.switch(named(what[-1]))


async def life(service: EngineService, world: World, steps: list[tuple[str, float]]) -> None:
    """Asks and happenings, each followed by so many seconds; then it is stopped for good."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.run)
        wanted = None
        for what, pause in steps:
            if what in ASKED:
                nursery.start_soon(asks, service, what)
                wanted = {"stop": None, "no target": None, "switch to what cannot be": wanted}.get(what, what[-1])
            elif world.live:
                world.live[0].happens(what)
            await trio.sleep(pause)
        await trio.sleep(LONGEST_DELAY + 30)
        assert service.ceiling == (4 if wanted else 0)
        if world.live or service.statistics().failure not in LASTING:
            assert [run.argv[0] for run in world.live] == ([wanted] if wanted else []), "what was last asked for"
        with trio.fail_after(5):
            await service.stop()
        assert not world.live
        assert service.state is EngineState.STOPPED
        assert not service.degraded
        assert not world.health.conditions()
        nursery.cancel_scope.cancel()


def lived(steps: list[tuple[str, float]]) -> World:
    world = World()
    logger = logging.getLogger("xim_agent.engine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logger, "disabled", True)
        trio.run(lambda: life(world.make(patch), world, steps), clock=trio.testing.MockClock(autojump_threshold=0))
    return world


STEPS = st.lists(st.tuples(st.sampled_from(ASKED + HAPPENS), st.sampled_from([0.0, 0.05, 0.5, 3.0, 70.0])), max_size=14)


@given(STEPS)
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_no_order_of_events_breaks_it(steps: list[tuple[str, float]]) -> None:
    for before, after, _ in lived(steps).seen:
        assert may_follow(before, after)


CHANGES: dict[tuple[str, str], list[tuple[str, float]]] = {
    ("STOPPED", "STARTING"): [("switch to a", 1.0)],
    ("STARTING", "READY"): [("switch to a", 1.0), ("ready", 1.0)],
    ("STARTING", "DRAINING"): [("switch to a", 1.0), ("stop", 5.0)],
    ("STARTING", "FAILED"): [("switch to a", 1.0), ("crash", 1.0)],
    ("READY", "DRAINING"): [("switch to a", 1.0), ("ready", 1.0), ("stop", 5.0)],
    ("READY", "FAILED"): [("switch to a", 1.0), ("ready", 1.0), ("crash", 1.0)],
    ("DRAINING", "STOPPED"): [("switch to a", 1.0), ("ready", 1.0), ("stop", 5.0)],
    ("FAILED", "STARTING"): [("switch to a", 1.0), ("crash", 20.0)],
    ("FAILED", "STOPPED"): [("switch to a", 1.0), ("crash", 1.0), ("stop", 1.0)],
}


@pytest.mark.parametrize("change", CHANGES, ids="_".join)
def test_each_change_of_the_table_happens(change: tuple[str, str]) -> None:
    assert change in {(before.name, after.name) for before, after, _ in lived(CHANGES[change]).seen}


def test_the_table_has_no_other_changes() -> None:
    allowed = {(a.name, b.name) for a in EngineState for b in EngineState if may_follow(a, b)}
    assert allowed - {("STOPPED", "FAILED")} == set(CHANGES), "but for a GPU in trouble before the first start"


def starts(world: World) -> list[float]:
    first, *others = [at for _, after, at in world.seen if after is EngineState.STARTING]
    return [round(at - first) for at in (first, *others)]


def test_failing_starts_are_tried_later_and_later_and_when_degraded_every_five_minutes() -> None:
    crashes = [("crash", pause) for pause in (6.0, 11.0, 21.0, 41.0, 301.0, 301.0, 1.0)]
    assert starts(lived([("switch to a", 1.0), *crashes]))[:7] == [0, 6, 17, 38, 79, 380, 681]


def test_it_comes_back_from_degraded() -> None:
    crashes = [("crash", pause) for pause in (6.0, 11.0, 21.0, 41.0, 301.0)]
    world = lived([("switch to a", 1.0), *crashes, ("ready", 1.0)])
    assert (EngineState.STARTING, EngineState.READY) in {(a, b) for a, b, _ in world.seen}


def test_another_model_or_other_options_begin_with_a_fresh_budget() -> None:
    crashes = [("crash", pause) for pause in (6.0, 11.0, 21.0, 41.0, 1.0)]
    assert starts(lived([("switch to a", 1.0), *crashes, ("switch to b", 1.0), ("crash", 8.0)]))[5:7] == [81, 87]
