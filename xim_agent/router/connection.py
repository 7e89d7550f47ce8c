"""One connection of the router: HTTP/1.1 by hypercorn's protocol, over a stream that is read and written here."""

import math
import os
from typing import Any

import h11
import trio
from hypercorn.config import Config as ServerConfig
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState, H11SendableEvent
from hypercorn.utils import parse_socket_addr

Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]

RECEIVE = 64 * 1024
SLICE = 16 * 1024  # a client that takes less than this within `patience` does not read
EARLY = 64 * 1024  # of further requests, kept while one is being answered


class _Http1(H11Protocol):
    """Never switches to another protocol: HTTP/2 and WebSockets are not served, and their code is not reached."""

    head = b""

    async def _check_protocol(self, event: h11.Request) -> None:
        if event.http_version not in (b"1.0", b"1.1"):
            await self._send_error_response(505)
            raise h11.RemoteProtocolError(f"HTTP/{event.http_version.decode()}")

    async def _create_stream(self, request: h11.Request) -> None:
        headers = [(name, value) for name, value in request.headers if name != b"upgrade"]
        if len(headers) != len(request.headers):
            request = h11.Request(
                method=request.method, target=request.target, headers=headers, http_version=request.http_version
            )
        await super()._create_stream(request)

    async def _send_h11_event(self, event: H11SendableEvent) -> None:
        """The head of a reply waits for what follows it, so that the two are one write and one packet."""
        try:
            data = self.connection.send(event) or b""
        except h11.LocalProtocolError:
            if self.connection.their_state != h11.ERROR:
                raise
            return
        if isinstance(event, h11.Response):
            self.head = data
        elif data or self.head:
            head, self.head = self.head, b""
            await self.send(RawData(head + data))


class Connection:
    """`run` serves it until either side closes it. `patience`: seconds for a client to take SLICE bytes."""

    def __init__(self, app: Any, config: ServerConfig, stream: Stream, patience: float) -> None:
        self._app = app
        self._config = config
        self._stream = stream
        self._patience = patience
        self._sending = trio.Lock()
        self._early = b""
        self._answering = trio.CancelScope()
        self._answered = True
        self._reading = trio.CancelScope()

    async def run(self) -> None:
        """Raises what goes wrong, often in a group. Closes the stream in any case."""
        tls = isinstance(self._stream, trio.SSLStream)
        socket = (self._stream.transport_stream if isinstance(self._stream, trio.SSLStream) else self._stream).socket
        try:
            if isinstance(self._stream, trio.SSLStream):
                with trio.fail_after(self._config.ssl_handshake_timeout):
                    await self._stream.do_handshake()
            client = parse_socket_addr(socket.family, socket.getpeername())
            server = parse_socket_addr(socket.family, socket.getsockname())
            async with TaskGroup() as tasks:
                self._http = _Http1(
                    self._app,
                    self._config,
                    WorkerContext(None),
                    tasks,
                    ConnectionState({}),
                    tls,
                    client,
                    server,
                    self._send,
                )
                self._http.can_read = self
                try:
                    await self._read()
                finally:
                    del self._http  # which knows us: see `heap` why circles are to be avoided
        finally:
            with trio.move_on_after(1):
                await self._stream.aclose()

    async def _read(self) -> None:
        with self._reading:
            self._idle(True)
            while data := self._early or await self._receive():
                self._early = b""
                await self._http.handle(RawData(data))
        await self._http.handle(Closed())

    async def _receive(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(RECEIVE))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return b""

    def _idle(self, idle: bool) -> None:
        self._reading.deadline = trio.current_time() + self._config.keep_alive_timeout if idle else math.inf

    async def _send(self, event: Event) -> None:
        if isinstance(event, Updated):
            self._idle(event.idle)
        elif isinstance(event, Closed):
            self._reading.cancel()
        elif isinstance(event, RawData):
            try:
                done = self._write(event.data)
                if done == len(event.data):
                    return
                async with self._sending:
                    for start in range(done, len(event.data), SLICE):
                        with trio.fail_after(self._patience):
                            await self._stream.send_all(event.data[start : start + SLICE])
            except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
                self._reading.cancel()
                await trio.aclose_forcefully(self._stream)

    def _write(self, data: bytes) -> int:
        """How many bytes the kernel takes at once: mostly all, and then there is nothing to wait for and no time limit
        to set up, which would cost as much again. Raises trio.BrokenResourceError.
        """
        if isinstance(self._stream, trio.SSLStream) or self._sending.locked():
            return 0
        try:
            return os.write(self._stream.socket.fileno(), data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise trio.BrokenResourceError from error

    # The protocol waits for these when a client sends its next request before it has its answer. Such a client is
    # still watched: when it leaves, nobody waits for that answer.

    async def clear(self) -> None:
        self._answered = False

    async def set(self) -> None:
        self._answered = True
        self._answering.cancel()

    def is_set(self) -> bool:
        return self._answered

    async def wait(self) -> None:
        while not self._answered:
            with trio.CancelScope() as self._answering:
                data = await self._receive()
                self._early += data
                if not data or len(self._early) > EARLY:
                    self._reading.cancel()
