import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from fakes.garbage import watched
from hypothesis import given
from hypothesis import strategies as st

from xim_agent.engine.client import EngineClient
from xim_agent.engine.salt import PATHS, salt, salted

CHAT = "/v1/chat/completions"
OURS = hmac.new(b"secret", b"tenant", hashlib.sha256).hexdigest()
MEMBER = b'"cache_salt":"%s"' % OURS.encode()


@pytest.mark.parametrize(
    ("body", "changed"),
    [
        (b"{}", b"{" + MEMBER + b"}"),
        (b" {\n } ", b" {" + MEMBER + b"\n } "),
        (b'{ "a": 1.50}', b"{" + MEMBER + b', "a": 1.50}'),
        (b'{"a": NaN, "b": "\\ud800"}', b"{" + MEMBER + b',"a": NaN, "b": "\\ud800"}'),
        (b'{"x": {"cache_salt": "theirs"}}', b"{" + MEMBER + b',"x": {"cache_salt": "theirs"}}'),
        (b'{"cache_salt": null }\n', b'{"cache_salt": null ,' + MEMBER + b"}"),
    ],
)
def test_one_member_more_and_all_else_as_it_was(body: bytes, changed: bytes) -> None:
    assert salted("secret", "tenant", CHAT, body) == changed


@pytest.mark.parametrize(
    "body",
    [
        b'{"cache_salt": "theirs"}', b'{"cache\\u005fsalt": "theirs"}', b'{"cache_salt": "theirs", "a": NaN}',
        b'{"cache_salt": ""}', b"", b"[1]", b'"{}"', b"{", b"{}{}", b"\xff{}", '{"a": 1}'.encode("utf-16"),
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)  # fmt: skip
def test_with_a_salt_or_without_an_object_it_passes_unchanged(body: bytes) -> None:
    assert salted("secret", "tenant", CHAT, body) == body


def test_other_paths_pass_unchanged() -> None:
    assert salted("secret", "tenant", "/v1/embeddings", b"{}") == b"{}"
    assert all(salted("secret", "tenant", path, b"{}") != b"{}" for path in PATHS)


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.dictionaries(st.text() | st.just("cache_salt"), VALUES), st.sampled_from([None, 2]), st.booleans())
def test_python_reads_the_same_members_and_a_salt(
    members: dict[str, Any], indent: int | None, ascii_only: bool
) -> None:
    body = json.dumps(members, indent=indent, ensure_ascii=ascii_only).encode()
    read = json.loads(salted("secret", "tenant", CHAT, body))
    kept = members.get("cache_salt")
    assert repr(read) == repr(read | {"cache_salt": OURS if kept is None else json.loads(json.dumps(kept))})
    assert repr({k: v for k, v in read.items() if k != "cache_salt"}) == repr(
        {k: v for k, v in json.loads(body).items() if k != "cache_salt"}
    )


def test_tenants_and_secrets_have_salts_of_their_own() -> None:
    assert len({salt("a", "x"), salt("a", "y"), salt("b", "x")}) == 3


async def sent(client: EngineClient, socket: Path, **tenant: str) -> bytes:
    """What an engine on `socket` gets for a body of `{}`."""
    got = bytearray()

    async def answer(stream: trio.SocketStream) -> None:
        while not got.endswith(b"}"):
            got.extend(await stream.receive_some())
        await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    with trio.socket.socket(trio.socket.AF_UNIX) as listener:
        await listener.bind(str(socket))
        listener.listen(1)
        client.attach(str(socket))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, answer, [trio.SocketListener(listener)])
            with trio.fail_after(5):
                async with client.open(CHAT, {}, b"{}", **tenant) as reply:
                    assert reply.status == 200
            nursery.cancel_scope.cancel()
    head, body = bytes(got).split(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head.lower()
    return body


async def test_the_client_salts_for_a_tenant_when_there_is_a_secret(runtime: Path) -> None:
    assert await sent(EngineClient("secret"), runtime / "1", tenant="tenant") == b"{" + MEMBER + b"}"
    assert await sent(EngineClient("secret"), runtime / "2") == b"{}"
    assert await sent(EngineClient(), runtime / "3", tenant="tenant") == b"{}"


async def test_the_salted_copy_is_gone_once_it_is_sent(runtime: Path, nursery: trio.Nursery) -> None:
    """The request's own body stays, for its mark (`poison`)."""
    body = json.dumps({"prompt": "x" * (8 << 20)}).encode()
    before_the_head: list[list[str]] = []

    async def answer(stream: trio.SocketStream) -> None:
        last = b""
        while not last.endswith(b"}"):
            last = await stream.receive_some()
        await trio.testing.wait_all_tasks_blocked()
        before_the_head.append(kept())
        await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n")

    client = EngineClient("secret")
    with trio.socket.socket(trio.socket.AF_UNIX) as listener, watched(len(body)) as kept:
        await listener.bind(str(runtime / "s"))
        listener.listen(1)
        nursery.start_soon(trio.serve_listeners, answer, [trio.SocketListener(listener)])
        client.attach(str(runtime / "s"))
        with trio.fail_after(10):
            async with client.open(CHAT, {}, body, tenant="tenant"):
                assert before_the_head == [[]]
                assert kept() == []
        nursery.cancel_scope.cancel()
