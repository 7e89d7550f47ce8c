"""Requests to vLLM over its Unix socket. Bodies (but for a salt) and answers pass as they are."""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import trio

from xim_agent.engine.salt import salted
from xim_agent.errors import AgentError

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
    """What requests go through, whichever run of vLLM is behind it. `active`: requests under way."""

    def __init__(self, salt_secret: str | None = None) -> None:
        self.active = 0
        self._salt_secret = salt_secret
        self.waits = Waits()
        self._http: httpx.AsyncClient | None = None

    def attach(self, socket: str) -> None:
        self._http = connect(socket)

    def detach(self) -> None:
        """From now on `open` fails at once. Requests under way end as their connections do, with the process."""
        self._http = None

    @asynccontextmanager
    async def open(
        self, path: str, headers: Mapping[str, str], body: bytes, *, tenant: str = ""
    ) -> AsyncIterator[EngineReply]:
        """POSTs; entered when the engine's head is there, without a time limit. Leaving aborts the request at vLLM.

        With a salt secret and a `tenant` the body is salted (salt.py); else it passes as it is.
        Raises EngineLost. A cancelled call closes the connection, which is how vLLM learns of it.
        """
        http = self._http
        if http is None:
            raise EngineLost("it is not running")
        if self._salt_secret and tenant:
            body = salted(self._salt_secret, tenant, path, body)
        self.active += 1
        try:
            request = http.build_request("POST", path, headers=dict(headers), content=body)
            try:
                with self.waits:
                    response = await http.send(request, stream=True)
            except _LOST as error:
                raise EngineLost(repr(error)) from error
            try:
                yield EngineReply(response.status_code, dict(response.headers), response, self.waits)
            finally:
                await response.aclose()
        finally:
            self.active -= 1
