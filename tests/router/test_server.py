"""The server around the application: addresses, TLS, what is left when it stops, and callers that speak no HTTP."""

import json
import logging
import re
import socket
import ssl
import struct
from functools import partial
from pathlib import Path

import httpx
import pytest
import trio
from fakes.agent import MODEL, Bench, FakeAgent, head, running, until
from fakes.tls import certificate

from xim_agent.errors import AgentError
from xim_agent.router.app import make_app, serve
from xim_agent.router.server import Server, parse_listen
from xim_agent.router.store import Store


@pytest.mark.parametrize(
    ("text", "address"),
    [("127.0.0.1:8080", ("127.0.0.1", 8080)), ("[::1]:0", ("::1", 0)), ("0.0.0.0:65535", ("0.0.0.0", 65535))],
)
def test_listen_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_listen(text) == address


@pytest.mark.parametrize("text", ["", "8080", ":8080", "host:", "host:65536", "host:-1", "host:٣", "host:x"])
def test_listen_addresses_that_are_none(text: str) -> None:
    with pytest.raises(AgentError) as caught:
        parse_listen(text)
    assert caught.value.code == "listen_invalid"


async def test_port_that_is_taken(tmp_path: Path) -> None:
    async with running(tmp_path / "one") as bench:
        with Store.open(tmp_path / "two") as store, pytest.raises(AgentError) as caught:
            await serve(make_app(store), bench.url.removeprefix("http://"))
    assert caught.value.code == "listen_failed"


def completion(bench: Bench) -> bytes:
    body = json.dumps({"model": MODEL}).encode()
    fields = f"host: x\r\nauthorization: Bearer {bench.api_key}\r\ncontent-length: {len(body)}\r\n\r\n"
    return b"POST /v1/completions HTTP/1.1\r\n" + fields.encode() + body


async def deaf_client(bench: Bench, port: int, agent: FakeAgent | None = None) -> trio.SocketStream:
    """Asked for a stream, and has not read until nothing more went."""
    agent = agent or await bench.agent()
    await agent.poll(wait_ms=0)
    deaf = await trio.open_tcp_stream("127.0.0.1", port)
    await deaf.send_all(completion(bench))
    lease = (await agent.take())["id"]
    await agent.events(lease, [head()])
    piece, sent = b"x" * 65536, 0
    limit = bench.router.dispatch.limits.window
    for seq in range(1, 1000):
        if sent + len(piece) > limit:
            limit = max(limit, (await agent.poll(wait_ms=50))["credit"].get(lease, 0))
        if sent + len(piece) > limit:
            break
        reply = await agent.events(lease, [[seq, "data", piece]])
        sent, limit = sent + len(piece), max(limit, reply["credit"].get(lease, 0))
    return deaf


async def test_stop_is_quick_and_leaves_no_socket(tmp_path: Path) -> None:
    """With an agent in a held poll, a stream whose client does not read, an idle connection and half a request."""
    began = 0.0
    async with running(tmp_path / "router") as bench:
        port = int(bench.url.rpartition(":")[2])
        agent = await bench.agent()
        deaf = await deaf_client(bench, port, agent)
        idle = await trio.open_tcp_stream("127.0.0.1", port)
        half = await trio.open_tcp_stream("127.0.0.1", port)
        await half.send_all(b"POST /v1/completions HTTP/1.1\r\nhost:")
        async with trio.open_nursery() as nursery:

            async def held() -> None:
                with pytest.raises(httpx.HTTPError):
                    await agent.poll()

            nursery.start_soon(held)
            await until(lambda: bench.router.dispatch.agents[agent.id].poll)
            began = trio.current_time()
            bench.scope.cancel()
    assert trio.current_time() - began < 2
    for stream in (deaf, idle, half):
        await stream.aclose()
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(("127.0.0.1", port))


UPGRADE = (
    b"GET /v1/enroll HTTP/1.1\r\nhost: x\r\nupgrade: h2c\r\nconnection: upgrade, HTTP2-Settings\r\n"
    b"HTTP2-Settings: AAMAAABk_____\r\n\r\n"
)
# 1200 HTTP/2 frames, each with a stream of its own.
PRIORITIES = b"".join(struct.pack(">IBIIB", 5 << 8 | 2, 0, n, 0, 15) for n in range(1, 2400, 2))


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01",
        b"GET / HTTP/9\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"x" * 100_000,
        b"\r\n",
        UPGRADE,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000") + PRIORITIES,
    ],
    ids=["tls", "version", "nul", "long", "empty", "h2c", "h2"],
)
async def test_callers_that_speak_no_http(tmp_path: Path, data: bytes) -> None:
    async with running(tmp_path / "router") as bench:
        stream = await trio.open_tcp_stream("127.0.0.1", int(bench.url.rpartition(":")[2]))
        async with stream:
            await stream.send_all(data)
            await stream.send_eof()
            try:
                while await stream.receive_some():
                    pass
            except trio.BrokenResourceError:
                pass
        async with bench.http() as http:
            assert (await http.get("/v1/models")).status_code == 200


async def test_other_protocols_are_not_switched_to(tmp_path: Path) -> None:
    async with running(tmp_path / "router") as bench:
        for name in (b"websocket", b"h2c"):
            stream = await trio.open_tcp_stream("127.0.0.1", int(bench.url.rpartition(":")[2]))
            async with stream:
                await stream.send_all(
                    b"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: " + name + b"\r\n"
                    b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
                )
                assert (await stream.receive_some()).startswith(b"HTTP/1.1 401")


