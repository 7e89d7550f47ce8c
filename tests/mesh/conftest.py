"""A small HTTP/1.1 server on loopback that does what a test tells it, down to single bytes."""

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

import h11
import pytest
import trio

from xim_agent.clock import SystemClock
from xim_agent.mesh.client import RouterClient
from xim_agent.mesh.transport import Transport


@dataclass
class Call:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    stream: trio.abc.Stream


@dataclass
class Answer:
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass
class Server:
    """`answer` gets each call; None means that it wrote to the stream itself, which is then closed."""

    url: str
    answer: Callable[[Call], Awaitable[Answer | None]]
    calls: list[Call] = field(default_factory=list)
    connections: int = 0

    async def handle(self, stream: trio.abc.Stream) -> None:
        self.connections += 1
        async with stream:
            try:
                while await self.one(stream, h11.Connection(h11.SERVER)):
                    pass
            except (trio.BrokenResourceError, ssl.SSLError, h11.RemoteProtocolError):
                pass

    async def one(self, stream: trio.abc.Stream, http: h11.Connection) -> bool:
        request, body = None, b""
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                http.receive_data(await stream.receive_some(65536))
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                break
            else:
                return False
        assert request is not None
        headers = {n.decode(): v.decode() for n, v in request.headers}
        call = Call(request.method.decode(), request.target.decode(), headers, body, stream)
        self.calls.append(call)
        answer = await self.answer(call)
        if answer is None:
            return False
        own = {"content-length": str(len(answer.body)), "xim-protocol": "1"}
        reply = h11.Response(status_code=answer.status, headers=list({**own, **answer.headers}.items()))
        data = http.send(reply) or b""
        data += (http.send(h11.Data(data=answer.body)) or b"") + (http.send(h11.EndOfMessage()) or b"")
        await stream.send_all(data)
        return True


class Login:
    """Credentials: token-1, and one more for every refusal."""

    def __init__(self, url: str) -> None:
        self.router = url
        self.serial = 1
        self.refusals: list[str] = []

    @property
    def token(self) -> str:
        return f"token-{self.serial}"

    async def wait_bearer(self) -> "Login":
        snapshot = Login(self.router)
        snapshot.serial = self.serial
        return snapshot

    async def refused(self, token: str) -> None:
        self.refusals.append(token)
        self.serial += 1


async def fine(call: Call) -> Answer:
    return Answer()


@pytest.fixture
def start(nursery: trio.Nursery) -> Callable[..., Awaitable[Server]]:
    async def start(
        answer: Callable[[Call], Awaitable[Answer | None]] = fine, tls: ssl.SSLContext | None = None
    ) -> Server:
        server = Server("", answer)
        serve = partial(trio.serve_tcp, server.handle, 0, host="127.0.0.1")
        if tls is not None:
            serve = partial(trio.serve_ssl_over_tcp, server.handle, 0, tls, host="127.0.0.1")
        [listener] = await nursery.start(serve)
        listener = getattr(listener, "transport_listener", listener)
        scheme = "http" if tls is None else "https"
        server.url = f"{scheme}://127.0.0.1:{listener.socket.getsockname()[1]}"
        return server

    return start


@pytest.fixture
def skews() -> list[float]:
    return []


@pytest.fixture
async def client(skews: list[float]) -> AsyncIterator[RouterClient]:
    async with RouterClient(insecure=False, clock=SystemClock(), on_skew=skews.append) as client:
        yield client


@pytest.fixture
async def transport() -> AsyncIterator[Transport]:
    transport = Transport(insecure=True, clock=SystemClock(), on_skew=lambda _: None)
    yield transport
    await transport.aclose()


@pytest.fixture
def login() -> type[Login]:
    return Login


@pytest.fixture
def answer() -> type[Answer]:
    return Answer
