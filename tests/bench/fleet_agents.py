"""Agents and clients for `fleet.py`: the wire protocol over real sockets with as little of their own as possible."""

import itertools
import random
import re
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec
import trio
import zstandard

from xim_agent.mesh.transport import KEEPALIVE_SECONDS

MODEL = "bench"
CEILING = 4
PIECE = b'data: {"choices":[{"index":0,"delta":{"content":"' + b"x" * 130 + b'"}}]}\n\n'  # about 190 bytes
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_MARK = re.compile(rb'"mark":(\d+)')
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


@dataclass
class Traffic:
    """Calls of one path, and their bytes with all headers in both directions."""

    calls: int = 0
    up: int = 0
    down: int = 0


@dataclass
class Load:
    """What is asked of all from now on, and what came of it since `clear`. Seconds."""

    host: str
    port: int
    key: str
    wait_ms: int = 25_000
    rate: float = 0.0  # requests per second
    calls: int = 2  # events calls of an answer, GAP apart
    gap: float = 0.2
    polls: Traffic = field(default_factory=Traffic)
    events: Traffic = field(default_factory=Traffic)
    dispatch: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    lag: list[float] = field(default_factory=list)
    done: int = 0
    running: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    sent: dict[int, float] = field(default_factory=dict)
    marks: Any = field(default_factory=itertools.count)

    def clear(self) -> None:
        for traffic in (self.polls, self.events):
            traffic.calls = traffic.up = traffic.down = 0
        self.done = 0
        self.dispatch, self.first, self.lag, self.failures = [], [], [], {}

    def failed(self, what: str) -> None:
        self.failures[what] = self.failures.get(what, 0) + 1

    async def all_polled(self, agents: int) -> None:
        while self.polls.calls < agents:  # noqa: ASYNC110 one look in 0.1 s costs less than an event in every poll
            await trio.sleep(0.1)

    async def watch_lag(self) -> None:
        """How late this process is: the part of every time above that is not the router's."""
        while True:
            due = time.perf_counter() + 0.05
            await trio.sleep(0.05)
            self.lag.append(time.perf_counter() - due)


class Wire:
    """One connection, kept idle as long as the real agent does. Raises trio.BrokenResourceError when it is closed."""

    def __init__(self, load: Load, headers: dict[str, str]) -> None:
        self._load = load
        lines = {"Host": f"{load.host}:{load.port}", **headers}
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._stream: trio.SocketStream | None = None
        self._used = 0.0

    async def ask(self, path: str, body: bytes) -> int:
        """Sends a request; returns its size."""
        if time.perf_counter() - self._used > KEEPALIVE_SECONDS:
            self.close()
        if self._stream is None:
            self._stream = await trio.open_tcp_stream(self._load.host, self._load.port)
        head = f"POST {path} HTTP/1.1\r\n{self._headers}Content-Length: {len(body)}\r\n\r\n".encode()
        await self._stream.send_all(head + body)
        return len(head) + len(body)

    async def more(self) -> bytes:
        assert self._stream is not None
        if data := bytes(await self._stream.receive_some(65536)):
            self._used = time.perf_counter()
            return data
        raise trio.BrokenResourceError("closed by the router")

    def close(self) -> None:
        if self._stream is not None:
            self._stream.socket.close()
            self._stream = None

    async def call(self, path: str, body: bytes, traffic: Traffic) -> Any:
        up = await self.ask(path, body)
        data = await self.more()
        while (end := data.find(b"\r\n\r\n") + 4) < 4:
            data += await self.more()
        found = _LENGTH.search(data, 0, end)
        size = end + int(found[1]) if found else end
        while len(data) < size:
            data += await self.more()
        traffic.calls, traffic.up, traffic.down = traffic.calls + 1, traffic.up + up, traffic.down + size
        if not data.startswith(b"HTTP/1.1 200"):
            raise ValueError(data.split(b"\r\n", 1)[0].decode())
        if b"connection: close" in data[:end].lower():
            self.close()
        packed = b"content-encoding: zstd" in data[:end]
        return _decode(zstandard.decompress(data[end:size]) if packed else data[end:size])


