"""Routers that are there, half there and not there; each failure names the step that it happened in."""

import json
from email.utils import formatdate
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from fakes.agent import running
from fakes.tls import certificate, server_context

from xim_agent.clock import SystemClock
from xim_agent.mesh import failures
from xim_agent.mesh.reach import PATH, Reached, reach

CLOCK = SystemClock()


async def reached(url: str, insecure: bool = False) -> Reached:
    with trio.fail_after(30):
        return await reach(url, insecure=insecure, clock=CLOCK)


def refusing(status: int, code: str, **headers: str) -> Any:
    async def answer(call: Any) -> None:
        body = json.dumps({"code": code, "protocols": [2]})
        lines = [f"HTTP/1.1 {status} Reason", f"content-length: {len(body)}", "content-type: application/problem+json"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        await call.stream.send_all("\r\n".join([*lines, "", body]).encode())

    return answer


async def failed(url: str, step: str, code: str, exit_code: int) -> Reached:
    found = await reached(url)
    assert found.error is not None
    assert (found.step, found.error.code, found.error.exit_code) == (step, code, exit_code)
    assert found.error.hint
    return found


async def test_a_router(tmp_path: Path) -> None:
    async with running(tmp_path / "router") as bench:
        before = list(bench.store.db.iterdump())
        found = await reached(bench.url)
        assert list(bench.store.db.iterdump()) == before, "nothing of it is noted there"
    assert (found.step, found.error, found.via) == ("", None, None)
    assert found.skew is not None
    assert abs(found.skew) < 5


async def test_what_it_is_asked(start: Any) -> None:
    server = await start(refusing(401, "token_invalid", date=formatdate(CLOCK.now() + 3600, usegmt=True)))
    found = await reached(server.url)
    assert found.error is None
    assert found.skew is not None
    assert 3590 < found.skew < 3610
    [call] = server.calls
    assert (call.method, call.path, call.body) == ("GET", PATH, b"")
    assert "authorization" not in call.headers


async def test_a_name_that_nobody_knows() -> None:
    await failed("https://router.invalid", "DNS", "dns_failed", 69)


async def test_nobody_listens(free_port: int) -> None:
    await failed(f"https://127.0.0.1:{free_port}", "TCP", "connection_refused", 69)


async def test_nobody_takes_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backlog that is full: the kernel lets newcomers wait."""
    monkeypatch.setattr(failures, "CONNECT_SECONDS", 0.2)
    monkeypatch.setattr("xim_agent.mesh.reach.TLS_SECONDS", 0.2)
    with trio.socket.socket() as listener:
        await listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        with trio.socket.socket() as one, trio.socket.socket() as two:
            for waiting in (one, two):
                with trio.move_on_after(0.2):
                    await waiting.connect(address)
            await failed(f"https://127.0.0.1:{address[1]}", "TCP", "connect_timeout", 69)


async def test_tls_that_nobody_speaks(start: Any, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    server = await start()
    await failed(server.url.replace("http:", "https:"), "TLS", "tls_failed", 69)
    monkeypatch.setattr(failures, "CONNECT_SECONDS", 0.2)

    async def silent(stream: trio.SocketStream) -> None:
        async with stream:
            await trio.sleep_forever()

    [listener] = await nursery.start(partial(trio.serve_tcp, silent, 0, host="127.0.0.1"))
    port = listener.socket.getsockname()[1]
    await failed(f"https://127.0.0.1:{port}", "TLS", "connect_timeout", 69)


async def test_a_certificate_that_is_not_trusted(start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain, key = certificate(tmp_path)
    server = await start(refusing(401, "token_expired"), server_context(chain, key))
    await failed(server.url, "TLS", "tls_failed", 69)
    assert (await reached(server.url, insecure=True)).error is None
    monkeypatch.setenv("SSL_CERT_FILE", str(chain))
    assert (await reached(server.url)).error is None
    monkeypatch.setenv("SSL_CERT_FILE", str(key))
    await failed(server.url, "settings", "ca_unreadable", 78)


@pytest.mark.parametrize(
    ("status", "code", "named", "exit_code"),
    [
        (426, "protocol_unsupported", "protocol_unsupported", 13),
        (404, "", "http_404", 78),
        (401, "who_are_you", "http_401", 78),
        (200, "", "reply_malformed", 69),
    ],
)
async def test_something_that_is_no_router_of_ours(
    start: Any, status: int, code: str, named: str, exit_code: int
) -> None:
    await failed((await start(refusing(status, code))).url, "protocol", named, exit_code)


async def test_a_proxy_that_refuses(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = await start(refusing(407, ""))
    monkeypatch.setenv("https_proxy", proxy.url.replace("http://", "http://joe:hunter2@"))
    found = await failed("https://router.example", "proxy", "proxy_failed", 69)
    assert found.via == proxy.url.removeprefix("http://")
    assert found.error is not None
    assert "hunter2" not in found.error.message


async def test_a_router_that_must_not_be_called() -> None:
    await failed("http://router.example", "settings", "insecure_router", 78)
