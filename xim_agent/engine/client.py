"""Requests to vLLM over its Unix socket. Bodies (but for a salt) and answers pass as they are."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import httpx
import trio

from xim_agent.engine.poison import Losses, Poison, Poisonous, mark
from xim_agent.engine.reader import Malformed
from xim_agent.engine.salt import salted
from xim_agent.engine.streams import Connection, Streams
from xim_agent.errors import AgentError
from xim_agent.mesh.trace import trace_id

ONE_PACKET = 64 * 1024


class EngineLost(AgentError):
    """The engine is not there, or went away before its answer was complete."""

    def __init__(self, why: str) -> None:
        super().__init__("engine_lost", f"the engine is gone: {why}")


def connect(socket: str) -> httpx.AsyncClient:
    """For probes: whole answers to single requests."""
    transport = httpx.AsyncHTTPTransport(
        uds=socket, verify=False, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0)
    )
    # identity: what the engine sends is what the client of the router gets, byte for byte
    headers = {"accept-encoding": "identity", "user-agent": "xerotier-xim-agent"}
    timeout = httpx.Timeout(None, connect=10.0)
    return httpx.AsyncClient(
        transport=transport, base_url="http://engine", headers=headers, timeout=timeout, trust_env=False
    )


class Taker(Protocol):
    """Where a body goes. `take` is synchronous and keeps all of a piece, also of one too many; False: no more now."""

    def take(self, piece: bytes) -> bool: ...
    async def room(self) -> None: ...


class EngineReply:
    """`headers`: lower-case names, as the engine sent them."""

    def __init__(self, client: "EngineClient", connection: Connection) -> None:
        self.status = connection.reader.status
        self.headers = connection.reader.headers
        self._client = client
        self._connection = connection
        connection.events = self.headers.get("content-type", "").startswith("text/event-stream")

    async def relay(self, taker: Taker) -> None:
        """The whole body, undecoded, as it comes; not read while the taker has no room. Raises EngineLost."""
        while await self._more(taker.take):
            await taker.room()

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The same for one who waits between pieces."""
        got: list[bytes] = []

        def take(piece: bytes) -> bool:
            got.append(piece)
            return False

        more = True
        while more:
            more = await self._more(take)
            for piece in got:
                yield piece
            got.clear()

    async def _more(self, take: Callable[[bytes], bool]) -> bool:
        """False after the last byte; what came before a loss is given first."""
        connection, streams = self._connection, self._client.streams
        connection.full = False
        if early := connection.early:
            connection.early, connection.begun = b"", True
            streams.pieces += connection.events
            if not take(early):
                return True
        if not connection.reader.done and connection.lost is None:
            connection.take = take
            with self._client.waits:
                await streams.wait(connection)
        if connection.lost is not None and not connection.full:
            raise EngineLost(connection.lost)
        return connection.full or not connection.reader.done


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
        self.waits = Waits()
        self.poison = Poison()
        self._salt_secret = salt_secret
        self.streams = Streams()
        self._socket: str | None = None
        self._running: dict[object, tuple[str, bytes]] = {}
        self._lost = Losses()

    @property
    def streamed(self) -> int:
        return self.streams.pieces

    @property
    def active(self) -> int:
        return len(self._running)

    def attach(self, socket: str) -> None:
        self._lost = Losses()
        self._socket = socket

    def detach(self) -> None:
        """From now on `open` fails at once. Requests under way end as their connections do, with the process."""
        self._socket = None
        for path, body in self._running.values():
            self._note_loss(path, body)

    def crashed(self) -> int:
        """After `detach`, when the engine's end was its own: how many requests are refused as poison from now on.

        The end of an engine core reaches the requests before us: those it cut a moment ago were running too.
        """
        return self.poison.crashed(self._lost.recent(trio.current_time()))

    def _note_loss(self, path: str, body: bytes) -> None:
        self._lost.note(mark(path, body), trio.current_time())

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
        if self._socket is None:
            raise EngineLost("it is not running")
        key = object()
        self._running[key] = path, body
        try:
            async with self._replied(self._socket, path, headers, body, tenant) as reply:
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
        self, socket: str, path: str, headers: Mapping[str, str], body: bytes, tenant: str
    ) -> AsyncIterator[EngineReply]:
        try:
            with self.waits:
                connection = await self.streams.connect(socket)
        except OSError as error:
            raise EngineLost(repr(error)) from error
        try:
            with self.waits:
                # Salted, a body is a copy, which is gone once it is sent: the answer may take half an hour.
                await self._send(connection, path, headers, self._salted(path, body, tenant))
                await self.streams.wait(connection)
            if not connection.reader.status:
                raise EngineLost(connection.lost or "no answer")
            yield EngineReply(self, connection)
        finally:
            self.streams.close(connection)

    async def _send(self, connection: Connection, path: str, headers: Mapping[str, str], body: bytes) -> None:
        connection.trace = trace_id(headers.get("traceparent", "")) or ""
        try:
            head = connection.reader.request(path, dict(headers), body)
        except Malformed as error:
            raise EngineLost(str(error)) from None
        # One packet where that is cheap; a body of 32 MiB is not copied for it.
        parts = (head + body,) if len(body) <= ONE_PACKET else (head, body)
        for part in parts:
            await self.streams.send(connection, part)
