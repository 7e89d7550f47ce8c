"""Calls over a connection that httpx has opened: what is plain is read here, and all else ends as httpx ends it."""

import ssl
from typing import Any

import h11
import pytest
import trio
import trio.testing
from fakes.tls import certificate, server_context
from hypothesis import given
from hypothesis import strategies as st

from xim_agent.clock import SystemClock
from xim_agent.mesh import codec, exchange
from xim_agent.mesh.client import RouterClient
from xim_agent.mesh.messages import EventsReply, Load, PollReply, PollRequest
from xim_agent.mesh.transport import Transport
from xim_agent.outcome import RouterError

POLL = PollRequest("b", 1, "ready", 4, 0, [], None, 4, Load(), None, [])
BODY = codec.encode(EventsReply(acked={1: 7}))
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/vnd.msgpack\r\n"
SIZED = HEAD + b"content-length: %d\r\n\r\n" % len(BODY)
PROBLEM = b'{"code": "slow_down", "detail": "later"}'

line = st.sampled_from(
    [
        b"content-length: 3", b"Content-Length:3", b"content-length: 5", b"content-length: 3, 3", b"content-length: -1",
        b"transfer-encoding: chunked", b"connection: close", b"connection: Keep-Alive", b"date: today ", b"x:\ty",
        b"x: \xff", b"x : y", b"x", b": y", b" folded", b"x: a\x00b", b"server:", b"x: a:b", b"x_y: 1",
        b"content-length:",
    ]
)  # fmt: skip
start_line = st.sampled_from(
    [b"HTTP/1.1 200 OK", b"HTTP/1.1 200", b"HTTP/1.1 200 ", b"HTTP/1.0 200 OK", b"HTTP/1.1 204 No", b"HTTP/1.1 100 Go",
     b"HTTP/1.1 2000 OK", b"HTTP/1.1 503 No", b"HTTP/1.1  200 OK", b""]
)  # fmt: skip
newline = st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\n"])


def by_h11(data: bytes) -> tuple[dict[str, str], bytes]:
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="POST", target="/", headers=[("host", "x"), ("content-length", "0")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    head, body = connection.next_event(), b""
    assert isinstance(head, h11.Response)
    assert head.status_code == 200
    while isinstance(event := connection.next_event(), h11.Data):
        body += bytes(event.data)
    assert isinstance(event, h11.EndOfMessage)
    assert connection.their_state is h11.DONE, "the connection can be used again"
    assert len({name for name, _ in head.headers}) == len(list(head.headers))
    return {name.decode(): value.decode() for name, value in head.headers}, body


@given(start_line, st.lists(line, max_size=5), newline, st.binary(max_size=2))
def test_what_is_plain_is_what_h11_reads(start: bytes, lines: list[bytes], end: bytes, more: bytes) -> None:
    data = end.join([start, *lines, b"", b""]) + b"abcde"
    found = exchange.plain(data + more)
    if found is not None:
        headers, begin, until = found
        assert by_h11(data[:until]) == (headers, data[begin:until])


def test_what_is_plain() -> None:
    assert exchange.plain(SIZED + BODY) == by_plain(len(SIZED))
    assert exchange.plain(SIZED[:-1]) is None


@pytest.mark.parametrize(
    "more",
    [b"content-length: 3", b"x: 1\r\nX: 2", b"connection: close", b"transfer-encoding: chunked", b"x : 1", b"x: \xff"],
)
def test_what_is_not_plain(more: bytes) -> None:
    assert exchange.plain(SIZED[:-2] + more + b"\r\n\r\n" + BODY) is None


def by_plain(at: int) -> tuple[dict[str, str], int, int]:
    return {"content-type": "application/vnd.msgpack", "content-length": str(len(BODY))}, at, at + len(BODY)


def test_a_request_is_what_h11_reads() -> None:
    data = exchange.request("POST", b"/v1/x?y", b"router:1", {"authorization": "Bearer t", "accept": "*/*"}, b"body")
    server = h11.Connection(h11.SERVER)
    server.receive_data(data)
    head = server.next_event()
    assert isinstance(head, h11.Request)
    assert (head.method, head.target) == (b"POST", b"/v1/x?y")
    assert dict(head.headers) == {
        b"host": b"router:1", b"authorization": b"Bearer t", b"accept": b"*/*", b"content-length": b"4",
    }  # fmt: skip
    body = server.next_event()
    assert isinstance(body, h11.Data)
    assert bytes(body.data) == b"body"
    assert isinstance(server.next_event(), h11.EndOfMessage)


async def outcome(client: RouterClient) -> object:
    try:
        return (await client.events("b", [])).acked
    except RouterError as error:
        return error.code, error.status, error.message, error.hint, error.action


ODD = {
    "plain": (SIZED + BODY,),
    "in pieces": (SIZED, BODY[:2], BODY[2:]),
    "head in pieces": (SIZED[:30], SIZED[30:] + BODY),
    "chunked": (HEAD + b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY),),
    "after a 103": (b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + SIZED + BODY,),
    "closes": (HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY,),
    "to the end": (HEAD + b"connection: close\r\n\r\n" + BODY,),
    "one byte more": (SIZED + BODY + b"!",),
    "problem": (b"HTTP/1.1 429 x\r\ncontent-length: %d\r\nretry-after: 3\r\n\r\n" % len(PROBLEM) + PROBLEM,),
    "problem cut": (b"HTTP/1.1 503 x\r\ncontent-length: 99\r\n\r\n{",),
    "cut": (SIZED + BODY[:2],),
    "cut head": (SIZED[:20],),
    "nothing": (),
    "another language": (b"SSH-2.0-x\r\n\r\n",),
    "too large": (HEAD + b"content-length: 2000000\r\n\r\n",),
    "not MessagePack": (HEAD + b"content-length: 1\r\n\r\n\xc1",),
    "unknown encoding": (HEAD + b"content-encoding: br\r\ncontent-length: 1\r\n\r\nx",),
}


