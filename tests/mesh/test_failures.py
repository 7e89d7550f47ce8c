"""Each way not to get a reply has its own name, and says where."""

import os
import socket
import ssl
from typing import Any

import pytest
import trio
from fakes.tls import certificate, named, server_context

from xim_agent.clock import SystemClock
from xim_agent.errors import AgentError
from xim_agent.mesh import failures
from xim_agent.mesh.tls import verified
from xim_agent.mesh.transport import Transport
from xim_agent.outcome import Action, RouterError


async def call(transport: Transport, url: str, silence: float = 5.0) -> bytes:
    reply = await transport.call("GET", transport.url(url, "/x?sig=secret"), {}, limit=1000, silence=silence)
    return reply.body


async def failure(transport: Transport, url: str, silence: float = 5.0) -> RouterError:
    with pytest.raises(RouterError) as error:
        await call(transport, url, silence)
    assert error.value.action is Action.RETRY
    assert "secret" not in error.value.message
    return error.value


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


async def test_refused(transport: Any, closed_port: Any) -> None:
    error = await failure(transport, f"http://127.0.0.1:{closed_port}")
    assert error.code == "connection_refused"
    assert f"127.0.0.1:{closed_port} refused" in error.message


async def test_a_name_that_does_not_resolve(transport: Any) -> None:
    error = await failure(transport, "http://router.invalid")
    assert error.code == "dns_failed"
    assert "router.invalid" in error.message


async def test_no_tls_on_the_other_side(transport: Any, start: Any) -> None:
    server = await start()
    error = await failure(transport, server.url.replace("http:", "https:"))
    assert error.code == "tls_failed"


CORPORATE = named("proxy.corp.example", "Corp, Inc.")


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ({"subject": CORPORATE, "issuer": named("Corp Root")}, "unable to get local issuer certificate"),
        ({"subject": CORPORATE}, "self-signed certificate"),
        ({"subject": CORPORATE, "days": (-2, -1)}, "expired|self-signed"),
    ],
)
async def test_who_answered_instead_of_the_router_is_named(
    client: Any, transport: Any, login: Any, start: Any, tmp_path: Any, made: dict[str, Any], reason: str
) -> None:
    """TLS that somebody on the way has opened: nothing was sent to him, and his name is in the message."""
    server = await start(tls=server_context(*certificate(tmp_path, **made)))
    client.credentials = login(server.url)
    with pytest.raises(RouterError, match=f"is not trusted: .*({reason})") as error:
        await client.assignment()
    issuer = made.get("issuer", CORPORATE).rfc4514_string()
    assert f"it was issued to `{CORPORATE.rfc4514_string()}` by `{issuer}`" in error.value.message
    assert (error.value.code, error.value.exit_code) == ("tls_failed", 69)
    assert "SSL_CERT_FILE" in error.value.hint
    assert server.calls == []
    assert await call(transport, server.url) == b""  # --insecure