async def test_a_mistake_of_ours_ends_one_connection(error_logs: list[logging.LogRecord]) -> None:
    await Server(None).connection(object())
    assert [record.getMessage() for record in error_logs] == ["connection failed"]


async def test_requests_sent_ahead_are_answered_in_order(tmp_path: Path) -> None:
    async with running(tmp_path / "router") as bench:
        stream = await trio.open_tcp_stream("127.0.0.1", int(bench.url.rpartition(":")[2]))
        async with stream:
            await stream.send_all(
                b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\nGET /none HTTP/1.1\r\nhost: x\r\n\r\n" * 3
            )
            seen = b""
            with trio.fail_after(10):
                while seen.count(b"HTTP/1.1") < 6 or not seen.endswith(b"}}"):
                    seen += await stream.receive_some()
        assert re.findall(rb"HTTP/1.1 (\d+)", seen) == [b"401", b"404"] * 3


async def test_client_that_left_is_noticed_behind_requests_sent_ahead(tmp_path: Path) -> None:
    async with running(tmp_path / "router") as bench:
        await bench.agent()
        stream = await trio.open_tcp_stream("127.0.0.1", int(bench.url.rpartition(":")[2]))
        async with stream:
            await stream.send_all(completion(bench) + b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            await until(lambda: bench.router.dispatch.statistics().queued)
        await until(lambda: not bench.router.dispatch.statistics().queued)


async def test_client_that_does_not_read_is_left(tmp_path: Path, nursery: trio.Nursery) -> None:
    async with running(tmp_path / "router") as bench:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, Server(bench.router, patience=0.3).connection, [listener])
        deaf = await deaf_client(bench, listener.socket.getsockname()[1])
        async with deaf:
            await until(lambda: bench.router.dispatch.statistics().counts.get("cancelled"))
        nursery.cancel_scope.cancel()


async def test_tls(tmp_path: Path, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> None:
    cert, key = certificate(tmp_path, host="localhost")
    with Store.open(tmp_path / "router") as store:
        async with trio.open_nursery() as inner:
            start = partial(serve, make_app(store), "127.0.0.1:0", tls_cert=cert, tls_key=key)
            (url,) = await inner.start(start)
            assert url.startswith("https://127.0.0.1:")
            assert store.public_urls == [url]
            trusting = ssl.create_default_context(cafile=str(cert))
            async with httpx.AsyncClient(verify=trusting, trust_env=False) as http:
                port = url.rpartition(":")[2]
                async with await trio.open_tcp_stream("127.0.0.1", int(port)) as plain:
                    await plain.send_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
                    while await plain.receive_some():
                        pass
                assert (await http.get(f"https://localhost:{port}/v1/models")).status_code == 401
            assert [r.getMessage() for r in caplog.records if r.levelname not in ("DEBUG", "INFO")] == []
            inner.cancel_scope.cancel()


async def test_certificate_that_is_none(tmp_path: Path) -> None:
    broken = tmp_path / "cert.pem"
    broken.write_text("no certificate")
    with Store.open(tmp_path / "router") as store, pytest.raises(AgentError) as caught:
        await serve(make_app(store), "127.0.0.1:0", tls_cert=broken, tls_key=broken)
    assert caught.value.code == "tls_certificate"


def test_public_urls_and_issuer(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        assert not store.served_before
        assert store.public_urls == ["http://127.0.0.1:8080"]
        store.serve_at([], "http://127.0.0.1:1000")
        assert store.keys(1.0).issuer == "http://127.0.0.1:1000"
        store.serve_at([], "http://127.0.0.1:2000")
        assert store.public_urls == ["http://127.0.0.1:2000"]
        store.serve_at(["https://a.example/", "https://b.example"], "http://127.0.0.1:2000")
    with Store.open(tmp_path) as store:
        store.serve_at([], "http://127.0.0.1:3000")
        assert store.public_urls == ["https://a.example", "https://b.example"]
        assert store.keys(1.0).issuer == "http://127.0.0.1:1000", "agents compare it for ever"


def test_data_directory_is_private(tmp_path: Path) -> None:
    with Store.open(tmp_path / "router"):
        modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "router", tmp_path / "router" / "router.sqlite")]
    assert modes == [0o700, 0o600]


@pytest.mark.parametrize("damage", ["file", "garbage"])
def test_data_directory_that_cannot_be_used(tmp_path: Path, damage: str) -> None:
    directory = tmp_path / "router"
    if damage == "file":
        directory.write_text("")
    else:
        directory.mkdir()
        (directory / "router.sqlite").write_bytes(b"no database " * 100)
    with pytest.raises(AgentError) as caught:
        Store.open(directory)
    assert (caught.value.code, caught.value.exit_code) == ("router_data", 77)


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
async def test_every_address_needs_a_public_url(tmp_path: Path, host: str) -> None:
    with Store.open(tmp_path) as store:
        with pytest.raises(AgentError) as caught:
            await serve(make_app(store), f"{host}:0")
        assert (caught.value.code, caught.value.exit_code) == ("public_url_missing", 2)
        assert not store.served_before
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve, make_app(store), "0.0.0.0:0", public_urls=["http://router.example"]))
            nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, make_app(store), "0.0.0.0:0")
            nursery.cancel_scope.cancel()
