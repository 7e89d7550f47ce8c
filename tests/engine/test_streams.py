"""Hundreds of connections read by one of the tasks that wait for them: over real sockets, against a scripted engine."""

import errno
import socket
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from fakes.engine import until

from xim_agent.engine.client import EngineClient, EngineLost

PATH = "/v1/completions"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
Script = Callable[[trio.SocketStream], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Taker:
    """Takes `limit` bytes, then none until `more`."""

    def __init__(self, limit: int = 1 << 40) -> None:
        self.got, self.limit, self.came = b"", limit, trio.Event()
        self.grown = trio.Event()

    def take(self, piece: bytes) -> bool:
        self.got += piece
        self.came.set()
        return len(self.got) <= self.limit

    async def room(self) -> None:
        while len(self.got) > self.limit:
            self.grown = trio.Event()
            await self.grown.wait()

    def more(self, limit: int) -> None:
        self.limit = limit
        self.grown.set()


@pytest.fixture
async def engine(runtime: Path, nursery: trio.Nursery) -> Callable[[Script], Awaitable[EngineClient]]:
    """Answers every connection by a script, after it has read the request."""

    async def start(script: Script) -> EngineClient:
        listener = trio.socket.socket(socket.AF_UNIX)
        await listener.bind(str(runtime / "s"))
        listener.listen(1000)

        async def serve(stream: trio.SocketStream) -> None:
            async with stream:
                asked = b""
                while not asked.endswith(b"}"):
                    asked += await stream.receive_some()
                await script(stream)

        nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])
        client = EngineClient()
        client.attach(str(runtime / "s"))
        return client

    return start


async def read(client: EngineClient, taker: Any) -> None:
    async with client.open(PATH, {}, b"{}") as reply:
        await reply.relay(taker)


async def test_many_at_once_each_with_its_own_bytes(engine: Any) -> None:
    count, went = 0, trio.Event()

    async def script(stream: trio.SocketStream) -> None:
        nonlocal count
        count += 1
        mine = count
        if mine == 300:
            went.set()
        await stream.send_all(HEAD)
        await went.wait()
        for i in range(20):
            await stream.send_all(chunk(b"%d:%d " % (mine, i)))
        await stream.send_all(chunk(b"end") + b"0\r\n\r\n")

    client = await engine(script)
    takers = [Taker() for _ in range(300)]
    with trio.fail_after(20):
        async with trio.open_nursery() as readers:
            for taker in takers:
                readers.start_soon(read, client, taker)
    expected = {b"".join(b"%d:%d " % (n, i) for i in range(20)) + b"end" for n in range(1, 301)}
    assert {taker.got for taker in takers} == expected
    assert (client.active, client.waits.now) == (0, 0)


async def test_the_task_that_reads_may_be_cancelled(engine: Any, nursery: trio.Nursery) -> None:
    """The first one reads for all; when it goes, its connection is closed and another one reads."""
    closed, go = trio.Event(), trio.Event()
    first = True

    async def script(stream: trio.SocketStream) -> None:
        nonlocal first
        mine, first = first, False
        await stream.send_all(HEAD + chunk(b"one"))
        if mine:
            assert await stream.receive_some() == b""
            closed.set()
        else:
            await go.wait()
            await stream.send_all(chunk(b"two") + b"0\r\n\r\n")

    client = await engine(script)
    reader, *others = [Taker() for _ in range(5)]
    with trio.fail_after(10):
        async with trio.open_nursery() as rest:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as inner:
                    inner.start_soon(read, client, reader)
                    await reader.came.wait()
                    for other in others:
                        rest.start_soon(read, client, other)
                    for other in others:
                        await other.came.wait()
                    scope.cancel()
            await closed.wait()
            go.set()
    assert [other.got for other in others] == [b"onetwo"] * 4


async def test_one_without_room_is_not_read_and_holds_up_nobody(engine: Any, nursery: trio.Nursery) -> None:
    sent = 0

    async def script(stream: trio.SocketStream) -> None:
        nonlocal sent
        await stream.send_all(HEAD)
        for _ in range(200):
            await stream.send_all(chunk(b"x" * 10_000))
            sent += 10_000
        await stream.send_all(b"0\r\n\r\n")

    client = await engine(script)
    slow = Taker(50_000)
    nursery.start_soon(read, client, slow)
    await slow.came.wait()
    quick = Taker()
    with trio.fail_after(10):
        await read(client, quick)
        assert len(quick.got) == 2_000_000
        await until(lambda: not client.waits.now)
    assert len(slow.got) < 50_000 + 70_000
    assert sent < 2_000_000 + 1_500_000  # the socket's buffers are full
    with trio.fail_after(10):
        slow.more(1 << 40)
        await until(lambda: not client.active)
    assert slow.got == b"x" * 2_000_000


