"""The control socket: who may open it, what a client is told, and what silence and leaving mean."""

import json
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from xim_agent.control import client
from xim_agent.control.server import Call, ControlServer, listen
from xim_agent.errors import AgentError, Exit

Report = Callable[[Any], None]


@asynccontextmanager
async def serving(path: Path, **calls: Call) -> AsyncIterator[list[str]]:
    announced: list[str] = []
    async with trio.open_nursery() as nursery:
        await nursery.start(ControlServer(path, calls, announced.append).run)
        yield announced
        nursery.cancel_scope.cancel()


def ignore(_: Any) -> None:
    pass


async def echo(arguments: Mapping[str, Any], report: Report) -> Any:
    return dict(arguments)


async def refuse(arguments: Mapping[str, Any], report: Report) -> Any:
    raise AgentError("no_such", "there is none", hint="make one", exit_code=Exit.BUSY)


async def test_a_call_gives_its_result_and_its_error_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    async with serving(path, echo=echo, refuse=refuse) as announced:
        assert announced == [str(path)]
        big = {"x": ["\x00ü\n" * 500] * 5}
        assert await client.call(path, "1", "echo", big, ignore) == big
        with pytest.raises(AgentError) as e:
            await client.call(path, "1", "refuse", {}, ignore)
        error = e.value
        assert (error.code, error.message, error.hint, error.exit_code) == ("no_such", "there is none", "make one", 4)
        with pytest.raises(AgentError) as e:
            await client.call(path, "1", "newer/command", {}, ignore)
        assert e.value.code == "agent_older"
    assert not path.exists()


async def test_only_the_owner_may_open_it(tmp_path: Path) -> None:
    async with serving(tmp_path / "c.sock"):
        assert stat.S_IMODE((tmp_path / "c.sock").stat().st_mode) == 0o600


async def test_a_dead_agents_socket_is_replaced_and_a_living_ones_is_not(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    os.close(listen(path))
    assert path.exists()
    async with serving(path, echo=echo):
        with pytest.raises(AgentError, match="another agent listens there"):
            listen(path)
        assert await client.call(path, "1", "echo", {"a": 1}, ignore) == {"a": 1}
    (tmp_path / "plain").write_text("a file of somebody")
    with pytest.raises(AgentError):
        listen(tmp_path / "plain")
    assert (tmp_path / "plain").read_text() == "a file of somebody"


async def test_progress_comes_while_the_call_goes_on(tmp_path: Path) -> None:
    seen = trio.Event()

    async def work(arguments: Mapping[str, Any], report: Report) -> Any:
        report([3, 4])
        await seen.wait()
        return "done"

    def told(value: Any) -> None:
        assert value == [3, 4]
        seen.set()

    async with serving(tmp_path / "c.sock", work=work):
        with trio.fail_after(20):
            assert await client.call(tmp_path / "c.sock", "1", "work", {}, told) == "done"


async def test_a_client_that_goes_away_cancels_its_call(tmp_path: Path) -> None:
    begun, ended = trio.Event(), trio.Event()

    async def work(arguments: Mapping[str, Any], report: Report) -> Any:
        begun.set()
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with serving(tmp_path / "c.sock", work=work):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.call, tmp_path / "c.sock", "1", "work", {}, ignore)
            with trio.fail_after(10):
                await begun.wait()
            nursery.cancel_scope.cancel()
        with trio.fail_after(5):
            await ended.wait()


async def test_an_agent_that_hangs_is_named_in_bounded_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped, it still lets the kernel take connections."""
    monkeypatch.setattr(client, "SILENCE", 0.2)
    path = tmp_path / "c.sock"
    with socket.socket(socket.AF_UNIX) as hung:
        hung.bind(str(path))
        hung.listen()
        with trio.fail_after(20), pytest.raises(AgentError) as e:
            await client.call(path, "4711", "echo", {}, ignore)
    assert (e.value.code, e.value.exit_code) == ("agent_silent", Exit.ALREADY_RUNNING)
    assert "4711" in e.value.message
    assert "kill 4711" in e.value.hint


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense",
        b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\n{}",
        b'HTTP/1.1 200 OK\r\ncontent-length: 19\r\n\r\n{"progress": [1,2]}',
        b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n<a>",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 500 \r\ncontent-length: 0\r\n\r\n",
    ],
)
async def test_an_answer_that_breaks_off_is_no_result(tmp_path: Path, answer: bytes) -> None:
    path = tmp_path / "c.sock"

    async def one(stream: trio.SocketStream) -> None:
        await stream.receive_some(65536)
        await stream.send_all(answer)
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        sock = trio.socket.socket(trio.socket.AF_UNIX)
        await sock.bind(str(path))
        sock.listen()
        nursery.start_soon(trio.serve_listeners, one, [trio.SocketListener(sock)])
        with pytest.raises(AgentError) as e:
            await client.call(path, "1", "echo", {}, ignore)
        assert e.value.code == "agent_gone"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("body", [b"{", b"[]", b'"' + b"x" * 70_000 + b'"', b"\xff", b"[" * 60_000])
async def test_a_request_that_is_none_is_refused(tmp_path: Path, body: bytes) -> None:
    async with serving(tmp_path / "c.sock", echo=echo):
        transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "c.sock"))
        async with httpx.AsyncClient(transport=transport, trust_env=False) as raw:
            reply = await raw.post("http://agent/echo", content=body)
            assert (reply.status_code, json.loads(reply.content)["error"]["code"]) == (400, "control_request")
            assert (await raw.get("http://agent/echo")).status_code == 405


async def test_half_a_request_is_not_done(tmp_path: Path) -> None:
    """Whoever was stopped in the middle of asking for a drain has not asked for one."""
    called: list[Any] = []

    async def drain(arguments: Mapping[str, Any], report: Report) -> Any:
        called.append(arguments)

    async with serving(tmp_path / "c.sock", drain=drain, echo=echo):
        async with await trio.open_unix_socket(tmp_path / "c.sock") as stream:
            await stream.send_all(b"POST /drain HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\n{}")
            await stream.send_eof()
            with trio.fail_after(10):
                while await stream.receive_some():
                    pass
        assert await client.call(tmp_path / "c.sock", "1", "echo", {}, ignore) == {}
    assert called == []


async def test_a_bug_in_a_call_is_logged_and_ends_no_other(tmp_path: Path, error_logs: list[Any]) -> None:
    async def broken(arguments: Mapping[str, Any], report: Report) -> Any:
        raise ZeroDivisionError

    async with serving(tmp_path / "c.sock", broken=broken, echo=echo):
        with pytest.raises(AgentError) as e:
            await client.call(tmp_path / "c.sock", "1", "broken", {}, ignore)
        assert e.value.code == "agent_gone"
        assert error_logs
        assert await client.call(tmp_path / "c.sock", "1", "echo", {}, ignore) == {}