async def test_certificate_of_another_host_is_named(
    client: Any, login: Any, start: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, key = certificate(tmp_path, host="other.example")
    monkeypatch.setenv("SSL_CERT_FILE", str(chain))
    server = await start(tls=server_context(chain, key))
    trusting = Transport(insecure=False, clock=client._transport._clock, on_skew=lambda _: None)
    error = await failure(trusting, server.url)
    await trusting.aclose()
    assert "IP address mismatch, certificate is not valid for '127.0.0.1'" in error.message
    assert "it was issued to `CN=other.example`" in error.message


async def test_certificate_that_nobody_can_read_is_refused_all_the_same(
    transport: Any, start: Any, tmp_path: Any
) -> None:
    """Who is on the way may send anything: this one says that it is of X.509 version 4."""
    chain, key = certificate(tmp_path)
    version = b"\xa0\x03\x02\x01"
    der = ssl.PEM_cert_to_DER_cert(chain.read_text())
    chain.write_text(ssl.DER_cert_to_PEM_cert(der.replace(version + b"\x02", version + b"\x03", 1)))
    server = await start(tls=server_context(chain, key))
    careful = Transport(insecure=False, clock=transport._clock, on_skew=lambda _: None)
    error = await failure(careful, server.url)
    await careful.aclose()
    assert (error.code, "issued to" in error.message) == ("tls_failed", False)


async def test_a_made_up_name_cannot_write_over_the_terminal(transport: Any, start: Any, tmp_path: Any) -> None:
    strange = named("\x1b[2J\x07evil\u202e" + "x" * 50)
    server = await start(tls=server_context(*certificate(tmp_path, subject=strange)))
    careful = Transport(insecure=False, clock=transport._clock, on_skew=lambda _: None)
    error = await failure(careful, server.url)
    await careful.aclose()
    assert error.message.isprintable()
    assert "evil" in error.message


def test_certificates_that_cannot_be_read_are_a_matter_of_configuration(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "none.pem").write_text("no certificate")
    for place in (tmp_path / "missing.pem", tmp_path / "none.pem"):
        monkeypatch.setenv("SSL_CERT_FILE", str(place))
        with pytest.raises(AgentError) as error:
            verified()
        assert (error.value.code, error.value.exit_code) == ("ca_unreadable", 78)
        assert f"SSL_CERT_FILE: the certificates in {place}" in error.value.message


async def test_silence_is_bounded_and_slowness_is_not(transport: Any, start: Any) -> None:
    async def silent(request: Any) -> Any:
        await trio.sleep_forever()

    server = await start(silent)
    error = await failure(transport, server.url, 0.2)
    assert (error.code, "silent" in error.message) == ("silence", True)

    async def slow(request: Any) -> Any:
        await request.stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 15\r\n\r\n")
        for _ in range(15):
            await request.stream.send_all(b"x")
            await trio.sleep(0.03)

    server.answer = slow
    assert await call(transport, server.url, 0.2) == b"x" * 15


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc", b"hello\r\n\r\n"])
async def test_a_connection_that_ends_too_early(transport: Any, start: Any, head: bytes) -> None:
    async def cut(request: Any) -> Any:
        await request.stream.send_all(head)

    server = await start(cut)
    assert (await failure(transport, server.url)).code == "connection_lost"


async def test_the_proxy_is_named_and_left_out_for_loopback(
    transport: Any, start: Any, closed_port: Any, monkeypatch: Any, answer: Any
) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, f"http://user:hunter2@127.0.0.1:{closed_port}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    behind = Transport(insecure=True, clock=transport._clock, on_skew=lambda _: None)
    error = await failure(behind, "http://router.example")
    assert (error.code, error.hint.partition(" and")[0]) == ("connection_refused", "check HTTPS_PROXY")
    assert f"proxy 127.0.0.1:{closed_port}" in error.message
    assert "hunter2" not in error.message
    server = await start()
    assert await call(behind, server.url) == b""

    async def no(request: Any) -> Any:
        return answer(407, {}, b"")

    server.answer = no
    monkeypatch.setenv("https_proxy", server.url)
    monkeypatch.setenv("HTTPS_PROXY", server.url)
    tunnel = Transport(insecure=True, clock=transport._clock, on_skew=lambda _: None)
    error = await failure(tunnel, "https://router.example")
    assert error.code == "proxy_failed"
    await behind.aclose()
    await tunnel.aclose()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTPS_PROXY", "socks5://user:hunter2@proxy:1080"),
        ("all_proxy", "foo://user:hunter2@proxy"),
        ("HTTP_PROXY", "http://user:hunter2@[::1"),
        ("NO_PROXY", "[::1"),
    ],
)
def test_proxy_settings_of_no_use_are_a_matter_of_configuration(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in [n for n in os.environ if n.lower().endswith("_proxy")]:
        monkeypatch.delenv(other)
    monkeypatch.setenv(name, value)
    if "NO" in name:
        monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    with pytest.raises(AgentError) as caught:
        Transport(insecure=True, clock=SystemClock(), on_skew=lambda _: None)
    assert (caught.value.code, caught.value.exit_code) == ("proxy_invalid", 78)
    assert name in caught.value.message
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("127.evil.example", False),
        ("10.0.0.1", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert failures.is_loopback(host) is loopback
