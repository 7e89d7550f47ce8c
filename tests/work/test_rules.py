"""The pure rules: what is taken, how long it holds, what polls say, how a cut answer looks."""

import math
from typing import Any

import h11
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xim_agent.mesh.messages import MAX_BODY, SERVED_PATHS, Condition, Lease, OddLease, Progress
from xim_agent.work import capacity, lease
from xim_agent.work.clone import clone
from xim_agent.work.tail import TAIL_BYTES, Tail, stream_error

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def make_lease(**more: Any) -> Lease:
    base: dict[str, Any] = {
        "id": 1, "request": "r", "method": "POST", "path": "/v1/completions", "headers": {}, "body": b"{}",
        "stream": True, "tenant": "t", "deadline_ms": 1000, "credit": 10,
    }  # fmt: skip
    return Lease(**(base | more))


@pytest.mark.parametrize(
    ("more", "state", "code", "retryable"),
    [
        ({}, {}, None, None),
        ({"method": "GET"}, {}, "invalid_request", False),
        ({"path": "/v1/completions/"}, {}, "invalid_request", False),
        ({"path": "/metrics"}, {}, "invalid_request", False),
        ({"path": "/v1/completions?x=1"}, {}, "invalid_request", False),
        ({"body": bytes(MAX_BODY + 1)}, {}, "invalid_request", False),
        ({"body": None}, {}, None, None),
        ({"body": bytes(MAX_BODY)}, {}, None, None),
        ({"method": "post"}, {}, "invalid_request", False),
        ({"path": "/V1/completions"}, {}, "invalid_request", False),
        ({"path": "//v1/completions"}, {}, "invalid_request", False),
        ({"path": "/v1/completions\r\nx: y"}, {}, "invalid_request", False),
        ({"headers": {"accept": "a\r\nx: y"}}, {}, "invalid_request", False),
        ({"headers": {"X-SLO-\n": "a"}}, {}, "invalid_request", False),
        ({"headers": {"x-slo-name": "\u00fc"}}, {}, "invalid_request", False),
        ({"headers": {"x-slo-name": " a"}}, {}, "invalid_request", False),
        ({"headers": {"x-slo-name": "a\u00fcb"}}, {}, "invalid_request", False),
        ({"headers": {"x-slo-name": "a\x7fb"}}, {}, "invalid_request", False),
        ({"headers": {"accept": "a" * 8193}}, {}, "invalid_request", False),
        ({"headers": {"accept": "a\tb" + " " * 8000 + "c"}}, {}, None, None),
        ({"headers": {"cookie": "not passed on\r\n"}}, {}, None, None),
        ({}, {"room": 0}, "engine_overloaded", True),
        ({}, {"ready": False}, "engine_overloaded", True),
        ({}, {"draining": True, "ready": False}, "draining", True),
        ({"path": "/x"}, {"draining": True}, "invalid_request", False),
    ],
)
def test_refusals(more: Any, state: Any, code: str | None, retryable: bool | None) -> None:
    error = lease.refusal(make_lease(**more), **({"room": 1, "ready": True, "draining": False} | state))
    assert (error and error.code, error and error.retryable) == (code, retryable)


words = st.text(max_size=12) | st.from_regex(r"[A-Za-z-]{0,6}[\x00-\xff]{0,3}", fullmatch=True)
leases = st.builds(
    make_lease,
    method=st.sampled_from(["POST", "GET", "", "post", "POST "]) | words,
    path=st.sampled_from([*SERVED_PATHS, "/metrics", "/v1/models", ""]) | words,
    headers=st.dictionaries(
        st.sampled_from(["accept", "Traceparent", "x-slo-", "X-SLO-a"]) | words.map("x-slo-{}".format), words
    ),
    body=st.none() | st.binary(max_size=9),
)


@settings(max_examples=300)
@given(leases, st.integers(-2, 2), st.booleans(), st.booleans())
def test_whatever_a_lease_says_it_is_taken_or_refused_by_name(
    asked: Lease, room: int, ready: bool, draining: bool
) -> None:
    error = lease.refusal(asked, room=room, ready=ready, draining=draining)
    if error is not None:
        assert error.code in ("invalid_request", "draining", "engine_overloaded")
        assert error.retryable is (error.code != "invalid_request")
        assert len(error.message) < 1000
        return
    assert (asked.method, asked.path in SERVED_PATHS) == ("POST", True)
    assert (room > 0, ready, draining) == (True, True, False)
    sent = lease.request_headers(asked.headers, asked.request)
    # As they go to the engine: nothing in them makes a header of its own, and h11 would refuse what is none.
    lines = [(b"host", b"engine"), *((name.encode(), value.encode("ascii")) for name, value in sent.items())]
    data = h11.Connection(h11.CLIENT).send(h11.Request(method="POST", target=asked.path, headers=lines))
    assert data is not None
    assert data.count(b"\r\n") == 2 + len(lines)


