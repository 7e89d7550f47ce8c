"""agent.run with fake services in virtual time."""

import signal
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from xim_agent import agent, signals
from xim_agent.errors import AgentError, Exit


@dataclass
class World:
    """Fake services that write what happens, with virtual times, into `seen`."""

    work_seconds: tuple[float, ...] = ()
    load_seconds: float = 0.0
    tell_seconds: float = 0.0
    flush_seconds: float = 0.0
    stop_seconds: float = 1.0
    drain_seconds: float = 120.0
    crash: Callable[[], BaseException] | None = None
    crash_after: float = 1.0
    seen: list[tuple[float, str]] = field(default_factory=list)
    start: float = 0.0
    stop: trio.Event = field(default_factory=trio.Event)

    def say(self, what: str) -> None:
        self.seen.append((round(trio.current_time() - self.start, 3), what))

    def words(self) -> list[str]:
        return [w for _, w in self.seen]

    def at(self, what: str) -> float:
        return next(t for t, w in self.seen if w == what)

    async def serve(self) -> None:
        self.start = trio.current_time()
        parts = agent.Parts(
            identity=Identity(self),
            engine=Engine(self),
            assignment=Idle(self, "assignment"),
            poller=Poller(self),
            sender=Sender(self),
            listeners=(),
            drain_seconds=self.drain_seconds,
            on_hangup=lambda: self.say("hangup"),
        )
        try:
            await agent.run(parts, stop=self.stop)
        finally:
            self.say("returned")