CUTS = {b"": b"", b"HTTP/1.1 20": b"", HEAD: b"", HEAD + b"5\r\nab": b"ab", HEAD + b"5\r\nabcde\r\n": b"abcde",
        HEAD + b"zz\r\n": b"", HEAD + chunk(b"abc") + b"1\r\nab": b"abca"}  # fmt: skip


@pytest.mark.parametrize("cut", CUTS)
async def test_a_cut_answer_is_lost(engine: Any, cut: bytes) -> None:
    async def script(stream: trio.SocketStream) -> None:
        if cut:
            await stream.send_all(cut)

    client = await engine(script)
    taker = Taker()
    with trio.fail_after(10), pytest.raises(EngineLost):
        await read(client, taker)
    assert taker.got == CUTS[cut]
    assert client.active == 0


async def test_what_came_before_a_loss_is_given_first(engine: Any, nursery: trio.Nursery) -> None:
    go = trio.Event()

    async def script(stream: trio.SocketStream) -> None:
        await stream.send_all(HEAD + chunk(b"one"))
        await go.wait()
        await stream.send_all(chunk(b"two") + b"zz\r\n")

    client = await engine(script)
    taker, said = Taker(3), []

    async def fails() -> None:
        with pytest.raises(EngineLost):
            await read(client, taker)
        said.append(taker.limit)

    with trio.fail_after(10):
        async with trio.open_nursery() as readers:
            readers.start_soon(fails)
            await taker.came.wait()
            go.set()
            await until(lambda: taker.got == b"onetwo")
            await trio.testing.wait_all_tasks_blocked()
            assert not said
            taker.more(6)
    assert said == [6]


async def test_what_a_taker_raises_costs_its_own_request(engine: Any, nursery: trio.Nursery) -> None:
    go = trio.Event()

    async def script(stream: trio.SocketStream) -> None:
        await stream.send_all(HEAD + chunk(b"one"))
        await go.wait()
        await stream.send_all(chunk(b"two") + b"0\r\n\r\n")

    class Broken(Taker):
        def take(self, piece: bytes) -> bool:
            if piece == b"two":
                raise ZeroDivisionError
            return super().take(piece)

    client = await engine(script)
    good, bad = Taker(), Broken()
    with trio.fail_after(10):
        async with trio.open_nursery() as readers:
            readers.start_soon(read, client, good)
            await good.came.wait()

            async def fails() -> None:
                with pytest.raises(ZeroDivisionError):
                    await read(client, bad)

            readers.start_soon(fails)
            await bad.came.wait()
            go.set()
    assert (good.got, bad.got) == (b"onetwo", b"one")


async def test_pieces_one_by_one(engine: Any) -> None:
    async def script(stream: trio.SocketStream) -> None:
        await stream.send_all(HEAD + chunk(b"one") + chunk(b"two") + b"0\r\n\r\n")

    client = await engine(script)
    with trio.fail_after(10):
        async with client.open(PATH, {}, b"{}") as reply, aclosing(reply.chunks()) as chunks:
            assert b"".join([piece async for piece in chunks]) == b"onetwo"


async def test_a_big_body_arrives_and_an_early_refusal_is_read(engine: Any, runtime: Path) -> None:
    async def script(stream: trio.SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\nconnection: close\r\n\r\nbig")

    client = await engine(script)
    taker = Taker()
    with trio.fail_after(10):
        async with client.open(PATH, {}, b"x" * 3_000_000 + b"}") as reply:
            assert reply.status == 413
            await reply.relay(taker)
    assert taker.got == b"big"


async def test_a_full_backlog_is_waited_out(runtime: Path, nursery: trio.Nursery) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(runtime / "s"))
    listener.listen(0)
    client = EngineClient()
    client.attach(str(runtime / "s"))
    full = socket.socket(socket.AF_UNIX)
    full.setblocking(False)
    assert full.connect_ex(str(runtime / "s")) == 0
    over = socket.socket(socket.AF_UNIX)
    over.setblocking(False)
    assert over.connect_ex(str(runtime / "s")) == errno.EAGAIN
    taker = Taker()
    with trio.fail_after(10):
        async with trio.open_nursery() as readers:
            readers.start_soon(read, client, taker)
            await trio.testing.wait_all_tasks_blocked()
            listener.accept()[0].close()
            taken = trio.socket.from_stdlib_socket(listener)
            server = trio.SocketStream((await taken.accept())[0])
            await server.send_all(HEAD + chunk(b"one") + b"0\r\n\r\n")
    assert taker.got == b"one"
    await server.aclose()
    for sock in (full, over, taken):
        sock.close()
