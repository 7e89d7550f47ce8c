from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from fakes.tls import certificate, server_context
from hypothesis import given
from hypothesis import strategies as st

from xim_agent.clock import SystemClock
from xim_agent.mesh.blob import _extent, open_blob
from xim_agent.mesh.transport import Transport
from xim_agent.outcome import Action, RouterError


async def read(client: Any, digest: str = "ab", offset: int = 0) -> tuple[int, int, int | None, bytes]:
    async with client.blob(digest, offset) as reply:
        body = b"".join([chunk async for chunk in reply.chunks()])
        return reply.status, reply.start, reply.total, body


async def test_whole_ranged_and_not_ranged(client: Any, start: Any, login: Any, answer: Any) -> None:
    async def reply(call: Any) -> Any:
        if call.headers.get("range") == "bytes=3-":
            return answer(206, {"content-range": "bytes 3-9/10"}, b"defghij")
        return answer(200, body=b"abcdefghij")

    server = await start(reply)
    client.credentials = login(server.url)
    assert await read(client) == (200, 0, 10, b"abcdefghij")
    assert await read(client, offset=3) == (206, 3, 10, b"defghij")
    assert await read(client, offset=5) == (200, 0, 10, b"abcdefghij")
    assert "range" not in server.calls[0].headers
    assert server.calls[0].headers["accept-encoding"] == "identity"


async def test_beyond_the_end(client: Any, start: Any, login: Any, answer: Any) -> None:
    async def reply(call: Any) -> Any:
        return answer(416)

    server = await start(reply)
    client.credentials = login(server.url)
    with pytest.raises(RouterError) as error:
        await read(client, offset=99)
    assert (error.value.status, error.value.action) == (416, Action.FINAL)


@pytest.mark.parametrize(
    "headers",
    [{"content-encoding": "gzip"}, {"content-range": "bytes */10"}, {}],
)
async def test_replies_that_make_no_sense(client: Any, start: Any, login: Any, answer: Any, headers: Any) -> None:
    async def reply(call: Any) -> Any:
        return answer(206, headers, b"x")

    server = await start(reply)
    client.credentials = login(server.url)
    with pytest.raises(RouterError) as error:
        await read(client, offset=1)
    assert error.value.action is Action.RETRY


async def test_a_body_that_ends_too_early(client: Any, start: Any, login: Any) -> None:
    async def cut(call: Any) -> Any:
        await call.stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc")

    server = await start(cut)
    client.credentials = login(server.url)
    async with client.blob("ab", 0) as reply:
        chunks = reply.chunks()
        assert await anext(chunks) == b"abc"
        with pytest.raises(RouterError) as error:
            await anext(chunks)
    assert error.value.code == "connection_lost"


async def test_leaving_early_closes_the_connection(client: Any, start: Any, login: Any) -> None:
    gone = trio.Event()

    async def flood(call: Any) -> Any:
        while True:
            await call.stream.send_all(bytes(10_000))

    async def endless(call: Any) -> Any:
        await call.stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n")
        with pytest.raises(trio.BrokenResourceError):
            await flood(call)
        gone.set()

    server = await start(endless)
    client.credentials = login(server.url)
    async with client.blob("ab", 0) as reply:
        await anext(reply.chunks())
    with trio.fail_after(20):
        await gone.wait()


async def test_a_redirect_to_another_origin_carries_no_credentials(
    client: Any, start: Any, login: Any, answer: Any
) -> None:
    async def stored(call: Any) -> Any:
        return answer(206, {"content-range": "bytes 1-2/3"}, b"bc")

    async def redirect(call: Any) -> Any:
        if call.path == "/v1/models/blobs/ab":
            return answer(307, {"location": "/second", "set-cookie": "s=1"})
        return answer(302, {"location": f"{storage.url}/blob?sig=1"})

    storage, server = await start(stored), await start(redirect)
    client.credentials = login(server.url)
    assert await read(client, offset=1) == (206, 1, 3, b"bc")
    second, third = server.calls[1], storage.calls[0]
    assert second.headers["authorization"] == "Bearer token-1"
    assert not {"authorization", "xim-protocol", "cookie"} & third.headers.keys()
    assert (third.path, third.headers["range"]) == ("/blob?sig=1", "bytes=1-")


async def test_redirects_that_are_not_followed(client: Any, start: Any, login: Any, answer: Any) -> None:
    location = "/again"

    async def redirect(call: Any) -> Any:
        return answer(302, {"location": location})

    server = await start(redirect)
    client.credentials = login(server.url)
    with pytest.raises(RouterError, match="more than 5 redirects"):
        await read(client)
    assert len(server.calls) == 6
    location = "file:///etc/passwd"
    with pytest.raises(RouterError, match="redirected from http to file"):
        await read(client)


async def test_nobody_is_sent_from_https_to_http(transport: Any, start: Any, answer: Any, tmp_path: Path) -> None:
    async def never(call: Any) -> Any:
        return answer(body=b"abc")

    async def redirect(call: Any) -> Any:
        return answer(302, {"location": open_.url})

    open_ = await start(never)
    server = await start(redirect, server_context(*certificate(tmp_path / "tls")))
    with pytest.raises(RouterError, match="redirected from https to http") as error:
        async with open_blob(transport, httpx.URL(server.url), {"authorization": "secret"}, 0):
            pass
    assert (error.value.code, error.value.action) == ("redirect_refused", Action.RETRY)
    assert not open_.calls


NUMBER = st.from_regex(r"[0-9٠-٩]{0,25}", fullmatch=True) | st.integers().map(str) | st.just("9" * 5000) | st.just("*")
RANGE = st.text(max_size=30) | st.tuples(NUMBER, NUMBER, NUMBER).map(lambda t: "bytes {}-{}/{}".format(*t))


@given(st.sampled_from([200, 206]), NUMBER | st.text(max_size=10), RANGE)
def test_nothing_but_numbers_or_a_refusal_comes_of_headers(status: int, length: str, span: str) -> None:
    transport = Transport(insecure=True, clock=SystemClock(), on_skew=lambda _: None)
    headers = [(b"content-length", length.encode()), (b"content-range", span.encode())]
    response = httpx.Response(status, headers=headers, request=httpx.Request("GET", "http://x/"))
    try:
        start, total = _extent(transport, response)
    except RouterError:
        assert status == 206
        return
    given = [int(word) for word in [length, *span.removeprefix("bytes ").replace("/", "-").split("-")] if _digits(word)]
    assert start in (0, *given)
    assert total in (None, *given)


def _digits(word: str) -> bool:
    return word.isascii() and word.isdecimal() and len(word) <= 18


async def test_a_401_is_refreshed_before_the_body(client: Any, start: Any, login: Any, answer: Any) -> None:
    async def reply(call: Any) -> Any:
        if call.headers["authorization"] == "Bearer token-1":
            return answer(401, {}, b'{"code": "token_invalid"}')
        return answer(body=b"ok")

    server = await start(reply)
    client.credentials = credentials = login(server.url)
    assert (await read(client))[3] == b"ok"
    assert credentials.refusals == ["token-1"]
