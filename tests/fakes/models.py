"""A model server on loopback, the router's own endpoints behind a layer of faults, and the plainest client of it."""

from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import trio
from starlette.applications import Starlette
from starlette.routing import Route

from xim_agent.cache.manifest import Manifest
from xim_agent.cache.transfer import BlobReply
from xim_agent.outcome import RouterError
from xim_agent.router.blobs import blob_endpoint, manifest_endpoint
from xim_agent.router.publish import PublishedModel

Fault = Callable[[dict[str, Any], Any, Any, Any], Any]


@dataclass
class ModelServer:
    """`faults`: for each digest what happens to the next requests; `asked`: (digest, Range) of every blob request."""

    data: Path
    url: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)
    manifests: int = 0
    faults: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    gate: Callable[[str], Any] | None = None

    def __post_init__(self) -> None:
        routes = [Route("/m/{sha256}", manifest_endpoint), Route("/b/{sha256}", blob_endpoint)]
        self.app = Starlette(routes=routes)
        self.app.state.data_dir = self.data

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/b/"):
            digest = scope["path"][3:]
            self.asked.append((digest, dict(scope["headers"]).get(b"range", b"").decode()))
            if self.gate is not None:
                await self.gate(digest)
            if self.faults[digest]:
                return await self.faults[digest].pop(0)(scope, receive, send, self.app)
        elif scope["type"] == "http":
            self.manifests += 1
        await self.app(scope, receive, send)
        return None

    def times(self) -> Counter[str]:
        return Counter(digest for digest, _ in self.asked)


class Reply:
    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.status = response.status_code
        whole = response.headers.get("content-range", f"bytes 0-/{response.headers.get('content-length', '')}")
        self.start = int(whole.removeprefix("bytes ").split("-")[0])
        self.total = int(whole.rpartition("/")[2] or -1)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        try:
            async for piece in self.response.aiter_raw():
                yield piece
        except httpx.TransportError as e:
            raise RouterError("connection_lost", str(e)) from e


class Source:
    """`BlobSource` in the fewest lines; the agent's own client is the other implementation."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client

    async def manifest(self, sha256_hex: str) -> bytes:
        try:
            reply = await self.client.get(f"/m/{sha256_hex}")
        except httpx.TransportError as e:
            raise RouterError("connection_lost", str(e)) from e
        if reply.status_code != 200:
            raise RouterError(reply.json()["code"], "manifest", status=reply.status_code)
        return reply.content

    def blob(self, sha256_hex: str, offset: int) -> AbstractAsyncContextManager[BlobReply]:
        return self._blob(sha256_hex, {"range": f"bytes={offset}-"} if offset else {})

    @asynccontextmanager
    async def _blob(self, digest: str, headers: dict[str, str]) -> AsyncIterator[BlobReply]:
        try:
            async with self.client.stream("GET", f"/b/{digest}", headers=headers) as reply:
                if reply.status_code not in (200, 206):
                    raise RouterError("blob_failed", "blob", status=reply.status_code)
                yield Reply(reply)
        except httpx.TransportError as e:
            raise RouterError("connection_lost", str(e)) from e


def blob_of(published: tuple[Path, PublishedModel], path: str, j: int = 0) -> str:
    """Digest of chunk `j` of a file."""
    data, p = published
    raw = (data / "models/manifests" / f"{p.manifest_sha256}.json").read_bytes()
    return next(f for f in msgspec.json.decode(raw, type=Manifest).files if f.path == path).chunks[j].blob


# -- what may happen to a request ------------------------------------------------------------------------------------


def done_in(cache: Path) -> list[str]:
    """Lines of the journals below a cache directory."""
    return [line for p in cache.glob("partial/*/journal") for line in p.read_text().split("\n")[:-1]]


def hold(last: str, done: Callable[[], bool], then: Callable[[], Any]) -> Callable[[str], Any]:
    """A gate: the requests for `last` wait until `done`, then for `then` (which may be a coroutine function)."""

    async def gate(digest: str) -> None:
        if digest == last:
            while not done():  # noqa: ASYNC110 -- the journal may be that of another process
                await trio.sleep(0.005)
            if (waiting := then()) is not None:
                await waiting

    return gate


async def alter(scope: Any, receive: Any, send: Any, app: Any, change: Callable[[bytes], bytes]) -> None:
    """The endpoint's reply with its body changed, length included."""
    body, start = b"", {}

    async def collect(message: Any) -> None:
        nonlocal body, start
        if message["type"] == "http.response.start":
            start = message
        else:
            body += message.get("body", b"")

    await app(scope, receive, collect)
    body = change(body)
    headers = [(k, v) for k, v in start["headers"] if k != b"content-length"]
    await send({**start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})


async def flip(scope: Any, receive: Any, send: Any, app: Any) -> None:
    await alter(scope, receive, send, app, lambda b: b[:5] + bytes([b[5] ^ 1]) + b[6:])


async def short(scope: Any, receive: Any, send: Any, app: Any) -> None:
    await alter(scope, receive, send, app, lambda b: b[:-1])


async def long(scope: Any, receive: Any, send: Any, app: Any) -> None:
    await alter(scope, receive, send, app, lambda b: b + b"x")


async def shifted(scope: Any, receive: Any, send: Any, app: Any) -> None:
    headers = [(k, v) for k, v in scope["headers"] if k != b"range"] + [(b"range", b"bytes=2-")]
    await app({**scope, "headers": headers}, receive, send)


async def ignore_range(scope: Any, receive: Any, send: Any, app: Any) -> None:
    await app({**scope, "headers": [(k, v) for k, v in scope["headers"] if k != b"range"]}, receive, send)


async def cut(scope: Any, receive: Any, send: Any, app: Any) -> None:
    """Ends the connection after the first piece of the body."""
    sent = 0

    async def some(message: Any) -> None:
        nonlocal sent
        sent += len(message.get("body", b""))
        await send(message)
        if sent:
            raise ConnectionResetError("cut by the test")

    try:
        await app(scope, receive, some)
    except ConnectionResetError:
        return


def status(code: int) -> Any:
    async def answer(scope: Any, receive: Any, send: Any, app: Any) -> None:
        await send({"type": "http.response.start", "status": code, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    return answer
