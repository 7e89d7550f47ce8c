"""A TCP proxy between an agent and its router that spoils calls, at random points of them, as a seed says.

It knows just enough HTTP to tell one request from the next: what is lost, repeated or cut is a call or a part of one.
"""

import random
import re
import struct
from collections import Counter
from contextlib import suppress
from socket import SO_LINGER, SO_REUSEADDR, SOL_SOCKET
from typing import Any, Literal

import trio

Kind = Literal["cut", "delay", "duplicate", "half_close", "blackhole", "throttle", "lost_reply"]
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
BROKEN = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)
LINGER_SECONDS = 60.0  # how long the far side does not learn that the near one has gone, behind a black hole

LATENCY_SECONDS = 0.02  # of every call that is not spoilt


class Left(Exception):
    """The other side has closed its connection."""


class Wire:
    """A connection that carries HTTP messages with a content-length, one after the other."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.early = b""

    async def more(self) -> None:
        data = await self.stream.receive_some(1 << 16)
        if not data:
            raise Left
        self.early += data

    async def message(self) -> bytes:
        """One whole request or reply. Raises Left."""
        while (end := self.early.find(b"\r\n\r\n")) < 0:
            await self.more()
        found = _LENGTH.search(self.early[:end])
        size = end + 4 + (int(found[1]) if found else 0)
        while len(self.early) < size:
            await self.more()
        message, self.early = self.early[:size], self.early[size:]
        return message

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    def close(self, reset: bool = False) -> None:
        if reset:
            with suppress(*BROKEN):
                self.stream.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
        self.stream.socket.close()


class FaultProxy:
    """`share`: how many of the calls are spoilt, by `kind`. `hits` counts them, `calls` the requests that came."""

    def __init__(self, seed: int) -> None:
        self.target = 0
        self.port = 0
        self.kind: Kind | None = None
        self.share = 0.0
        self.hits: Counter[str] = Counter()
        self.calls = 0
        self._dice = random.Random(seed)
        self._plugged = trio.CancelScope()
        self._pulled = False
        self._dead: list[trio.SocketStream] = []
        self._nursery: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def spoil(self, kind: Kind | None, share: float) -> None:
        self.kind, self.share = kind, share

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as self._nursery:
            await self.plug()
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                for stream in self._dead:
                    stream.socket.close()

    async def plug(self) -> None:
        """Listens, at the same port as before."""
        self._plugged.cancel()
        self._pulled = False
        await self._nursery.start(self._listen)

    async def pull(self, *, accepts: bool) -> None:
        """As if the cable were pulled: what is under way is lost, and neither side learns of it, not even later.

        `accepts`: somebody before the cut takes new connections; else they hang too.
        """
        self._pulled = True
        self._plugged.cancel()
        await self._nursery.start(self._accept_and_keep if accepts else self._full)

    async def _accept_and_keep(self, task_status: trio.TaskStatus[None]) -> None:  # noqa: ASYNC128
        with trio.CancelScope() as self._plugged:
            listeners = await trio.open_tcp_listeners(self.port, host="127.0.0.1")

            async def keep(stream: trio.SocketStream) -> None:
                self._dead.append(stream)
                await trio.sleep_forever()

            await trio.serve_listeners(keep, listeners, task_status=task_status)  # type: ignore[call-overload]

    async def _full(self, task_status: trio.TaskStatus[None]) -> None:  # noqa: ASYNC128
        """The kernel drops what would begin a connection while the queue of a listener is full."""
        with trio.CancelScope() as self._plugged, trio.socket.socket() as listening, trio.socket.socket() as filler:
            listening.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
            await listening.bind(("127.0.0.1", self.port))
            listening.listen(0)
            await filler.connect(("127.0.0.1", self.port))
            task_status.started()
            await trio.sleep_forever()

    def unplug(self) -> None:
        """Every connection ends, and new ones are refused."""
        self._plugged.cancel()

    async def _listen(self, task_status: trio.TaskStatus[None]) -> None:  # noqa: ASYNC128
        with trio.CancelScope() as self._plugged:
            listeners = await trio.open_tcp_listeners(self.port, host="127.0.0.1")
            self.port = listeners[0].socket.getsockname()[1]
            await trio.serve_listeners(self._connection, listeners, task_status=task_status)  # type: ignore[call-overload]

    async def _connection(self, stream: trio.SocketStream) -> None:
        near, far = Wire(stream), None
        try:
            while True:
                request = await near.message()
                far = far or await self._connect()
                if not await self._call(near, far, request):
                    return
        except (Left, *BROKEN):
            pass
        finally:
            if self._pulled:
                self._dead += [wire.stream for wire in (near, far) if wire is not None]
            else:
                near.close(reset=self._dice.random() < 0.3)
                if far is not None:
                    far.close()

    async def _connect(self) -> Wire:
        return Wire(await trio.open_tcp_stream("127.0.0.1", self.target))

    async def _call(self, near: Wire, far: Wire, request: bytes) -> bool:
        """False when the connection is not to be used again. Raises Left when either side leaves in between."""
        self.calls += 1
        kind = self.kind if self._dice.random() < self.share else None
        does = getattr(self, f"_{kind or 'pass'}")
        if kind:
            self.hits[kind] += 1
        goes_on = left = False

        async def watch(scope: trio.CancelScope) -> None:
            nonlocal left
            try:
                while True:
                    await near.more()
            except (Left, *BROKEN):
                left = True
                scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, nursery.cancel_scope)
            with suppress(Left, *BROKEN):
                goes_on = await does(near, far, request)
            nursery.cancel_scope.cancel()
        return goes_on and not left

    def _some(self, message: bytes) -> bytes:
        return message[: self._dice.randrange(len(message))]

    async def _pass(self, near: Wire, far: Wire, request: bytes) -> bool:
        await trio.sleep(LATENCY_SECONDS)
        await far.send(request)
        await near.send(await far.message())
        return True

    async def _cut(self, near: Wire, far: Wire, request: bytes) -> bool:
        if self._dice.random() < 0.5:
            await far.send(self._some(request))
        else:
            await far.send(request)
            await near.send(self._some(await far.message()))
        return False

    async def _lost_reply(self, near: Wire, far: Wire, request: bytes) -> bool:
        await far.send(request)
        await far.message()
        return False

    async def _delay(self, near: Wire, far: Wire, request: bytes) -> bool:
        await trio.sleep(self._dice.uniform(0, 3))
        await far.send(request)
        reply = await far.message()
        await trio.sleep(self._dice.uniform(0, 3))
        await near.send(reply)
        return True

    async def _duplicate(self, near: Wire, far: Wire, request: bytes) -> bool:
        """Its first reply is lost and it is sent once more; or it comes once more, long after its reply."""
        if self._dice.random() < 0.5:
            await self._once_more(request, 0)
            return await self._pass(near, far, request)
        self._nursery.start_soon(self._once_more, request, self._dice.uniform(0, 5))
        return await self._pass(near, far, request)

    async def _once_more(self, request: bytes, after: float) -> None:
        await trio.sleep(after)
        with suppress(Left, *BROKEN):
            other = await self._connect()
            try:
                await other.send(request)
                await other.message()
            finally:
                other.close()

    async def _half_close(self, near: Wire, far: Wire, request: bytes) -> bool:
        if self._dice.random() < 0.5:
            await far.send(self._some(request))
            await far.stream.send_eof()
            await near.send(await far.message())
        else:
            await far.send(request)
            await near.send(self._some(await far.message()))
        await near.stream.send_eof()
        await trio.sleep_forever()  # until it has had enough of us
        return False

    async def _blackhole(self, near: Wire, far: Wire, request: bytes) -> bool:
        """What was on its way arrives nowhere, and neither side learns anything."""
        other = await self._connect()
        self._nursery.start_soon(self._keep, other)
        if self._dice.random() < 0.5:
            await other.send(self._some(request))
        else:
            await other.send(request)
            await near.send(self._some(await other.message()))
        await trio.sleep_forever()
        return False

    async def _keep(self, wire: Wire) -> None:
        try:
            await trio.sleep(LINGER_SECONDS)
        finally:
            wire.close()

    async def _throttle(self, near: Wire, far: Wire, request: bytes) -> bool:
        await self._drip(far, request)
        await self._drip(near, await far.message())
        return True

    async def _drip(self, wire: Wire, data: bytes) -> None:
        step = max(1, len(data) // self._dice.randint(1, 40))
        for start in range(0, len(data), step):
            await wire.send(data[start : start + step])
            await trio.sleep(self._dice.uniform(0, 0.1))
