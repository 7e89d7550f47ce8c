"""A router in a thread of its own, with agents that live by themselves, for tests that do not run on trio.

Everything here is called from the test's thread.
"""

import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
import outcome
import trio
from fakes.agent import Bench, FakeAgent, Frame, answer, head, running
from fakes.stack import free_port, until

from xim_agent.router import catalog
from xim_agent.router.dashboard import sessions
from xim_agent.router.dashboard.parts import Role
from xim_agent.router.jobs import Limits

T = TypeVar("T")


def chunk(text: str) -> bytes:
    """One piece of a streamed chat, as vLLM sends it."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return b"data: " + json.dumps({"object": "chat.completion.chunk", "choices": [choice]}).encode() + b"\n\n"


class Living:
    """An enrolled agent that polls until `kill` and answers all it gets with `texts`, one event each.

    `pause`: seconds between two. `says`: what it reports from its next poll on (`FakeAgent.poll`'s arguments).
    """

    def __init__(self, world: "World", agent: FakeAgent) -> None:
        self._world = world
        self._agent = agent
        self._awake, self._killed = trio.Event(), trio.Event()
        self.id = agent.id
        self.says: dict[str, Any] = {}
        self.texts = ["Hello", " from", " a", " lighthouse."]
        self.pause = 0.0

    async def live(self) -> None:
        await self._awake.wait()
        async with trio.open_nursery() as nursery:
            while not self._killed.is_set():
                await self._poll(nursery)
        await self._killed.wait()
        await self._agent.http.aclose()

    async def _poll(self, nursery: trio.Nursery) -> None:
        try:
            polled = await self._agent.poll(wait_ms=200, **self.says)
        except httpx.TransportError:  # no router
            await trio.sleep(0.1)
            return
        except AssertionError as refused:
            said = str(refused)
            if "agent_removed" in said or "token_invalid" in said:
                self._killed.set()
                return
            if "agent_suspended" not in said and "router_stopping" not in said:
                raise
            await trio.sleep(0.1)
            return
        for lease in polled["leases"]:
            nursery.start_soon(self._answer, lease["id"])

    async def _answer(self, lease: int) -> None:
        pieces = [*map(chunk, self.texts), b"data: [DONE]\n\n"]
        frames: list[Frame] = [head(0), *answer(pieces)[1:]]
        with suppress(httpx.TransportError):
            for frame in frames:
                await self._agent.events(lease, [frame])
                await trio.sleep(self.pause)

    def wake(self) -> None:
        """It polls from now on."""
        self._world.run_sync(self._awake.set)

    def kill(self) -> None:
        """It says nothing any more. What it was saying it says to its end: a client cancelled in a write warns."""
        self._world.run_sync(lambda: (self._killed.set(), self._awake.set()))


class World:
    """`limits` are the router's; `url` stays the same over `down` and `up`."""

    def __init__(self, directory: Path, limits: Limits | None = None) -> None:
        self.directory = directory
        self.limits = limits or Limits(grace=0.0)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._agents: list[Living] = []
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run, name="router")

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._begun.wait(10)
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(trio.RunFinishedError):  # it failed, and says so below
            for agent in self._agents:
                agent.kill()
            self.run_sync(self._over.set)
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._result.unwrap()

    def _run(self) -> None:
        self._result = outcome.capture(trio.run, self._main)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._over = trio.Event()
        async with trio.open_nursery() as outer:
            self._routers = outer
            async with trio.open_nursery() as self._nursery:  # of agents
                self._begun.set()
                await self._over.wait()
            outer.cancel_scope.cancel()

    def run(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        return trio.from_thread.run(function, *args, trio_token=self._token)

    def run_sync(self, function: Callable[..., T], *args: Any) -> T:
        return trio.from_thread.run_sync(function, *args, trio_token=self._token)

    async def _router(self, task_status: trio.TaskStatus[Bench]) -> None:
        async with running(self.directory, self.limits, f"127.0.0.1:{self.port}", published=False) as bench:
            task_status.started(bench)
            await trio.sleep_forever()

    def up(self) -> None:
        self.bench: Bench = self.run(self._routers.start, self._router)

    def down(self) -> None:
        """The router ends; its agents live on."""
        self.run_sync(self.bench.scope.cancel)
        until("the router is gone", lambda: not self._listens(), 10)

    def _listens(self) -> bool:
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), 1).close()
            return True
        return False

    def publish(self, name: str, revision: str = "r1", *, assigned: bool = True) -> None:
        """Makes a model known to the router, of which there is nothing to fetch."""

        def register() -> None:
            digest = f"sha256:{'0' * 64}"
            row = catalog.Published(name, revision, name, digest, 5_000_000_000, 3_400_000_000, "generate", time.time())
            catalog.register(self.bench.store.db, row)
            if assigned:
                catalog.assign(self.bench.store.db, name, revision, None)

        self.run_sync(register)

    def link(self, role: Role = "admin") -> str:
        """The address of a link that signs in once."""
        token = self.run_sync(lambda: sessions.make_link(self.bench.store.db, time.time(), role))
        return f"{self.url}/dashboard/#/login/{token}"

    def join_key(self, **changed: Any) -> str:
        return self.run_sync(lambda: self.bench.join_key(**changed))

    def api_key(self, name: str) -> str:
        return self.run_sync(lambda: catalog.create_api_key(self.bench.store.db, name, time.time(), name))

    def agent(self, name: str = "node", *, key: str = "", living: bool = True, **changed: Any) -> Living:
        """Enrolls one, with `key` or one of its own; `changed`: of its request. Not `living`: waits for `wake`."""
        about = {"name": name, "version": "1.2.3", "os": "linux", "arch": "x86_64", "hostname": name}
        agent = FakeAgent(self.url)
        reply = self.run(lambda: agent.enroll(key or self.bench.join_key(), agent=about, **changed))
        assert reply.status_code == 201, reply.text
        known = Living(self, agent)
        self._agents.append(known)
        if living:
            known.wake()
        self.run_sync(self._nursery.start_soon, known.live)
        return known
