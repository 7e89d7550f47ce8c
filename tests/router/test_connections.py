"""How many connections a router holds, what happens to the next one, and how replies leave."""

import json
import logging
import os
import resource
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio
import trio.testing
from fakes.agent import MODEL, Bench, FakeAgent, head, until
from fakes.tls import certificate

from xim_agent.router.server import MOST_FILES, TOLD, Server, open_tls, raise_file_limit

MOST = 2


@pytest.fixture
async def port(bench: Bench, nursery: trio.Nursery) -> AsyncIterator[int]:
    """Of the same router behind a server that holds MOST connections."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, Server(bench.router, most=MOST).connection, [listener])
    yield listener.socket.getsockname()[1]
    nursery.cancel_scope.cancel()


async def ask(stream: trio.SocketStream, fields: str = "") -> str:
    """One reply, head and body, which come in one piece."""
    await stream.send_all(f"GET /v1/models HTTP/1.1\r\nhost: x\r\n{fields}\r\n".encode())
    with trio.fail_after(10):
        return (await stream.receive_some()).decode()


async def test_one_connection_too_many(bench: Bench, port: int, caplog: pytest.LogCaptureFixture) -> None:
    there = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(MOST)]
    key = f"authorization: Bearer {bench.api_key}\r\n"
    for stream in there:
        assert (await ask(stream, key)).startswith("HTTP/1.1 200")
    with caplog.at_level(logging.WARNING, "xim_agent.router"):
        for fields, kind in (("", '"error": {'), ("xim-protocol: 1\r\n", '"status": 503')):
            async with await trio.open_tcp_stream("127.0.0.1", port) as late:
                reply = await ask(late, fields)
                assert reply.startswith("HTTP/1.1 503")
                assert '"code": "router_full"' in reply
                assert "retry-after: 5" in reply
                assert kind in reply
                assert await late.receive_some() == b"", "it is closed"
    (told,) = (record.getMessage() for record in caplog.records)
    assert told.startswith("connections are refused: 2 are open")
    assert "LimitNOFILE=" in told
    for stream in there:
        assert (await ask(stream, key)).startswith("HTTP/1.1 200"), "those that were there go on"
    await there.pop().aclose()
    async with there.pop(), await trio.open_tcp_stream("127.0.0.1", port) as late:
        with trio.fail_after(10):
            while (reply := await ask(late, key)).startswith("HTTP/1.1 503"):
                late = await trio.open_tcp_stream("127.0.0.1", port)
        assert reply.startswith("HTTP/1.1 200"), "there is room again"
        await late.aclose()


class Stoppable:
    """The same router behind one more listener, which is stopped as the process would stop it."""

    def __init__(self, bench: Bench, tls: ssl.SSLContext | None = None) -> None:
        self._router = bench.router
        self._tls = tls
        self.scope = trio.CancelScope()

    async def run(self, task_status: trio.TaskStatus[int]) -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        task_status.started(listener.socket.getsockname()[1])
        secured: Any = trio.SSLListener(listener, self._tls, https_compatible=True) if self._tls else listener
        with self.scope:
            await trio.serve_listeners(Server(self._router).connection, [secured])


@pytest.mark.parametrize("tls", [False, True])
async def test_who_waits_when_the_router_is_stopped(
    bench: Bench, agent: FakeAgent, nursery: trio.Nursery, tmp_path: Path, tls: bool
) -> None:
    """A held poll, a queued request and half a request have an answer that says why, and what to do."""
    pair = certificate(tmp_path, host="localhost")
    trusting = ssl.create_default_context(cafile=str(pair[0]))
    server = Stoppable(bench, open_tls(*pair) if tls else None)
    port = await nursery.start(server.run)
    replies: list[tuple[str, str]] = []

    async def wait(path: str, fields: str, body: bytes, missing: int = 0) -> None:
        fields += f"host: x\r\ncontent-length: {len(body) + missing}\r\n\r\n"
        plain = await trio.open_tcp_stream("127.0.0.1", port)
        stream: Any = plain
        if tls:
            stream = trio.SSLStream(plain, trusting, server_hostname="localhost", https_compatible=True)
        async with stream:
            await stream.send_all(f"POST {path} HTTP/1.1\r\n{fields}".encode() + body)
            reply = b"".join([part async for part in stream])
        first, _, rest = reply.decode().partition("\r\n\r\n")
        replies.append((first, rest))

    await agent.poll(wait_ms=0)
    poll = {"boot": agent.boot, "n": agent.n + 1, "phase": "ready", "capacity": 0, "wait_ms": 20_000, "held": []}
    poll |= {"model": agent.model, "ceiling": 4, "load": {}, "progress": None, "health": []}
    own = f"authorization: Bearer {agent.token}\r\nxim-protocol: 1\r\n"
    client = f"authorization: Bearer {bench.api_key}\r\n"
    asked = b'{"model": "%s", "prompt": "x"}' % MODEL.encode()
    dispatch = bench.router.dispatch
    with trio.fail_after(10):
        async with trio.open_nursery() as callers:
            callers.start_soon(wait, "/v1/work/poll", own, msgspec.msgpack.encode(poll))
            callers.start_soon(wait, "/v1/completions", client, asked)
            callers.start_soon(wait, "/v1/completions", client, b'{"model":', 100)
            await until(lambda: dispatch.agents[agent.id].poll and dispatch.statistics().queued)
            await trio.testing.wait_all_tasks_blocked(0.05)
            server.scope.cancel()
    for fields, body in replies:
        assert fields.startswith("HTTP/1.1 503")
        assert "connection: close" in fields
        polled = "xim-protocol" in fields
        assert ("retry-after" in fields) is not polled, "an agent comes back sooner by itself"
        told = json.loads(body)
        assert (told if polled else told["error"])["code"] == "router_stopping"
    assert len(replies) == 3


async def test_an_answer_that_has_begun_is_cut_when_the_router_is_stopped(
    bench: Bench, agent: FakeAgent, nursery: trio.Nursery
) -> None:
    server, got = Stoppable(bench), b""
    port = await nursery.start(server.run)
    nursery.start_soon(agent.serve_one, [head(), [1, "data", b"data: 1\n\n"]])
    body = {"model": MODEL, "prompt": "x", "stream": True}
    url = f"http://127.0.0.1:{port}/v1/completions"
    with trio.fail_after(10):
        async with bench.http() as http, http.stream("POST", url, json=body) as reply:
            try:
                async for part in reply.aiter_bytes():
                    got += part
                    server.scope.cancel()
            except httpx.RemoteProtocolError:
                got += b"cut"
    assert got == b"data: 1\n\ncut"


async def test_connections_that_say_nothing_do_not_use_up_the_reserve(port: int) -> None:
    idle = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(MOST + TOLD)]
    async with await trio.open_tcp_stream("127.0.0.1", port) as late:
        with trio.fail_after(10):
            try:
                assert await late.receive_some() == b""
            except trio.BrokenResourceError:
                pass
    for stream in idle:
        await stream.aclose()


async def test_a_connection_is_not_closed_for_the_number_of_its_calls(port: int) -> None:
    """An agent makes a hundred calls a second on one: a thousand are ten seconds."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        for _ in range(1001):
            assert "connection: close" not in (await ask(stream)).lower()