class Agent:
    """Polls as the real one does, one call at a time, and sends its events over a second connection."""

    def __init__(self, load: Load, number: int, token: str, ceiling: int = CEILING) -> None:
        headers = {
            "user-agent": "xerotier-xim-agent/0.1.0",
            "xim-protocol": "1",
            "accept-encoding": "zstd",
            "content-type": "application/vnd.msgpack",
            "accept": "application/vnd.msgpack",
            "authorization": f"Bearer {token}",
        }
        self._load = load
        self._ceiling = ceiling
        self._boot = f"{number:032x}"
        self._n = 0
        self._wait_ms = 0
        self._held: set[int] = set()
        self._polls, self._events = Wire(load, headers), Wire(load, headers)
        self._sending = trio.Lock()

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    reply = await self._polls.call("/v1/work/poll", self._poll(), self._load.polls)
                except (OSError, trio.BrokenResourceError, ValueError) as error:
                    self._load.failed(f"poll: {error}")
                    self._polls.close()
                    await trio.sleep(random.random())
                    continue
                for lease in reply["leases"]:
                    if (mark := _MARK.search(lease["body"])) and (sent := self._load.sent.pop(int(mark[1]), None)):
                        self._load.dispatch.append(time.perf_counter() - sent)
                    self._held.add(lease["id"])
                    nursery.start_soon(self._serve, lease["id"])

    async def poll_once(self) -> None:
        """For who measures single calls, instead of `run`."""
        await self._polls.call("/v1/work/poll", self._poll(1), self._load.polls)

    async def event_once(self) -> None:
        """Of a lease that the router does not know: all there is to such a call but the chunk's way to a client."""
        body = _encode({"boot": self._boot, "frames": [[1, 0, "data", PIECE]]})
        await self._events.call("/v1/work/events", body, self._load.events)

    def _poll(self, wait_ms: int = 0) -> bytes:
        self._n += 1
        held, wait_ms = len(self._held), wait_ms or self._load.wait_ms
        if self._n > 1 and wait_ms > max(1, self._wait_ms):  # the first poll is answered at once; then they spread
            self._wait_ms, wait_ms = wait_ms, random.randrange(wait_ms)
        return _encode(
            {
                "boot": self._boot,
                "n": self._n,
                "phase": "ready",
                "capacity": self._ceiling - held,
                "wait_ms": wait_ms,
                "held": sorted(self._held),
                "model": {"id": MODEL, "revision": "r1", "generation": 1},
                "ceiling": self._ceiling,
                "load": {"running": held, "waiting": 0, "kv_usage": 0.25, "tokens_per_s": 50.0 * held},
                "progress": None,
                "health": [],
            }
        )

    async def _serve(self, lease: int) -> None:
        calls, seq = self._load.calls, 1
        frames: list[Any] = [[lease, 0, "head", {"status": 200, "headers": {"content-type": "text/event-stream"}}]]
        for number in range(calls):
            if number:
                await trio.sleep(self._load.gap)
            frames.append([lease, seq, "data", PIECE])
            if number == calls - 1:
                size = {"bytes": calls * len(PIECE), "chunks": calls, "ttft_ms": 1, "duration_ms": 2}
                frames.append([lease, seq + 1, "end", {"reason": "complete", **size}])
            async with self._sending:
                try:
                    body = _encode({"boot": self._boot, "frames": frames})
                    await self._events.call("/v1/work/events", body, self._load.events)
                except (OSError, trio.BrokenResourceError, ValueError) as error:
                    self._load.failed(f"events: {error}")
                    self._events.close()
                    break
            frames, seq = [], seq + 1
        self._held.discard(lease)


class Clients:
    """Requests at random times, `load.rate` a second on average, over as many connections as that takes."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._idle: list[Wire] = []

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                if self._load.rate:
                    await trio.sleep(random.expovariate(self._load.rate))
                    nursery.start_soon(self.request)
                else:
                    await trio.sleep(0.1)

    async def request(self) -> None:
        load = self._load
        headers = {"authorization": f"Bearer {load.key}", "content-type": "application/json"}
        wire = self._idle.pop() if self._idle else Wire(load, headers)
        mark = next(load.marks)
        load.running += 1
        began = load.sent[mark] = time.perf_counter()
        body = b'{"model":"%s","stream":true,"mark":%d,"messages":[{"role":"user","content":"%s"}]}'
        try:
            await wire.ask("/v1/chat/completions", body % (MODEL.encode(), mark, b"y" * 500))
            data = await wire.more()
            if not data.startswith(b"HTTP/1.1 200"):
                raise ValueError(data.split(b"\r\n", 1)[0].decode())
            while PIECE[:6] not in data:
                data += await wire.more()
            load.first.append(time.perf_counter() - began)
            while not data.endswith(b"0\r\n\r\n"):
                data = data[-8:] + await wire.more()
            load.done += 1
            self._idle.append(wire)
        except (OSError, trio.BrokenResourceError, ValueError) as error:
            load.failed(f"request: {error}")
            load.sent.pop(mark, None)
            wire.close()
        load.running -= 1
