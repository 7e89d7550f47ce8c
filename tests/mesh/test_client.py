import json
import socket
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import msgspec
import pytest
import trio
import zstandard
from msgspec import Raw

from xim_agent.clock import SystemClock
from xim_agent.errors import AgentError
from xim_agent.mesh import codec, failures
from xim_agent.mesh.client import MAX_ASSIGNMENT, MAX_IDENTITY
from xim_agent.mesh.messages import MAX_BODY, MAX_EVENTS, MAX_POLL_REPLY, EventsReply, Load, PollReply, PollRequest
from xim_agent.mesh.transport import Transport
from xim_agent.outcome import CODES, NOT_A_ROUTER, Action, RouterError

POLL = PollRequest("b", 1, "ready", 4, 0, [], None, 4, Load(), None, [])
FRAME = Raw(codec.encode_frame(1, 0, "data", b"x" * 4000))


def problem(answer: Any, status: int, code: str, **headers: str) -> Any:
    body = json.dumps({"code": code, "detail": f"because of {code}", "protocols": [2]}).encode()
    return answer(status, {"content-type": "application/problem+json", **headers}, body)


async def test_a_poll_and_what_every_request_carries(client: Any, start: Any, login: Any, answer: Any) -> None:
    async def reply(call: Any) -> Any:
        assert codec.decode_poll_request(call.body) == POLL
        body = zstandard.compress(codec.encode(PollReply(generation=3, idle_reason="x" * 2000)))
        return answer(headers={"content-encoding": "zstd", "set-cookie": "a=b"}, body=body)

    server = await start(reply)
    client.credentials = login(server.url)
    for _ in range(2):
        assert (await client.poll(POLL)).generation == 3
    for call in server.calls:
        assert (call.method, call.path) == ("POST", "/v1/work/poll")
        assert call.headers["xim-protocol"] == "1"
        assert call.headers["user-agent"].startswith("xerotier-xim-agent/")
        assert call.headers["authorization"] == "Bearer token-1"
        assert call.headers["accept-encoding"] == "zstd"
        assert call.headers["content-type"] == "application/vnd.msgpack"
        assert "cookie" not in call.headers
    assert server.connections == 1


