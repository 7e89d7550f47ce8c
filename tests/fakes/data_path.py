"""The whole way of an answer in one process: engine on a Unix socket, the agent's work side in its real tree and with
its real router client, the proxy that spoils calls, the local router on a real socket, and its clients' jobs.

Run it in virtual time (`autojump_clock`): real sockets of one process have their data at once, so that only waits are
skipped.
"""

import math
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import trio
from fakes.agent import MODEL, FakeAgent, until
from fakes.sse_engine import SseEngine, answer
from fakes.tcp_faults import FaultProxy

from xim_agent import agent
from xim_agent.clock import SystemClock
from xim_agent.engine.client import EngineClient
from xim_agent.health import Health
from xim_agent.mesh.client import RouterClient
from xim_agent.mesh.messages import Load, ModelState
from xim_agent.router import catalog
from xim_agent.router.app import Router, make_app, serve
from xim_agent.router.jobs import COMPLETE, Job, Limits, Outcome, Refused
from xim_agent.router.store import Store
from xim_agent.watch import Watch
from xim_agent.work.link import Link
from xim_agent.work.poller import Poller
from xim_agent.work.sender import Sender
from xim_agent.work.spool import Spool

PROJECT = "test"
GONE = "the router is gone"


class EngineView:
    """What the work side asks of the engine: the real client, of an engine whose state the test says."""

    def __init__(self, ceiling: int) -> None:
        self.ready, self.degraded, self.ceiling = False, False, ceiling
        self.client = EngineClient()

    def load(self) -> Load:
        return Load()


class Idle:
    async def run(self) -> None:
        await trio.sleep_forever()

    async def stop(self) -> None:
        await trio.lowlevel.checkpoint()


class AgentSide:
    """One boot: `assemble` in small, with the identity, the engine's process and the cache left out."""

    def __init__(self, path: "DataPath", boot: str) -> None:
        clock = SystemClock()
        self.boot = boot
        self.health = Health(clock.now)
        self.router = RouterClient(insecure=False, clock=clock, on_skew=lambda skew: None)
        self.router.credentials = path.credentials
        self.link = Link(health=self.health)
        self.sender = Sender(router=self.router, boot=boot, link=self.link, spool=Spool(path.directory / "spool"))
        self.poller = Poller(
            router=self.router, sender=self.sender, engine=path.view, link=self.link, health=self.health, clock=clock,
            boot=boot, generation_seen=lambda generation: None, model=lambda: ModelState(MODEL, "r1", 1),
            progress=lambda: None,
        )  # fmt: skip
        self.health.on_change = self.poller.changed
        idle = Idle()
        self.parts = agent.Parts(
            identity=idle, engine=idle, assignment=idle, poller=self.poller, sender=self.sender, listeners=(),
            drain_seconds=path.drain_seconds,
        )  # fmt: skip
        self.stop = trio.Event()
        self.scope = trio.CancelScope()
        self.over = trio.Event()

    async def run(self, task_status: trio.TaskStatus[None]) -> None:  # noqa: ASYNC128
        with self.scope:
            async with self.router:
                await agent.run(self.parts, stop=self.stop, task_status=task_status)
        self.over.set()

    @property
    def statistics(self) -> Any:
        return self.poller.statistics().sender


@dataclass
class Client:
    """`outcome` is None while it waits; `gone`: the router died under it."""

    body: bytes
    data: bytes = b""
    outcome: Outcome | None = None
    gone: bool = False
    seconds: float = 0.0