@dataclass
class Idle:
    world: World
    name: str

    async def run(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self.world.say(f"{self.name} ended")


@dataclass
class Identity:
    world: World

    async def run(self) -> None:
        if self.world.crash is None:
            await trio.sleep_forever()
        await trio.sleep(self.world.crash_after)
        assert self.world.crash is not None
        raise self.world.crash()


@dataclass
class Engine:
    world: World

    async def run(self) -> None:
        try:
            await trio.sleep(self.world.load_seconds)
            self.world.say("engine ready")
            await trio.sleep_forever()
        finally:
            self.world.say("engine ended")

    async def stop(self) -> None:
        self.world.say("engine stopping")
        await trio.sleep(self.world.stop_seconds)
        self.world.say("engine stopped")


@dataclass
class Poller:
    world: World

    async def run(self, work: trio.Nursery) -> None:
        for n, seconds in enumerate(self.world.work_seconds):
            work.start_soon(self.request, n, seconds)
        try:
            while True:
                await trio.sleep(1)
                self.world.say("poll")
        finally:
            self.world.say("poller ended")

    async def request(self, n: int, seconds: float) -> None:
        try:
            await trio.sleep(seconds)
            self.world.say(f"request {n} complete")
        except trio.Cancelled:
            self.world.say(f"request {n} cut")
            raise

    def drain(self) -> None:
        self.world.say("capacity closed")

    async def told_draining(self) -> None:
        await trio.sleep(self.world.tell_seconds)
        self.world.say("router told")


@dataclass
class Sender:
    world: World

    async def run(self) -> None:
        await trio.sleep_forever()

    async def flushed(self) -> None:
        await trio.sleep(self.world.flush_seconds)
        self.world.say("flushed")

    def spool(self) -> None:
        self.world.say("spooled")

    def remains(self) -> dict[str, int]:
        ended = sum("request" in word for word in self.world.words())
        return {"requests": len(self.world.work_seconds) - ended, "leases": 7}


async def drive(world: World, *steps: tuple[float, Callable[[], None]]) -> None:
    """Runs the tree and does each step at its virtual second."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.serve)
        for at, step in steps:
            await trio.testing.wait_all_tasks_blocked()
            await trio.sleep_until(world.start + at)
            step()


def term() -> None:
    signal.raise_signal(signal.SIGTERM)


async def test_drain_lets_work_finish_and_keeps_polling(autojump_clock: trio.testing.MockClock) -> None:
    world = World(work_seconds=(5, 30))
    await drive(world, (2, term))
    order = [w for w in world.words() if w not in ("poll", "engine ready")]
    assert order == [
        "capacity closed",
        "router told",
        "request 0 complete",
        "request 1 complete",
        "flushed",
        "spooled",
        "engine stopping",
        "engine stopped",
        *sorted(["poller ended", "engine ended", "assignment ended"], key=order.index),
        "returned",
    ]
    assert world.at("request 1 complete") == 30
    polls = [t for t, w in world.seen if w == "poll"]
    assert max(polls) >= 30, "heartbeats go on while the last request runs"


async def test_deadline_cuts_what_is_left(autojump_clock: trio.testing.MockClock) -> None:
    world = World(work_seconds=(5, 10_000), drain_seconds=60)
    await drive(world, (2, term))
    assert world.at("request 1 cut") == 62
    assert "request 0 complete" in world.words()
    assert world.words()[-1] == "returned"


async def test_stop_while_the_engine_loads_is_immediate(autojump_clock: trio.testing.MockClock) -> None:
    world = World(load_seconds=7200)
    await drive(world, (3, term))
    assert "engine ready" not in world.words()
    assert world.at("returned") <= 3 + world.stop_seconds


async def test_second_signal_abandons(autojump_clock: trio.testing.MockClock) -> None:
    world = World(work_seconds=(10_000,))
    await drive(world, (2, term), (4, term))
    assert world.at("request 0 cut") == 4
    assert world.at("returned") == 4
    assert "engine stopping" not in world.words(), "the guard ends it"


async def test_the_same_signal_twice_within_a_second_is_one(autojump_clock: trio.testing.MockClock) -> None:
    world = World(work_seconds=(20,))
    await drive(world, (2, term), (2.5, term))
    assert "request 0 complete" in world.words()


async def test_stop_event_is_a_first_signal(autojump_clock: trio.testing.MockClock) -> None:
    world = World(work_seconds=(5,))
    await drive(world, (1, world.stop.set))
    assert world.at("request 0 complete") == 5


async def test_telling_flush_and_engine_stop_are_bounded(autojump_clock: trio.testing.MockClock) -> None:
    world = World(tell_seconds=1000, flush_seconds=1000, stop_seconds=1000)
    await drive(world, (1, term))
    assert world.at("spooled") == 1 + agent.TELL_SECONDS + agent.FLUSH_SECONDS
    assert world.at("returned") == 1 + agent.TELL_SECONDS + agent.FLUSH_SECONDS + agent.ENGINE_STOP_SECONDS


async def test_crash_of_a_service_ends_everything(autojump_clock: trio.testing.MockClock) -> None:
    world = World(work_seconds=(100,), crash=lambda: RuntimeError("bug"))
    with pytest.RaisesGroup(RuntimeError, flatten_subgroups=True):
        await drive(world)
    assert world.at("request 0 cut") == 1
    assert world.at("returned") == 1


async def test_named_error_of_a_service_reaches_the_top(autojump_clock: trio.testing.MockClock) -> None:
    world = World(crash=lambda: AgentError("agent_removed", "removed", exit_code=Exit.REMOVED))
    with pytest.RaisesGroup(AgentError, flatten_subgroups=True) as caught:
        await drive(world)
    from xim_agent.cli.render import code_of

    assert code_of(caught.value) == Exit.REMOVED


async def test_the_log_has_every_phase_of_a_drain_with_its_bound_and_what_remains(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    caplog.set_level("INFO", "xim_agent")
    world = World(work_seconds=(5, 37, 1000), drain_seconds=65)
    await drive(world, (2, term))
    lines = [r for r in caplog.records if r.getMessage().startswith("drain ")]
    shown = [(r.getMessage(), r.requests, r.leases) for r in lines]
    assert shown == [
        ("drain 1/4: the router is told", 3, 7),
        ("drain 2/4: requests finish", 3, 7),
        *[("drain goes on", 2, 7)] * 3,
        *[("drain goes on", 1, 7)] * 3,
        ("drain 3/4: the last endings are sent", 0, 7),
        ("drain 4/4: the engine is stopped", 0, 7),
    ]
    bounds = [r.seconds_at_most for r in lines if "seconds_at_most" in r.__dict__]
    assert bounds == [agent.TELL_SECONDS, 65, agent.FLUSH_SECONDS, agent.ENGINE_STOP_SECONDS]
    assert [r.seconds_left for r in lines if "seconds_left" in r.__dict__] == [55, 45, 35, 25, 15, 5]


async def test_requests_finish_while_the_router_is_told(autojump_clock: trio.testing.MockClock) -> None:
    world = World(work_seconds=(3,), tell_seconds=1000)
    await drive(world, (1, term))
    assert world.at("request 0 complete") == 3


async def test_a_hangup_reloads_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setattr(signals.os, "isatty", lambda fd: False)
    world = World(work_seconds=(5,))
    await drive(world, (1, hang_up), (3, hang_up), (4, term), (5, hang_up))
    assert world.words().count("hangup") == 3
    assert "request 0 complete" in world.words()


async def test_a_hangup_of_the_terminal_is_a_stop(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setattr(signals.os, "isatty", lambda fd: fd == 2)
    world = World(work_seconds=(5,))
    await drive(world, (1, hang_up), (50, world.stop.set))
    assert "hangup" not in world.words()
    assert world.at("returned") < 50
    assert world.at("request 0 complete") == 5


def hang_up() -> None:
    signal.raise_signal(signal.SIGHUP)