async def test_a_peer_that_is_gone_is_noticed_by_the_kernel(
    transport: Transport, start: Any, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the router is called itself or by a proxy."""

    async def reply(call: Any) -> Any:
        return answer()

    server = await start(reply)
    monkeypatch.setenv("HTTP_PROXY", server.url)
    behind = Transport(insecure=True, clock=SystemClock(), on_skew=lambda skew: None)
    for caller, router in ((transport, server.url), (behind, "http://router.test")):
        async with caller.open("GET", caller.url(router, "/v1/assignment"), {}, None, 10) as opened:
            wire = opened.response.extensions["network_stream"].get_extra_info("socket")
            assert wire.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_USER_TIMEOUT)
            assert [wire.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [2, 1, 4000]
    await behind.aclose()


async def test_a_failure_closes_what_is_idle(transport: Transport, start: Any, answer: Any) -> None:
    """The path of one connection is the path of all: what it swallowed of one it swallows of the next."""
    silent = trio.Event()

    async def reply(call: Any) -> Any:
        if call.path == "/v1/silent":
            silent.set()
            await trio.sleep_forever()
        return answer()

    server = await start(reply)
    idle, other = (transport.url(server.url, path) for path in ("/v1/assignment", "/v1/silent"))
    async with trio.open_nursery() as nursery:

        async def fails() -> None:
            with pytest.raises(RouterError, match="silent"):
                await transport.call("GET", other, {}, limit=10, silence=0.5)

        nursery.start_soon(fails)
        await silent.wait()
        await transport.call("GET", idle, {}, limit=10)
        assert server.connections == 2
    await transport.call("GET", idle, {}, limit=10)
    assert server.connections == 3


async def test_events_are_compressed_and_counted(client: Any, start: Any, login: Any, answer: Any) -> None:
    async def reply(call: Any) -> Any:
        assert call.headers["content-encoding"] == "zstd"
        body = zstandard.ZstdDecompressor().decompress(call.body)
        assert codec.decode_events_request(body).frames == [FRAME]
        return answer(body=codec.encode(EventsReply(acked={1: 0})))

    server = await start(reply)
    client.credentials = login(server.url)
    assert (await client.events("b", [FRAME])).acked == {1: 0}
    assert client.statistics().bytes_sent < 200
    assert client.statistics().calls == 1


@pytest.mark.parametrize(
    ("status", "code", "action"),
    [
        (403, "agent_suspended", Action.WAIT),
        (410, "agent_removed", Action.REMOVED),
        (409, "identity_in_use", Action.CLONE),
        (400, "invalid_request", Action.FINAL),
        (429, "slow_down", Action.RETRY),
        (503, "restarting", Action.RETRY),
        (302, "moved", Action.RETRY),
        (418, "", Action.FINAL),
    ],
)
async def test_who_must_act(
    client: Any, start: Any, login: Any, answer: Any, status: int, code: str, action: Action
) -> None:
    async def reply(call: Any) -> Any:
        return problem(answer, status, code)

    server = await start(reply)
    client.credentials = login(server.url)
    with pytest.raises(RouterError) as error:
        await client.poll(POLL)
    assert error.value.action is action
    assert error.value.code == (code if code in CODES else f"http_{status}")
    assert code in error.value.message
    assert (error.value.hint == NOT_A_ROUTER) is (code == "")
    assert client.statistics().failures == {error.value.code: 1}
    assert len(server.calls) == 1


async def test_the_other_protocol_is_named(client: Any, start: Any, login: Any, answer: Any) -> None:
    async def reply(call: Any) -> Any:
        return problem(answer, 426, "protocol_unsupported")

    server = await start(reply)
    client.credentials = login(server.url)
    with pytest.raises(RouterError, match=r"router speaks \[2\], this agent \[1\]") as error:
        await client.poll(POLL)
    assert error.value.exit_code == 13


async def test_retry_after_and_skew(client: Any, start: Any, login: Any, answer: Any, skews: Any) -> None:
    waits = iter(["7", format_datetime(datetime.now(UTC) + timedelta(seconds=1009), usegmt=True), "soon"])
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=1000), usegmt=True)

    async def reply(call: Any) -> Any:
        return problem(answer, 503, "busy", date=date, **{"retry-after": next(waits)})

    server = await start(reply)
    client.credentials = login(server.url)
    found = []
    for _ in range(3):
        with pytest.raises(RouterError) as error:
            await client.poll(POLL)
        found.append(error.value.retry_after)
        assert error.value.date_skew == pytest.approx(1000, abs=3)
    assert found == [7, pytest.approx(9, abs=1), None]
    assert skews == [pytest.approx(1000, abs=3)] * 3


async def test_a_401_refreshes_and_repeats_once(client: Any, start: Any, login: Any, answer: Any) -> None:
    good = "token-2"

    async def reply(call: Any) -> Any:
        if call.headers["authorization"] != f"Bearer {good}":
            return problem(answer, 401, "token_expired")
        return answer(body=codec.encode(PollReply()))

    server = await start(reply)
    client.credentials = credentials = login(server.url)
    await client.poll(POLL)
    assert credentials.refusals == ["token-1"]
    good = "another"
    with pytest.raises(RouterError) as error:
        await client.poll(POLL)
    assert error.value.action is Action.RETRY
    assert credentials.refusals == ["token-1", "token-2"]
    assert len(server.calls) == 4


@pytest.mark.parametrize("code", ["credential_revoked", "credential_reused"])
async def test_a_refused_credential_is_for_identity_to_judge(
    client: Any, start: Any, login: Any, answer: Any, code: str
) -> None:
    good = "token-2"

    async def reply(call: Any) -> Any:
        if call.headers["authorization"] != f"Bearer {good}":
            return problem(answer, 403, code)
        return answer(204)

    server = await start(reply)
    client.credentials = credentials = login(server.url)
    assert await client.assignment() is None
    assert credentials.refusals == ["token-1"]
    good = "none"
    with pytest.raises(RouterError) as error:
        await client.assignment()
    assert (error.value.action, error.value.exit_code, error.value.code) == (Action.RETRY, 69, code)
    assert len(server.calls) == 4


async def test_a_router_cannot_make_up_codes_or_dates(client: Any, start: Any, login: Any, answer: Any) -> None:
    async def reply(call: Any) -> Any:
        date = "Mon, 01 Jan 99999999999 00:00:00 GMT"
        return problem(answer, 404, f"new_{len(server.calls)}", date=date, **{"retry-after": date})

    server = await start(reply)
    client.credentials = login(server.url)
    for _ in range(3):
        with pytest.raises(RouterError):
            await client.poll(POLL)
    assert client.statistics().failures == {"http_404": 3}


@pytest.mark.parametrize("date", ["Mon, 01 Jan 99999999999 00:00:00 GMT", "x", ""])
def test_a_date_that_is_none(date: str) -> None:
    assert failures.date_of({"date": date}) is None
    assert failures.retry_after({"retry-after": date}, 0.0) is None


async def test_a_lease_without_id_is_counted(client: Any, start: Any, login: Any, answer: Any) -> None:
    async def reply(call: Any) -> Any:
        return answer(body=msgspec.msgpack.encode({"leases": [{"request": "r"}], "generation": 4}))

    server = await start(reply)
    client.credentials = login(server.url)
    assert await client.poll(POLL) == PollReply(generation=4)
    assert client.statistics().failures == {"lease_malformed": 1}


CALLS: dict[str, tuple[Any, int | None]] = {  # with the most bytes of their replies; None: too many to send here
    "enroll": (lambda client, url: client.enroll(url, "proof", {}), MAX_IDENTITY),
    "refresh": (lambda client, url: client.refresh(url, "proof", {}), MAX_IDENTITY),
    "poll": (lambda client, url: client.poll(POLL), None),
    "events": (lambda client, url: client.events("b", [FRAME]), MAX_EVENTS),
    "assignment": (lambda client, url: client.assignment(), MAX_ASSIGNMENT),
    "body": (lambda client, url: client.lease_body("r"), MAX_BODY),
    "leave": (lambda client, url: client.leave(), MAX_IDENTITY),
}
SHAPED = ["enroll", "refresh", "poll", "events"]  # of the others any bytes are a reply; who asked judges them


@pytest.mark.parametrize("name", CALLS)
async def test_no_call_takes_more_than_its_bound_packed_or_not(
    client: Any, start: Any, login: Any, answer: Any, name: str
) -> None:
    call, limit = CALLS[name]
    bomb = zstandard.compress(bytes((limit or MAX_POLL_REPLY) + 1))
    replies = [({"content-encoding": "zstd"}, bomb), *([({}, bytes(limit + 1))] if limit else [])]
    replies.append(({"content-encoding": "zstd"}, zstandard.compress(b"x", 3) + b"junk"))
    left = list(replies)

    async def reply(_: Any) -> Any:
        return answer(200, *left.pop(0))

    server = await start(reply)
    client.credentials = login(server.url)
    for _ in replies:
        with pytest.raises(RouterError) as error:
            await call(client, server.url)
        assert error.value.action is Action.RETRY
    assert client.statistics().failures == {"reply_too_large": len(replies) - 1, "reply_malformed": 1}


@pytest.mark.parametrize("name", SHAPED)
@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, b"<html>welcome to the hotel</html>"),
        ({}, b""),
        ({}, b"\x81\xa5drain"),
        ({}, codec.encode([1])),
        ({}, b"[1]"),
        ({}, b"\xff\xfe"),
        ({}, b"[" * 60_000),
        ({}, b"\x91" * 60_000),
        ({"content-encoding": "zstd"}, b"garbage"),
        ({"content-encoding": "br"}, b"garbage"),
    ],
    ids=["html", "nothing", "cut", "list", "json list", "no text", "deep json", "deep", "no zstd", "other encoding"],
)
async def test_an_unreadable_reply_is_retried_and_counted(
    client: Any, start: Any, login: Any, answer: Any, name: str, headers: Any, body: Any
) -> None:
    async def reply(call: Any) -> Any:
        return answer(200, headers, body)

    server = await start(reply)
    client.credentials = login(server.url)
    with pytest.raises(RouterError) as error:
        await CALLS[name][0](client, server.url)
    assert error.value.action is Action.RETRY
    assert client.statistics().failures == {"reply_malformed": 1}


async def test_identity_calls(client: Any, start: Any, answer: Any) -> None:
    async def reply(call: Any) -> Any:
        assert call.headers["dpop"] == "proof"
        assert "authorization" not in call.headers
        return answer(201, body=json.dumps({"path": call.path, **json.loads(call.body)}).encode())

    server = await start(reply)
    assert await client.enroll(server.url, "proof", {"a": 1}) == {"path": "/v1/enroll", "a": 1}
    assert await client.refresh(server.url + "/", "proof", {}) == {"path": "/v1/enroll/refresh"}

    async def much(call: Any) -> Any:
        return answer(body=b"[" + b" " * 70_000)

    server.answer = much
    with pytest.raises(RouterError, match="more than 65536 bytes"):
        await client.enroll(server.url, "proof", {})


async def test_assignment_manifest_and_body(client: Any, start: Any, login: Any, answer: Any) -> None:
    async def reply(call: Any) -> Any:
        if call.path == "/v1/assignment":
            return answer(204) if len(server.calls) == 1 else answer(body=b"a.b.c\n")
        return answer(body=call.path.encode())

    server = await start(reply)
    client.credentials = login(server.url)
    assert await client.assignment() is None
    assert await client.assignment() == "a.b.c"
    assert await client.manifest("ab12") == b"/v1/models/manifests/ab12"
    assert await client.lease_body("../x y") == b"/v1/work/leases/..%2Fx%20y/body"


async def test_cancelling_a_held_poll_closes_its_connection(client: Any, start: Any, login: Any, answer: Any) -> None:
    arrived, gone = trio.Event(), trio.Event()

    async def hold(call: Any) -> Any:
        arrived.set()
        assert await call.stream.receive_some(1) == b""
        gone.set()

    server = await start(hold)
    client.credentials = login(server.url)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.poll, POLL)
        await arrived.wait()
        nursery.cancel_scope.cancel()
    with trio.fail_after(20):
        await gone.wait()

    async def reply(call: Any) -> Any:
        return answer(body=codec.encode(PollReply(generation=1)))

    server.answer = reply
    assert (await client.poll(POLL)).generation == 1


@pytest.mark.parametrize("url", ["http://router.example", "ftp://127.0.0.1", "http://[", "127.0.0.1:80"])
async def test_urls_that_are_refused(client: Any, login: Any, url: str) -> None:
    client.credentials = login(url)
    with pytest.raises(AgentError) as error:
        await client.poll(POLL)
    assert error.value.exit_code == 78


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_that_asks_for_the_token_elsewhere(
    client: Any, start: Any, login: Any, answer: Any, status: int
) -> None:
    """Nobody goes there, neither with a token nor with a join key; the place is named without what may be secret."""
    elsewhere = await start()
    target = f"{elsewhere.url.replace('//', '//user:hunter2@')}/v1/enroll?sig=hunter3#hunter4"

    async def away(call: Any) -> Any:
        return answer(status, {"location": target})

    server = await start(away)
    client.credentials = login(server.url)
    calls = (
        lambda: client.enroll(server.url, "proof", {"join_key": "xjk"}),
        lambda: client.refresh(server.url, "proof", {"refresh_token": "xrt"}),
        lambda: client.poll(POLL),
        lambda: client.events("boot", []),
        lambda: client.assignment(),
        lambda: client.manifest("0" * 64),
    )
    for call in calls:
        with pytest.raises(RouterError) as error:
            await call()
        assert (error.value.action, error.value.code) == (Action.RETRY, f"http_{status}")
        assert f"location: {elsewhere.url}/v1/enroll)" in error.value.message
    assert len(server.calls) == len(calls)
    assert elsewhere.connections == 0


async def test_no_cookie_of_a_router_comes_back(client: Any, start: Any, login: Any, answer: Any) -> None:
    async def sticky(call: Any) -> Any:
        return answer(204, {"set-cookie": "session=1; Path=/"})

    server = await start(sticky)
    client.credentials = login(server.url)
    for _ in range(2):
        await client.assignment()
    assert "cookie" not in server.calls[1].headers
