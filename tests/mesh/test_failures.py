"""Each way not to get a reply has its own name, and says where."""

import datetime
import ipaddress
import socket
import ssl
from typing import Any

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from xim_agent.mesh import failures
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


@pytest.fixture
def tls(tmp_path: Any) -> ssl.SSLContext:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = tmp_path / "pem"
    path.write_bytes(pem + cert.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context


async def test_a_certificate_that_is_not_trusted(client: Any, transport: Any, login: Any, start: Any, tls: Any) -> None:
    server = await start(tls=tls)
    client.credentials = login(server.url)
    with pytest.raises(RouterError, match="is not trusted") as error:
        await client.assignment()
    assert error.value.code == "tls_failed"
    assert "SSL_CERT_FILE" in error.value.hint
    assert await call(transport, server.url) == b""  # --insecure


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
    assert error.code == "connection_refused"
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