@pytest.mark.parametrize("name", ODD)
async def test_a_reply_ends_as_it_does_without_a_line(
    client: Any, start: Any, login: Any, answer: Any, name: str
) -> None:
    asked = 0

    async def reply(call: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked in (1, 3):  # the first call of a connection, and the second of another one
            for part in ODD[name]:
                await call.stream.send_all(part)
                await trio.sleep(0.005)
            return None
        return answer(body=BODY)

    server = await start(reply)
    client.credentials = login(server.url)
    found = []
    for _ in range(4):
        found.append(await outcome(client))
        await trio.testing.wait_all_tasks_blocked(0.01)  # a connection that the server ends is closed by now
    assert found[1::2] == [{1: 7}] * 2
    assert found[2] == found[0]
    assert server.connections == 3


async def test_bytes_after_a_reply_are_of_no_later_one(client: Any, start: Any, login: Any, answer: Any) -> None:
    async def reply(call: Any) -> Any:
        if len(server.calls) != 2:
            return answer(body=BODY)
        # The connection stays open, and would serve the next call.
        await call.stream.send_all(SIZED + BODY + b"!")
        while await server.one(call.stream, h11.Connection(h11.SERVER)):
            pass
        return None

    server = await start(reply)
    client.credentials = login(server.url)
    for connections in (1, 1, 2, 2):
        assert await outcome(client) == {1: 7}
        assert server.connections == connections


async def test_one_connection_for_each_call_at_a_time(client: Any, start: Any, login: Any, answer: Any) -> None:
    async def reply(call: Any) -> Any:
        await trio.sleep(0.005)
        return answer(body=BODY)

    server = await start(reply)
    client.credentials = login(server.url)
    for _ in range(5):
        async with trio.open_nursery() as calls:
            for _ in range(3):
                calls.start_soon(outcome, client)
    assert len(server.calls) == 15
    assert server.connections == 3
    statistics = client.statistics()
    assert (statistics.calls, statistics.failures) == (15, {})
    assert statistics.bytes_received == 15 * len(BODY)


async def test_silence_and_cancellation_end_the_connection(client: Any, start: Any, login: Any, answer: Any) -> None:
    async def reply(call: Any) -> Any:
        if len(server.calls) in (2, 4):
            await call.stream.send_all(SIZED + BODY[:1])
            await trio.sleep_forever()
        return answer(body=BODY)

    server = await start(reply)
    client.credentials = login(server.url)
    assert await outcome(client) == {1: 7}
    with pytest.raises(RouterError, match="was silent for too long") as error:
        await client._work("/v1/work/events", b"", 1000, codec.decode_events_reply, 0.05)
    assert error.value.code == "silence"
    assert await outcome(client) == {1: 7}
    with trio.move_on_after(0.05) as scope:
        await outcome(client)
    assert scope.cancelled_caught
    assert await outcome(client) == {1: 7}
    assert server.connections == 3


async def test_what_is_too_large_is_not_waited_for(client: Any, start: Any, login: Any, answer: Any) -> None:
    async def reply(call: Any) -> Any:
        if len(server.calls) == 1:
            return answer(body=BODY)
        await call.stream.send_all(HEAD + b"content-length: 1000000000\r\n\r\n" + b"x" * 2000)
        await trio.sleep_forever()
        return None

    server = await start(reply)
    client.credentials = login(server.url)
    assert await outcome(client) == {1: 7}
    with pytest.raises(RouterError) as error:
        await client._work("/v1/work/events", b"", 1000, codec.decode_events_reply, 0.5)
    assert error.value.code == "reply_too_large"
    assert server.connections == 1


async def test_a_connection_that_was_closed_meanwhile_is_not_used(
    client: Any, start: Any, login: Any, answer: Any
) -> None:
    async def reply(call: Any) -> Any:
        if len(server.calls) == 2:
            await call.stream.send_all(SIZED + BODY)
            return None
        return answer(body=BODY)

    server = await start(reply)
    client.credentials = login(server.url)
    for _ in range(4):
        assert await outcome(client) == {1: 7}
        await trio.testing.wait_all_tasks_blocked(0.01)
    assert server.connections == 2


async def test_a_token_that_cannot_be_sent(client: Any, start: Any, login: Any, answer: Any) -> None:
    async def reply(call: Any) -> Any:
        return answer(body=BODY)

    server = await start(reply)
    client.credentials = login(server.url)
    client.credentials.serial = "1\r\nx: y"
    without = await outcome(client)
    client.credentials.serial = 1
    assert await outcome(client) == {1: 7}
    client.credentials.serial = "1\r\nx: y"
    assert await outcome(client) == without
    assert [call.headers["authorization"] for call in server.calls] == ["Bearer token-1"]


async def test_over_tls(start: Any, login: Any, answer: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def reply(call: Any) -> Any:
        return answer(body=codec.encode(PollReply(generation=4)))

    chain, key = certificate(tmp_path, host="127.0.0.1")
    context = server_context(chain, key)
    # A ticket that comes with the first reply looks like the end of the connection, to httpcore too.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    monkeypatch.setenv("SSL_CERT_FILE", str(chain))
    server = await start(reply, tls=context)
    async with RouterClient(insecure=False, clock=SystemClock(), on_skew=lambda _: None) as client:
        client.credentials = login(server.url)
        for _ in range(3):
            assert (await client.poll(POLL)).generation == 4
    assert (len(server.calls), server.connections) == (3, 1)


async def test_a_proxy_that_only_forwards_gets_every_call_as_such(
    start: Any, login: Any, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def reply(call: Any) -> Any:
        return answer(body=BODY)

    server = await start(reply)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", server.url)
    transport = Transport(insecure=True, clock=SystemClock(), on_skew=lambda _: None)
    url = transport.url("http://router.example", "/v1/work/events")
    for _ in range(3):
        assert (await transport.post(url, {}, body=b"x", limit=1000, silence=1)).body == BODY
    assert [call.path for call in server.calls] == ["http://router.example/v1/work/events"] * 3
    await transport.aclose()
