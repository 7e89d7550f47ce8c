"""Requests to vLLM over its Unix socket. Bodies (but for a salt) and answers pass as they are."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import trio

from xim_agent.engine.poison import Poison, Poisonous, mark
from xim_agent.engine.salt import salted
from xim_agent.errors import AgentError

LOSS_SECONDS = 10.0  # from the end of vLLM's engine core to that of its API server (it looks every 5 s)
_LOST = (httpx.HTTPError, httpx.StreamError, trio.ClosedResourceError, trio.BrokenResourceError)


class EngineLost(AgentError):
    """The engine is not there, or went away before its answer was complete."""

    def __init__(self, why: str) -> None:
        super().__init__("engine_lost", f"the engine is gone: {why}")


def connect(socket: str) -> httpx.AsyncClient:
    """Hundreds of idle keep-alive connections cost httpx 40-100 ms of CPU a request, so none is kept."""
    transport = httpx.AsyncHTTPTransport(
        uds=socket, verify=False, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0)
    )
    # identity: what the engine sends is what the client of the router gets, byte for byte
    headers = {"accept-encoding": "identity", "user-agent": "xerotier-xim-agent"}
    timeout = httpx.Timeout(None, connect=10.0)
    return httpx.AsyncClient(
        transport=transport, base_url="http://engine", headers=headers, timeout=timeout, trust_env=False
    )


@dataclass(frozen=True)
class EngineReply:
    """`headers`: lower-case names, as the engine sent them."""

    status: int
    headers: dict[str, str]
    _response: httpx.Response
    _waits: "Waits"
    _came: Callable[[], None]

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body as it comes, undecoded. Raises EngineLost when it is cut."""
        body = self._response.aiter_raw()
        while True:
            try:
                with self._waits:
                    chunk = await anext(body, None)
            except _LOST as error:
                raise EngineLost(repr(error)) from error
            if chunk is None:
                return
            self._came()
            yield chunk


@dataclass
class Waits:
    """How many of us wait for the engine at this moment. One whose reader is slow waits for the reader, not for it."""

    now: int = 0

    def __enter__(self) -> None:
        self.now += 1

    def __exit__(self, *_: object) -> None:
        self.now -= 1


class EngineClient:
    """What requests go through, whichever run of vLLM is behind it.

    `active`: requests under way. `streamed`: pieces of event streams that came so far; of all answers only those
    cannot come from vLLM's API server alone.
    """

    def __init__(self, salt_secret: str | None = None) -> None:
        self.streamed = 0
        self.waits = Waits()
        self.poison = Poison()
        self._salt_secret = salt_secret
        self._http: httpx.AsyncClient | None = None
        self._running: dict[object, tuple[str, bytes]] = {}
        self._lost: dict[bytes, float] = {}  # mark → when

    @property
    def active(self) -> int:
        return len(self._running)

    def attach(self, socket: str) -> None:
        self._lost.clear()
        self._http = connect(socket)

    def detach(self) -> None:
        """From now on `open` fails at once. Requests under way end as their connections do, with the process."""
        self._http = None
        for path, body in self._running.values():
            self._note_loss(path, body)

    def crashed(self) -> int:
        """After `detach`, when the engine's end was its own: how many requests are refused as poison from now on.

        The end of an engine core reaches the requests before us: those it cut a moment ago were running too.
        """
        recent = trio.current_time() - LOSS_SECONDS
        return self.poison.crashed(request for request, at in self._lost.items() if at > recent)

    def _note_loss(self, path: str, body: bytes) -> None:
        self._lost[mark(path, body)] = trio.current_time()

    @asynccontextmanager
    async def open(
        self, path: str, headers: Mapping[str, str], body: bytes, *, tenant: str = ""
    ) -> AsyncIterator[EngineReply]:
        """POSTs; entered when the engine's head is there, without a time limit. Leaving aborts the request at vLLM.

        With a salt secret and a `tenant` the body is salted (salt.py); else it passes as it is.
        Raises EngineLost and Poisonous. A cancelled call closes the connection, which is how vLLM learns of it. What
        fails inside with the code `engine_lost` counts as lost here too.
        """
        known = mark(path, body) if self.poison.watchful else b""
        if self.poison.refuses(known):
            raise Poisonous
        if self._http is None:
            raise EngineLost("it is not running")
        key = object()
        self._running[key] = path, body
        try:
            async with self._replied(self._http, path, headers, self._salted(path, body, tenant)) as reply:
                yield reply
            if reply.status >= 500:
                self._note_loss(path, body)
            elif known:
                self.poison.served(known)
        except AgentError as error:
            if error.code == "engine_lost":
                self._note_loss(path, body)
            raise
        finally:
            del self._running[key]

    def _salted(self, path: str, body: bytes, tenant: str) -> bytes:
        return salted(self._salt_secret, tenant, path, body) if self._salt_secret and tenant else body

    @asynccontextmanager
    async def _replied(
        self, http: httpx.AsyncClient, path: str, headers: Mapping[str, str], body: bytes
    ) -> AsyncIterator[EngineReply]:
        request = http.build_request("POST", path, headers=dict(headers), content=body)
        try:
            with self.waits:
                response = await http.send(request, stream=True)
        except _LOST as error:
            raise EngineLost(repr(error)) from error
        try:
            stream = response.headers.get("content-type", "").startswith("text/event-stream")
            came = self._piece if stream else lambda: None
            yield EngineReply(response.status_code, dict(response.headers), response, self.waits, came)
        finally:
            await response.aclose()

    def _piece(self) -> None:
        self.streamed += 1