def test_a_lease_that_could_not_be_read_is_refused_with_its_flaw() -> None:
    odd = OddLease(1, "", "", "", {}, None, False, "", 0, 0, flaw="Expected `int` - at `$.credit`")
    error = lease.refusal(odd, room=0, ready=False, draining=True)
    assert error is not None
    assert (error.code, error.retryable) == ("invalid_request", False)
    assert "$.credit" in error.message


def at(start: Any, **more: Any) -> Any:
    return clone({"address": "10.0.0.9", "start": start, **more}, 1_700_000_000.0)


@pytest.mark.parametrize(
    "start", [None, "soon", True, math.inf, -math.inf, math.nan, 1_700_000_000_123, 10**400, 0, -5, [1], {}]
)
def test_a_clone_whose_start_is_no_time(start: Any) -> None:
    assert at(start) == clone({"address": "10.0.0.9"}, 0.0)
    assert at(start).later is None
    assert at(1_600_000_000, yours=start).later is False


def test_which_clone_is_later() -> None:
    assert at(1_800_000_000).later is True
    assert at(1_800_000_000, yours=1_900_000_000.5).later is False
    assert at(1_600_000_000).later is False
    assert at(1_900_000_000).message == "this identity also runs at 10.0.0.9, since 2030-03-17 17:46:40 UTC"


def test_every_path_of_the_list_is_served() -> None:
    assert len(SERVED_PATHS) == 8
    for path in SERVED_PATHS:
        assert lease.refusal(make_lease(path=path), room=1, ready=True, draining=False) is None


def test_headers() -> None:
    asked = {
        "Content-Type": "a",
        "Accept": "b",
        "x-slo-tier": "c",
        "Authorization": "no",
        "host": "no",
        "Traceparent": PARENT,
        "tracestate": "d",
    }
    passed = {"content-type": "a", "accept": "b", "x-slo-tier": "c", "traceparent": PARENT, "tracestate": "d"}
    assert lease.request_headers(asked, "r") == passed
    assert set(lease.request_headers({}, "r")) == {"traceparent"}
    given = {"Content-Type": "a", "content-length": "1", "date": "x", "server": "u", "Connection": "close, X-Hop",
             "x-hop": "1", "transfer-encoding": "chunked", "x-request-id": "7"}  # fmt: skip
    assert lease.reply_headers(given) == {"content-type": "a", "x-request-id": "7"}


@given(st.lists(st.integers(0, 40)))
def test_ids_are_remembered_as_ranges(ids: list[int]) -> None:
    seen = lease.IdSet()
    for one in ids:
        seen.add(one)
    assert [i for i in range(-1, 42) if i in seen] == sorted(set(ids))
    gaps = sum(1 for i in set(ids) if i + 1 not in set(ids))
    assert len(seen._starts) == len(seen._ends) == gaps


def test_a_lease_holds_from_the_last_answered_call() -> None:
    leases = lease.Leases()
    assert leases.receive(make_lease(id=1, ttl_ms=10_000), 100.0)
    assert leases.receive(make_lease(id=2, ttl_ms=30_000), 100.0)
    assert not leases.receive(make_lease(id=1), 101.0)
    leases.renew([1, 7], 105.0)
    leases.renew([1], 103.0)  # an answer that came late says nothing about later
    assert leases.lapsed(115.0) == []
    assert leases.lapsed(115.1) == [1]
    assert leases.shortest_ttl() == 10.0
    leases.settle(1)
    assert (leases.held(), leases.shortest_ttl(), len(leases)) == ([2], 30.0, 1)
    assert not leases.receive(make_lease(id=1), 200.0)


def view(**more: Any) -> capacity.View:
    base: dict[str, Any] = {
        "ready": True, "degraded": False, "draining": False, "closed": False, "ceiling": 4, "running": 1,
        "health": (), "progress": None,
    }  # fmt: skip
    return capacity.View(**(base | more))


