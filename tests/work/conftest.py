"""A router and an engine in memory, and the work services between them, in virtual time.

A test must name `autojump_clock` itself: pytest-trio does not see it behind another fixture.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel
from msgspec import Raw

from xim_agent.errors import AgentError
from xim_agent.health import Health
from xim_agent.mesh import codec
from xim_agent.mesh.messages import End, Error, EventsReply, Head, Lease, Load, PollReply, PollRequest
from xim_agent.outcome import RouterError
from xim_agent.watch import Watch
from xim_agent.work.link import Link
from xim_agent.work.poller import Poller
from xim_agent.work.sender import Sender
from xim_agent.work.spool import Spool


class WallClock:
    def now(self) -> float:
        return 1_700_000_000 + trio.current_time()


@dataclass
class Stream:
    """What came for one lease, in order."""

    frames: dict[int, Any] = field(default_factory=dict)
    next: int = 0
    head: Head | None = None
    data: bytes = b""
    arrivals: list[float] = field(default_factory=list)
    endings: list[End | Error] = field(default_factory=list)

    def take(self, seq: int, payload: Any) -> None:
        self.frames.setdefault(seq, payload)
        while self.next in self.frames:
            payload = self.frames[self.next]
            self.next += 1
            if isinstance(payload, Head):
                self.head = payload
            elif isinstance(payload, bytes):
                self.data += payload
                self.arrivals.append(trio.current_time())
            else:
                self.endings.append(payload)

    @property
    def ending(self) -> End | Error:
        [ending] = self.endings
        return ending


class FakeRouter:
    """Speaks §5 as `poll` and `events`. `down` is raised while it is set; `lose` drops replies after taking them in."""

    def __init__(self) -> None:
        self.changed = Watch()
        self.polls: list[PollRequest] = []
        self.poll_times: list[float] = []
        self.attempts: list[float] = []
        self.events_calls: list[tuple[str, int]] = []
        self.streams: dict[int, Stream] = {}
        self.offers: list[Lease] = []
        self.cancel: set[int] = set()
        self.credit: dict[int, int] = {}
        self.unknown: set[int] = set()
        self.generation = 0
        self.drain = False
        self.down: RouterError | None = None
        self.events_down: RouterError | None = None
        self.lose = 0
        self.ack = True
        self.instant = False
        self.retry_ms = 0
        self.bodies: dict[str, list[bytes | RouterError]] = {}
        self.in_flight = self.most_in_flight = 0
        self.told: Any = None

    def offer(self, **more: Any) -> int:
        base: dict[str, Any] = {
            "id": len(self.streams) + len(self.offers) + 1, "request": "r", "method": "POST",
            "path": "/v1/completions", "headers": {}, "body": b"{}", "stream": True, "tenant": "t",
            "deadline_ms": 600_000, "credit": 100_000,
        }  # fmt: skip
        lease = Lease(**(base | more))
        self.offers.append(lease)
        self.changed.bump()
        return lease.id

    def say(self, **what: Any) -> None:
        for name, value in what.items():
            setattr(self, name, value)
        self.changed.bump()

    def cut(self, error: RouterError | None) -> None:
        """Also ends what is in flight."""
        self.say(down=error)

    async def poll(self, request: PollRequest) -> PollReply:
        self.attempts.append(trio.current_time())
        await trio.lowlevel.checkpoint()
        if self.down is not None:
            raise self.down
        self.polls.append(request)
        self.poll_times.append(trio.current_time())
        for lease in request.held:
            self.streams.setdefault(lease, Stream())
        bound = 5.0 if request.capacity == 0 else 25.0
        with trio.move_on_after(min(bound, request.wait_ms / 1000)):
            while not (self._news(request) or self.instant or self.down):
                await self.changed.wait_beyond(self.changed.version)
        await trio.lowlevel.checkpoint()
        if self.down is not None:
            raise self.down
        self.told = (self.generation, self.drain)
        leases, self.offers = (self.offers, []) if request.capacity or self.instant else ([], self.offers)
        credit, self.credit = self.credit, {}
        live = [lease for lease in self.cancel if lease in self.streams and not self.streams[lease].endings]
        return PollReply(
            leases=leases, credit=credit, cancel=live, generation=self.generation, drain=self.drain,
            idle_reason=None if leases else "no request", retry_ms=self.retry_ms,
        )  # fmt: skip

    def _news(self, request: PollRequest) -> bool:
        cancel = [c for c in self.cancel if c in self.streams and not self.streams[c].endings]
        offers = self.offers and request.capacity
        return bool(offers or cancel or self.credit or self.told != (self.generation, self.drain))

    async def events(self, boot: str, frames: Sequence[Raw]) -> EventsReply:
        self.attempts.append(trio.current_time())
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await trio.sleep(0.001)
            for error in (self.down, self.events_down):
                if error is not None:
                    raise error
            self.events_calls.append((boot, len(frames)))
            touched = set()
            for raw in frames:
                lease, seq, _, payload = codec.decode_frame(raw)
                touched.add(lease)
                if lease not in self.unknown:
                    self.streams.setdefault(lease, Stream()).take(seq, payload)
            if self.lose:
                self.lose -= 1
                raise RouterError("connection_lost", "the reply was lost")
        finally:
            self.in_flight -= 1
        self.changed.bump()
        known = touched - self.unknown
        acked = {lease: self.streams[lease].next - 1 for lease in known if self.streams[lease].next}
        credit, self.credit = self.credit, {}
        return EventsReply(acked if self.ack else {}, credit, [], sorted(touched & self.unknown))

    async def lease_body(self, request_id: str) -> bytes:
        await trio.lowlevel.checkpoint()
        answers = self.bodies[request_id]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, RouterError):
            raise answer
        return answer

    async def ended(self, lease: int) -> End | Error:
        while not (lease in self.streams and self.streams[lease].endings):
            await self.changed.wait_beyond(self.changed.version)
        return self.streams[lease].ending


class FakeReply:
    def __init__(self, engine: "FakeEngine") -> None:
        self.status = engine.status
        self.headers = engine.headers
        self.engine = engine

    async def relay(self, taker: Any) -> None:
        async with aclosing(self.chunks()) as pieces:
            async for piece in pieces:
                if not taker.take(piece):
                    await taker.room()

    async def chunks(self) -> AsyncIterator[bytes]:
        for item in self.engine.script:
            if isinstance(item, float | int):
                await trio.sleep(item)
            elif isinstance(item, bytes):
                await trio.lowlevel.checkpoint()
                self.engine.read += len(item)
                yield item
            else:
                raise item


class FakeEngine:
    """`script`: bytes are sent, numbers are seconds, exceptions are raised."""

    def __init__(self) -> None:
        self.ready, self.degraded, self.ceiling = True, False, 4
        self.script: list[Any] = [b"one", 0.5, b"two"]
        self.status, self.headers = 200, {"content-type": "text/plain", "date": "today"}
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.open_now = self.read = 0
        self.closed: list[float] = []
        self.client = self

    def load(self) -> Load:
        return Load(running=self.open_now)

    @asynccontextmanager
    async def open(self, path: str, headers: Any, body: bytes, *, tenant: str = "") -> AsyncIterator[FakeReply]:
        await trio.lowlevel.checkpoint()
        self.requests.append((path, dict(headers), body))
        self.open_now += 1
        try:
            yield FakeReply(self)
        finally:
            self.open_now -= 1
            self.closed.append(trio.current_time())


@dataclass
class Bench:
    """One boot of the agent's work side. `work` is the WORK nursery."""

    router: FakeRouter
    engine: FakeEngine
    health: Health
    link: Link
    sender: Sender
    poller: Poller
    services: trio.Nursery
    generations: list[int] = field(default_factory=list)
    progress: Any = None
    work: Any = None

    async def start(self) -> None:
        self.services.start_soon(self.sender.run)
        await self.services.start(self._work)

    async def _work(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as self.work:
            self.services.start_soon(self.poller.run, self.work)
            task_status.started()
            await trio.sleep_forever()

    async def settle(self, seconds: float = 0.1) -> None:
        await trio.sleep(seconds)


Boot = Callable[..., Awaitable[Bench]]


@pytest.fixture
def router() -> FakeRouter:
    return FakeRouter()


@pytest.fixture
def boot(nursery: trio.Nursery, router: FakeRouter, tmp_path: Path) -> Boot:
    """Starts one; `under` takes another nursery than the test's, where services are expected to fail or to be ended."""

    async def boot(name: str = "boot-1", under: trio.Nursery | None = None, start: bool = True) -> Bench:
        clock, engine = WallClock(), FakeEngine()
        health = Health(clock.now)
        link = Link(health=health, rand=lambda: 1.0)
        sender = Sender(router=router, boot=name, link=link, spool=Spool(tmp_path / "spool"))
        generations: list[int] = []
        bench: Bench
        poller = Poller(
            router=router, sender=sender, engine=engine, link=link, health=health, clock=clock, boot=name,
            generation_seen=generations.append, model=lambda: None, progress=lambda: bench.progress,
        )  # fmt: skip
        health.on_change = poller.changed
        bench = Bench(router, engine, health, link, sender, poller, under or nursery, generations)
        if start:
            await bench.start()
        return bench

    return boot


@pytest.fixture
async def bench(boot: Boot) -> Bench:
    return await boot()


@pytest.fixture
def engine_lost() -> AgentError:
    return AgentError("engine_lost", "the engine is gone")
