"""An agent by hand: speaks the wire protocol with httpx and msgspec alone, one call at a time, as a test says.

`running` is a local router over a real socket, with one published and assigned model where nothing else is said, for
such agents and for clients.
"""

import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import trio
import zstandard
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from xim_agent.identity import jose
from xim_agent.router import catalog
from xim_agent.router.app import Router, make_app, serve
from xim_agent.router.jobs import Limits
from xim_agent.router.store import Store

Frame = list[Any]
MODEL = "toy"
EVENT_STREAM = "text/event-stream; charset=utf-8"


def head(seq: int = 0, status: int = 200, kind: str = EVENT_STREAM, **headers: str) -> Frame:
    return [seq, "head", {"status": status, "headers": {"content-type": kind, **headers}}]


def answer(
    pieces: Iterable[bytes], *, kind: str = EVENT_STREAM, status: int = 200, reason: str = "complete"
) -> list[Frame]:
    """All frames of one answer, numbered."""
    data = list(pieces)
    frames = [head(0, status, kind), *([n, "data", piece] for n, piece in enumerate(data, 1))]
    ending = {"reason": reason, "bytes": sum(map(len, data)), "chunks": len(data), "ttft_ms": 1, "duration_ms": 2}
    return [*frames, [len(frames), "end", ending]]


def error(seq: int, code: str, *, retryable: bool = False) -> Frame:
    return [seq, "error", {"code": code, "message": f"because of {code}", "retryable": retryable}]


async def until(check: Callable[[], Any]) -> None:
    """Waits for what the other side of a socket does; fails after 10 s."""
    with trio.fail_after(10):
        while True:
            if check():
                return
            await trio.sleep(0.005)