def test_more_open_files_than_usual() -> None:
    before = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        raise_file_limit()
        most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_few_open_files_are_told_of(tmp_path: Path) -> None:
    """Before the first connection is refused for it."""
    program = "import logging; from xim_agent.router.server import raise_file_limit as r; logging.basicConfig(); r()"
    for files, told in ((1000, "leaves room for 936 agents and clients at once; raise it by LimitNOFILE="), (5000, "")):
        command = ["bash", "-c", f'ulimit -n {files}; exec "$@"', "limited", sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert told in done.stderr
        assert bool(told) == bool(done.stderr)


def test_a_serving_router_may_open_more_files(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "xim_agent", "router", "serve", "--listen", "127.0.0.1:0", "--data", str(tmp_path)]
    command = ["bash", "-c", 'ulimit -Sn 300; exec "$@"', "limited", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            while "listening" not in (line := process.stderr.readline()):
                assert line, "it ended"
            limits = Path(f"/proc/{process.pid}/limits").read_text()
        finally:
            process.terminate()
    (row,) = (line.split() for line in limits.splitlines() if line.startswith("Max open files"))
    assert int(row[3]) == min(int(row[4]), MOST_FILES)


async def test_a_reply_is_one_write(agent: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Head and body: two writes cost as much again as all the rest of a short call."""
    await agent.poll()
    sizes: list[int] = []
    write = os.write

    def counted(file: int, data: bytes) -> int:
        if data.startswith(b"HTTP/1.1") or sizes:
            sizes.append(len(data))
        return write(file, data)

    host, _, number = agent.url.removeprefix("http://").partition(":")
    async with await trio.open_tcp_stream(host, int(number)) as stream:
        monkeypatch.setattr(os, "write", counted)
        fields = f"xim-protocol: 1\r\nauthorization: Bearer {agent.token}\r\n\r\n"
        await stream.send_all(b"GET /v1/assignment HTTP/1.1\r\nhost: x\r\n" + fields.encode())
        with trio.fail_after(10):
            reply = await stream.receive_some()
        monkeypatch.undo()
    head, _, body = reply.partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head
    assert sizes == [len(reply)]


async def test_a_large_reply_to_a_slow_reader_is_whole(bench: Bench) -> None:
    """More than the kernel takes at once: the rest is waited for, in order."""
    agent = await bench.agent()
    port = int(bench.url.rpartition(":")[2])
    body = bytes(range(256)) * 40_000
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            lease = (await agent.take())["id"]
            size, seq = 200_000, 0
            kind = {"status": 200, "headers": {"content-type": "application/json"}}
            await agent.events(lease, [[0, "head", kind]])
            for seq, at in enumerate(range(0, len(body), size), 1):
                await agent.events(lease, [[seq, "data", body[at : at + size]]])
            ending = {"reason": "complete", "bytes": len(body), "chunks": seq, "ttft_ms": 1, "duration_ms": 1}
            await agent.events(lease, [[seq + 1, "end", ending]])

        nursery.start_soon(serve)
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            ask = b'{"model":"toy"}'
            fields = f"host: x\r\nauthorization: Bearer {bench.api_key}\r\ncontent-length: {len(ask)}\r\n\r\n"
            await stream.send_all(b"POST /v1/completions HTTP/1.1\r\n" + fields.encode() + ask)
            got = bytearray()
            with trio.fail_after(30):
                while not got.endswith(body[-256:]) or len(got) < len(body):
                    got += await stream.receive_some(32_768)
            assert got.partition(b"\r\n\r\n")[2] == body
    await until(lambda: not bench.router.dispatch.statistics().running)