@pytest.mark.parametrize(
    ("more", "phase", "free"),
    [
        ({}, "ready", 3),
        ({"running": 9}, "ready", 0),
        ({"closed": True}, "ready", 0),
        ({"ready": False}, "starting", 0),
        ({"ready": False, "degraded": True}, "degraded", 0),
        ({"draining": True}, "draining", 0),
        ({"draining": True, "degraded": True}, "draining", 0),
    ],
)
def test_phase_and_capacity(more: Any, phase: str, free: int) -> None:
    assert (view(**more).phase, view(**more).capacity) == (phase, free)


def test_when_a_poll_is_replaced() -> None:
    progress = Progress("fetch", 1, 2, 1.0)
    assert capacity.must_replace(view(), view(draining=True))
    assert capacity.must_replace(view(running=4), view(running=3))
    assert capacity.must_replace(view(), view(closed=True))
    assert not capacity.must_replace(view(running=3), view(running=1))
    assert not capacity.must_replace(view(), view(progress=progress))
    assert capacity.may_replace(view(), view(progress=progress))
    assert capacity.may_replace(view(), view(health=(Condition("a", "b", 1.0),)))
    assert not capacity.may_replace(view(), view())


def test_how_long_a_poll_may_be_held() -> None:
    assert capacity.wait_ms(view(), sure=True, shortest_ttl=None) == 25_000
    assert capacity.wait_ms(view(), sure=True, shortest_ttl=30.0) == 10_000
    assert capacity.wait_ms(view(running=4), sure=True, shortest_ttl=75.0) == 5_000
    assert capacity.wait_ms(view(), sure=False, shortest_ttl=None) == 0
    assert capacity.wait_ms(view(), sure=True, shortest_ttl=0.001) == capacity.SHORTEST_MS


DONE = b"data: [DONE]\n\n"
GOOD = b'data: {"choices": [{"delta": {"content": "\xc3\xa4"}}]}\n\n'
BAD = b'data: {"error": {"message": "EngineCore encountered an issue", "code": 500}}\n\n'


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (GOOD + DONE, None),
        (GOOD + BAD + DONE, "EngineCore encountered an issue"),
        (BAD.replace(b"\n", b"\r\n") + DONE.replace(b"\n", b"\r\n"), "EngineCore encountered an issue"),
        (GOOD + BAD, "EngineCore encountered an issue"),
        (BAD + GOOD + DONE, None),
        (b'data: {"error": null}\n\n' + DONE, None),
        (b'data: {"choices": [{"error": 1}]}\n\n' + DONE, None),
        (b'event: x\ndata:{"error":\ndata: "torn"}\n\n: comment\n\n' + DONE, "torn"),
        (b'data: {"error": {"code": 1}}\n\n' + DONE, "None"),
        (b"data: error\n\n" + DONE, None),
        (b"", None),
        (DONE, None),
        (b"[" * 4000, None),
    ],
)
def test_a_cut_stream_is_seen(body: bytes, message: str | None) -> None:
    assert stream_error(body) == message


@given(st.lists(st.binary(min_size=1, max_size=3000)), st.lists(st.integers(1, 50)))
def test_the_tail_is_that_of_the_body_however_it_is_cut(filler: list[bytes], cuts: list[int]) -> None:
    body = b"".join(filler).replace(b"\n", b" ") + b"\n\n" + BAD + DONE
    tail = Tail()
    at = 0
    for cut in [*cuts, len(body)]:
        if body[at : at + cut]:
            tail.add(body[at : at + cut])
        at += cut
    assert tail.error() == "EngineCore encountered an issue"
    assert b"".join(tail._pieces)[-TAIL_BYTES:] == body[-TAIL_BYTES:]


def test_the_tail_stays_small() -> None:
    for size in (1, 7, 200, 500, 4096, 70_000):
        tail = Tail()
        for _ in range(200):
            tail.add(bytes(size))
            assert sum(map(len, tail._pieces)) <= 5 * TAIL_BYTES


@settings(max_examples=40)
@given(st.recursive(st.none() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_any_json_is_judged_without_a_mishap(value: Any) -> None:
    error = value.get("error") if isinstance(value, dict) else None
    found = stream_error(b"data: " + msgspec.json.encode(value) + b"\n\n" + DONE)
    assert (found is not None) == bool(error)