@dataclass
class DataPath:
    directory: Path
    nursery: trio.Nursery
    limits: Limits
    store: Store
    proxy: FaultProxy
    engine: SseEngine
    view: EngineView
    drain_seconds: float = 5.0
    credentials: Any = None
    router: Any = None
    agent: Any = None
    boots: list[AgentSide] = field(default_factory=list)
    clients: list[Client] = field(default_factory=list)
    keep: bool = True
    _router_scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    # what can be killed and started

    async def start_router(self) -> None:
        self.router = make_app(self.store, self.limits)
        await self.nursery.start(self._serve, self.router)

    async def _serve(self, router: Router, task_status: trio.TaskStatus[None]) -> None:
        with trio.CancelScope() as self._router_scope:
            async with trio.open_nursery() as nursery:
                [url] = await nursery.start(serve, router, "127.0.0.1:0")
                self.proxy.target = int(url.rpartition(":")[2])
                task_status.started()

    def kill_router(self) -> None:
        """With everything it knows of leases and clients; its database stays."""
        self._router_scope.cancel()
        self._router_scope = trio.CancelScope()
        self.router = None

    async def start_engine(self) -> None:
        await self.nursery.start(self.engine.run)
        self.view.client.attach(str(self.engine.path))
        self.view.ready = True
        self._tell()

    def kill_engine(self) -> None:
        self.engine.kill()
        self.view.ready = False
        self.view.client.detach()
        self._tell()

    def _tell(self) -> None:
        if self.agent is not None:
            self.agent.poller.changed()

    async def start_agent(self) -> None:
        self.agent = AgentSide(self, f"boot-{len(self.boots) + 1}")
        self.boots.append(self.agent)
        await self.nursery.start(self.agent.run)

    async def back(self) -> None:
        """Until a poll has reached the router since now."""
        now = trio.current_time()

        def polled() -> bool:
            agents = self.router.dispatch.agents.values() if self.router else ()
            return any(known.key and known.heard > now for known in agents) and bool(self.agent.link.up)

        await until(polled)

    async def ready(self) -> None:
        """Until the router gives the agent work."""

        def ready() -> bool:
            agents = self.router.dispatch.agents.values() if self.router else ()
            return any(known.key and known.poll for known in agents)

        await until(ready)

    async def kill_agent(self) -> None:
        self.agent.scope.cancel()
        await self.agent.over.wait()

    async def stop_agent(self) -> None:
        self.agent.stop.set()
        await self.agent.over.wait()

    # clients

    async def ask(self, body: bytes, *, read: Callable[[int], float] = lambda taken: 0.0) -> Client:
        """One client to its end. `read`: seconds it waits before it takes more, by what it has taken."""
        client = Client(body)
        self.clients.append(client)
        await until(lambda: self.router)
        router, began = self.router, trio.current_time()
        watch, dispatch, taken = Watch(), router.dispatch, 0
        job = Job(
            request=f"r{len(self.clients)}", project=PROJECT, model=MODEL, path="/v1/completions",
            headers={"content-type": "application/json"}, body=body, stream=True, tenant="t", wake=watch.bump,
            expected=True,
        )  # fmt: skip
        try:
            dispatch.submit(job, trio.current_time())
            while self.router is router and not (job.outcome is not None and not job.chunks):
                if wait := read(taken):
                    await trio.sleep(wait)
                seen = watch.version
                if job.chunks:
                    part = dispatch.take(job)
                    taken += len(part)
                    client.data += part if self.keep else b""
                    dispatch.consumed(job, len(part), trio.current_time())
                elif job.outcome is None:
                    with trio.move_on_after(1):  # to see that the router is gone
                        await watch.wait_beyond(seen)
        except Refused as refused:
            job.outcome = refused.outcome
        finally:
            if self.router is router:
                dispatch.release(job, trio.current_time())
        client.outcome, client.gone = job.outcome, self.router is not router
        client.seconds = trio.current_time() - began
        return client

    async def ask_many(self, count: int, *, at_once: int = 96) -> None:
        room = trio.CapacityLimiter(at_once)
        first = len(self.clients)

        async def one(number: int) -> None:
            async with room:
                await self.ask(b'{"prompt": "%d"}' % number)

        async with trio.open_nursery() as clients:
            for number in range(first, first + count):
                clients.start_soon(one, number)

    # what must be true in the end

    async def flushed(self) -> None:
        """Waits until the agent owes the router nothing; fails after 10 min (of virtual time)."""
        with trio.fail_after(600):
            await self.agent.sender.flushed()

    def outcomes(self) -> Counter[str]:
        return Counter(
            "gone" if c.gone else "complete" if c.outcome is COMPLETE else c.outcome.code if c.outcome else "none"
            for c in self.clients
        )

    def check(self) -> None:
        """Each ended once; what is complete is whole, what was cut is the beginning of it; nobody holds anything."""
        for client in self.clients:
            whole = b"".join(answer(client.body))
            if client.outcome is COMPLETE:
                assert client.data == whole
            else:
                assert whole.startswith(client.data)
        statistics = self.agent.statistics
        assert (statistics.running, statistics.held) == (0, 0)
        assert (statistics.outbox.unacknowledged, statistics.outbox.unacknowledged_bytes) == (0, 0)
        assert statistics.outbox.open_streams == 0
        assert sum(statistics.ended.values()) == statistics.accepted + statistics.refused
        assert self.engine.open_now == 0
        assert self.view.client.active == 0
        assert not any(known.grants for known in self.router.dispatch.agents.values())


@asynccontextmanager
async def data_path(
    directory: Path, *, seed: int = 1, ceiling: int = 64, limits: Limits | None = None
) -> AsyncIterator[DataPath]:
    """Running and ready, nothing spoilt."""
    with Store.open(directory / "router") as store:
        row = catalog.Published(MODEL, "r1", MODEL, f"sha256:{'0' * 64}", 1000, 700, "generate", 1e9)
        catalog.register(store.db, row)
        catalog.assign(store.db, MODEL, None, None)
        async with trio.open_nursery() as nursery:
            path = DataPath(
                directory, nursery, limits or Limits(), store, FaultProxy(seed), SseEngine(directory / "engine"),
                EngineView(ceiling),
            )  # fmt: skip
            await path.start_router()
            await nursery.start(path.proxy.run)
            path.credentials = await _enroll(path)
            await path.start_engine()
            await path.start_agent()
            await path.ready()
            yield path
            nursery.cancel_scope.cancel()


async def _enroll(path: DataPath) -> Any:
    hand = FakeAgent(f"http://127.0.0.1:{path.proxy.target}")
    expiry = {"uses": 9, "expires_at": math.inf}
    key = path.store.create_join_key(project=PROJECT, region="local", now=SystemClock().now(), **expiry)[1]
    async with hand.http:
        reply = await hand.enroll(key)
    assert reply.status_code == 201, reply.text
    bearer = SimpleNamespace(router=path.proxy.url, token=hand.token)

    async def wait_bearer() -> Any:
        await trio.lowlevel.checkpoint()
        return bearer

    return SimpleNamespace(wait_bearer=wait_bearer)