class FakeAgent:
    """`held`: leases received and not ended here. `offered`: every lease received, by id."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.key = Ed25519PrivateKey.generate()
        self.http = httpx.AsyncClient(trust_env=False, verify=False, timeout=30, headers={"XIM-Protocol": "1"})
        self.boot = uuid.uuid4().hex
        self.n = 0
        self.held: set[int] = set()
        self.offered: dict[int, dict[str, Any]] = {}
        self.model: dict[str, Any] | None = {"id": MODEL, "revision": "r1", "generation": 1}
        self.id = ""
        self.token = ""
        self.reply: dict[str, Any] = {}

    def proof(self, path: str, **changed: Any) -> str:
        claims: dict[str, Any] = {
            "htm": "POST",
            "htu": self.url + path,
            "iat": int(time.time()),
            "jti": uuid.uuid4().hex,
        }
        return jose.dpop_proof(self.key, **(claims | changed))

    async def enroll(self, join_key: str, **changed: Any) -> httpx.Response:
        body = {
            "join_key": join_key,
            "nonce": jose.b64u(uuid.uuid4().bytes),
            "public_key": jose.jwk_of(self.key.public_key()),
            "protocols": [1],
            "agent": {"name": "node", "version": "0", "os": "linux", "arch": "x86_64", "hostname": "node"},
            "hardware": {"accelerator": "nvidia", "devices": [{"name": "H100"}], "tier": "self_hosted"},
            "max_concurrent": None,
        }
        headers = {"DPoP": self.proof("/v1/enroll")}
        reply = await self.http.post(f"{self.url}/v1/enroll", json=body | changed, headers=headers)
        if reply.status_code == 201:
            self.reply = reply.json()
            self.id, self.token = self.reply["agent_id"], self.reply["token"]
            self.http.headers["Authorization"] = f"Bearer {self.token}"
        return reply

    async def call(self, path: str, message: Any, *, compress: bool = False) -> httpx.Response:
        body = msgspec.msgpack.encode(message)
        headers = {"content-type": "application/vnd.msgpack"}
        if compress:
            body, headers["content-encoding"] = zstandard.compress(body), "zstd"
        return await self.http.post(self.url + path, content=body, headers=headers)

    async def poll(self, *, receive: bool = True, **changed: Any) -> dict[str, Any]:
        """One poll; `receive` False: the reply counts as lost."""
        self.n += 1
        request = {
            "boot": self.boot,
            "n": self.n,
            "phase": "ready",
            "capacity": 1,
            "wait_ms": 20_000,
            "held": sorted(self.held),
            "model": self.model,
            "ceiling": 4,
            "load": {"running": None, "waiting": None, "kv_usage": None, "tokens_per_s": None},
            "progress": None,
            "health": [],
        }
        reply = await self.call("/v1/work/poll", request | changed)
        assert reply.status_code == 200, reply.text
        decoded: dict[str, Any] = msgspec.msgpack.decode(reply.content, strict=False)
        if receive:
            for lease in decoded["leases"]:
                self.held.add(lease["id"])
                self.offered[lease["id"]] = lease
        return decoded

    async def take(self, **changed: Any) -> dict[str, Any]:
        """Polls until there is a lease."""
        while True:
            leases: list[dict[str, Any]] = (await self.poll(**changed))["leases"]
            if leases:
                return leases[0]

    async def until(self, member: str, **changed: Any) -> Any:
        """Polls until a member of the reply says something."""
        while True:
            if value := (await self.poll(**changed))[member]:
                return value

    async def events(
        self, lease: int, frames: Iterable[Frame], *, boot: str | None = None, **more: Any
    ) -> dict[str, Any]:
        message = {"boot": boot or self.boot, "frames": [[lease, *frame] for frame in frames]}
        reply = await self.call("/v1/work/events", message, **more)
        assert reply.status_code == 200, reply.text
        decoded: dict[str, Any] = msgspec.msgpack.decode(reply.content)
        if any(frame[1] in ("end", "error") for frame in frames) or lease in decoded["unknown"]:
            self.held.discard(lease)
        return decoded

    async def serve_one(self, frames: list[Frame], **changed: Any) -> dict[str, Any]:
        """Takes a lease and answers it with these frames in one call."""
        lease = await self.take(**changed)
        await self.events(lease["id"], frames)
        return lease


@dataclass
class Bench:
    """A running router. `url` is its public URL."""

    router: Router
    store: Store
    url: str
    api_key: str
    scope: trio.CancelScope
    agents: list["FakeAgent"] = field(default_factory=list)

    def join_key(self, **changed: Any) -> str:
        now = time.time()
        asked: dict[str, Any] = {"project": "test", "region": "local", "uses": 9, "expires_at": now + 600, "now": now}
        return self.store.create_join_key(**(asked | changed))[1]

    async def agent(self, **changed: Any) -> FakeAgent:
        agent = FakeAgent(self.url)
        self.agents.append(agent)
        reply = await agent.enroll(self.join_key(**changed))
        assert reply.status_code == 201, reply.text
        return agent

    def http(self, **more: Any) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self.api_key}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, trust_env=False, verify=False, timeout=30, **more)


@asynccontextmanager
async def running(
    directory: Path, limits: Limits | None = None, listen: str = "127.0.0.1:0", *, published: bool = True
) -> AsyncIterator[Bench]:
    now = time.time()
    with Store.open(directory) as store:
        if published:
            row = catalog.Published(MODEL, "r1", MODEL, f"sha256:{'0' * 64}", 1000, 700, "generate", now)
            catalog.register(store.db, row)
            catalog.assign(store.db, MODEL, None, None)
        async with trio.open_nursery() as nursery:
            router = make_app(store, limits)
            bound = await nursery.start(serve, router, listen)
            key = catalog.create_api_key(store.db, "test", now) if published else ""
            bench = Bench(router, store, bound[0], key, nursery.cancel_scope)
            try:
                yield bench
            finally:
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
                    for agent in bench.agents:
                        await agent.http.aclose()


async def hold(bench: Bench, agent: FakeAgent, nursery: trio.Nursery) -> list[dict[str, Any]]:
    """Returns once a poll is held; its reply will be in the list."""
    replies: list[dict[str, Any]] = []

    async def poll() -> None:
        replies.append(await agent.poll())

    await agent.poll(wait_ms=0)
    nursery.start_soon(poll)
    await until(lambda: bench.router.dispatch.agents[agent.id].poll)
    return replies
