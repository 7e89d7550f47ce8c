"""One lease after another through poller, request and sender, in virtual time."""

import logging
import math
from typing import Any

import pytest
import trio

from xim_agent.errors import AgentError
from xim_agent.mesh.messages import MAX_BODY, Error, Head
from xim_agent.mesh.trace import traced
from xim_agent.outcome import RouterError
from xim_agent.work import capacity

LOST = RouterError("connection_lost", "the connection was lost")


async def test_a_stream_arrives_unchanged_and_ends_once(bench: Any, router: Any, autojump_clock: Any) -> None:
    bench.engine.script = [0.2, b"one", 0.5, b"two", b"three"]
    lease = router.offer(headers={"content-type": "application/json", "authorization": "x"}, body=b"{1}")
    end = await router.ended(lease)
    stream = router.streams[lease]
    assert (stream.head, stream.data) == (Head(200, {"content-type": "text/plain"}), b"onetwothree")
    assert (end.reason, end.bytes, end.chunks, end.ttft_ms) == ("complete", 11, 3, 200)
    assert 700 <= end.duration_ms <= 720
    asked = {"content-type": "application/json", **traced({}, "r")}
    assert bench.engine.requests == [("/v1/completions", asked, b"{1}")]
    await bench.settle(26)
    assert router.polls[-1].held == []
    statistics = bench.poller.statistics().sender
    assert (statistics.accepted, statistics.ended, statistics.held) == (1, {"complete": 1}, 0)
    assert statistics.outbox.unacknowledged == 0


async def test_an_answer_without_a_body(bench: Any, router: Any, autojump_clock: Any) -> None:
    bench.engine.script, bench.engine.status = [], 404
    end = await router.ended(router.offer())
    assert (end.reason, end.bytes, end.chunks, end.ttft_ms) == ("complete", 0, 0, None)
    assert router.streams[1].head.status == 404


async def test_small_data_is_gathered_for_ten_milliseconds(bench: Any, router: Any, autojump_clock: Any) -> None:
    bench.engine.script = [b"first", *[0.001, b"x"] * 1000]
    for _ in range(4):
        router.offer()
    for lease in (1, 2, 3, 4):
        await router.ended(lease)
    assert len(router.events_calls) < 1.3 * 100 + 10
    assert sum(n for _, n in router.events_calls) == 4 * 1003
    assert router.most_in_flight <= 2


async def test_a_cancel_closes_the_engine_connection(bench: Any, router: Any, autojump_clock: Any) -> None:
    bench.engine.script = [b"one", math.inf]
    lease = router.offer()
    await bench.settle(1)
    assert bench.engine.open_now == 1
    asked = trio.current_time()
    router.say(cancel={lease, 99})
    end = await router.ended(lease)
    assert (end.reason, end.bytes) == ("cancelled", 3)
    assert bench.engine.closed[0] - asked < 0.1
    await bench.settle()
    assert len(router.streams[lease].endings) == 1


async def test_the_deadline(bench: Any, router: Any, autojump_clock: Any) -> None:
    bench.engine.script = [math.inf]
    end = await router.ended(router.offer(deadline_ms=3000))
    assert (end.reason, end.ttft_ms) == ("deadline", None)
    assert 2990 <= end.duration_ms <= 3010
    assert bench.engine.open_now == 0


async def test_the_engine_dies_before_and_after_data(
    bench: Any, router: Any, engine_lost: AgentError, autojump_clock: Any
) -> None:
    bench.engine.script = [engine_lost]
    assert await router.ended(router.offer()) == Error("engine_lost", "the engine is gone", True)
    bench.engine.script = [b"one", 0.1, engine_lost]
    lease = router.offer()
    assert await router.ended(lease) == Error("engine_lost", "the engine is gone", False)
    assert router.streams[lease].data == b"one"


async def test_a_poison_request_is_refused_and_tried_nowhere_else(bench: Any, router: Any, autojump_clock: Any) -> None:
    bench.engine.script = [AgentError("poison_request", "it crashed the engine twice")]
    assert await router.ended(router.offer()) == Error("invalid_request", "it crashed the engine twice", False)


async def test_a_stream_that_ends_cleanly_with_an_error_event_is_cut(
    bench: Any, router: Any, autojump_clock: Any
) -> None:
    bench.engine.headers = {"content-type": "text/event-stream; charset=utf-8"}
    script = [b'data: {"choices": []}\n\nda', b'ta: {"error": {"message": "core died"}}\n\n', b"data: [DONE]\n\n"]
    bench.engine.script = script
    lease = router.offer()
    ending = await router.ended(lease)
    assert (ending.code, ending.retryable) == ("engine_lost", False)
    assert "core died" in ending.message
    assert router.streams[lease].data == b"".join(script)


async def test_an_engine_that_left_ready_completes_nothing(bench: Any, router: Any, autojump_clock: Any) -> None:
    lease = router.offer()
    await bench.settle(0.2)
    bench.engine.ready = False
    assert (await router.ended(lease)).code == "engine_lost"


async def test_a_bug_costs_one_lease(bench: Any, router: Any, error_logs: Any, autojump_clock: Any) -> None:
    bench.engine.script = [ZeroDivisionError("bug")]
    assert (await router.ended(router.offer())) == Error("internal", "internal error: ZeroDivisionError", True)
    assert [r.getMessage() for r in error_logs] == ["request failed by a bug"]
    bench.engine.script = [b"fine"]
    assert (await router.ended(router.offer())).reason == "complete"


async def test_without_credit_the_engine_is_not_read(bench: Any, router: Any, autojump_clock: Any) -> None:
    bench.engine.script = [b"0123456789"] * 10
    lease = router.offer(credit=25)
    other = router.offer()
    assert (await router.ended(other)).bytes == 100
    await bench.settle(1)
    stream = router.streams[lease]
    assert stream.data == b"0123456789012345678901234"
    assert bench.engine.read == 100 + 30
    router.say(credit={lease: 40})
    await bench.settle(1)
    assert len(stream.data) == 40
    router.say(credit={lease: 30})
    await bench.settle(1)
    assert len(stream.data) == 40
    router.say(credit={lease: 1000})
    assert (await router.ended(lease)).bytes == 100
    assert stream.data == b"0123456789" * 10


async def test_a_body_by_reference(bench: Any, router: Any, autojump_clock: Any) -> None:
    router.bodies = {"big": [LOST, LOST, b"x" * 9], "gone": [RouterError("not_found", "gone", status=404)],
                     "huge": [bytes(MAX_BODY + 1)], "more": [RouterError("reply_too_large", "much")]}  # fmt: skip
    assert (await router.ended(router.offer(body=None, request="big"))).reason == "complete"
    assert bench.engine.requests[0][2] == b"x" * 9
    assert await router.ended(router.offer(body=None, request="gone")) == Error("internal", "gone", True)
    assert (await router.ended(router.offer(body=None, request="huge"))).code == "invalid_request"
    assert await router.ended(router.offer(body=None, request="more")) == Error("invalid_request", "much", False)
    assert len(bench.engine.requests) == 1


async def test_a_body_whose_client_has_left_is_no_failure(bench: Any, router: Any, autojump_clock: Any) -> None:
    router.bodies = {"left": [RouterError("lease_unknown", "gone", status=404)]}
    lease = router.offer(body=None, request="left")
    await bench.settle(5)
    assert not router.streams[lease].endings
    router.say(cancel={lease})
    assert (await router.ended(lease)).reason == "cancelled"


async def test_refused_leases_still_end(bench: Any, router: Any, autojump_clock: Any) -> None:
    bench.engine.script, bench.engine.ceiling = [5.0], 2
    await bench.settle(26)
    for _ in range(4):
        router.offer()
    wrong = router.offer(path="/metrics")
    await bench.settle(1)
    assert [router.streams[i].ending.code for i in (3, 4, wrong)] == ["engine_overloaded"] * 2 + ["invalid_request"]
    assert (await router.ended(1)).reason == (await router.ended(2)).reason == "complete"
    assert bench.poller.statistics().sender.refused == 3
    bench.engine.ready = False
    bench.poller.changed()
    router.instant = True  # gives leases although the capacity is 0
    lease = router.offer()
    assert (await router.ended(lease)).code == "engine_overloaded"


async def test_numbers_that_make_no_sense_cost_their_lease_at_most(
    bench: Any, router: Any, autojump_clock: Any
) -> None:
    bench.engine.ceiling = 100
    await bench.settle(26)
    odd = [-(2**63), -1, 0, 1, 2**63 - 1, 2**64 - 1]
    offered = [
        router.offer(**{name: number}, **({"credit": 10} if name != "credit" else {}))
        for name in ("deadline_ms", "ttl_ms", "credit")
        for number in odd
    ]
    before = len(router.polls)
    await bench.settle(20)
    assert len(router.polls) - before < 20 / (capacity.SHORTEST_MS / 1000), "no poll without a pause"
    stuck = [lease for lease in offered if not router.streams[lease].endings]
    assert len(stuck) == 4, "without credit for all of it"
    router.say(cancel=set(stuck))
    for lease in offered:
        assert len((await router.ended(lease)) and router.streams[lease].endings) == 1
    assert (await router.ended(router.offer())).reason == "complete"


async def test_characters_split_between_chunks_arrive_as_they_are(bench: Any, router: Any, autojump_clock: Any) -> None:
    text = "Gr\u00fc\u00dfe \U0001f600 \u4e16\u754c e\u0301".encode()
    bench.engine.headers = {"content-type": "text/event-stream"}
    for size in (1, 2, 3):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        bench.engine.script = [*pieces, *[0.02, text, b"\xf0\x9f", b"\xff\xfe\n\n"]]
        for credit in (100_000, 5):
            lease = router.offer(credit=credit)
            await bench.settle(0.2)
            router.say(credit={lease: 100_000})
            end = await router.ended(lease)
            assert router.streams[lease].data == text * 2 + b"\xf0\x9f\xff\xfe\n\n"
            assert (end.reason, end.bytes) == ("complete", len(text) * 2 + 6)
            router.credit = {}


async def test_a_lease_offered_again_is_served_once(bench: Any, router: Any, autojump_clock: Any) -> None:
    lease = router.offer()
    router.offer(id=lease)
    await router.ended(lease)
    router.offer(id=lease)
    await bench.settle(1)
    assert len(bench.engine.requests) == 1
    assert len(router.streams[lease].endings) == 1


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The one line of each request that is over, as the log has it."""
    return [dict(r.__dict__) for r in caplog.records if r.getMessage() == "request"]


async def test_one_line_tells_the_times_of_every_hop_and_nothing_of_the_content(
    bench: Any, router: Any, caplog: pytest.LogCaptureFixture, autojump_clock: Any
) -> None:
    caplog.set_level(logging.DEBUG, "xim_agent.work")
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    router.bodies = {"r7": [LOST, b"secret prompt"]}
    bench.engine.script = [0.2, b"secret one", 0.5, b"secret two", 0.1]
    router.ack = False
    await router.ended(router.offer(request="r7", body=None, headers={"traceparent": parent}))
    await bench.settle(1)
    assert lines(caplog) == [], "not before the ending is acknowledged"
    router.ack = True
    await bench.settle(10)
    (line,) = lines(caplog)
    assert (line["request"], line["trace"], line["path"]) == ("r7", parent[3:35], "/v1/completions")
    assert (line["status"], line["bytes"], line["chunks"], line["ending"]) == (200, 20, 2, "complete")
    asked = line["asked_ms"]
    assert asked > 1, "the body was fetched first"
    after = [round(line[f"{hop}_ms"] - asked) for hop in ("replied", "first", "last", "ended")]
    assert after == [0, 200, 700, 800]
    assert 1000 < line["acknowledged_ms"] - line["ended_ms"] < 10_000
    assert bench.engine.requests[0][1]["traceparent"] == parent
    assert "secret" not in caplog.text + str([r.__dict__ for r in caplog.records])
    assert not bench.sender._hops


async def test_what_never_came_has_no_time(
    bench: Any, router: Any, caplog: pytest.LogCaptureFixture, autojump_clock: Any
) -> None:
    caplog.set_level(logging.DEBUG, "xim_agent.work")
    bench.engine.script = [math.inf]
    await bench.settle(1)
    refused, lost = router.offer(path="/metrics"), router.offer()
    await router.ended(refused)
    await bench.settle(1)
    router.say(unknown={lost}, cancel={lost})
    await bench.settle(5)
    first, second = lines(caplog)
    assert (first["ending"], first["asked_ms"], first["first_ms"], first["last_ms"]) == ("invalid_request", *[None] * 3)
    assert (second["ending"], second["status"], second["acknowledged_ms"]) == ("cancelled", 200, None)
    assert not bench.sender._hops


async def test_nothing_is_kept_for_a_line_that_nobody_reads(bench: Any, router: Any, autojump_clock: Any) -> None:
    router.ack = False
    await router.ended(router.offer())
    await bench.settle(0.5)
    assert (len(bench.sender.leases), bench.sender._hops) == (1, {})


async def test_what_is_held_is_listed_by_phase_until_it_is_acknowledged(
    bench: Any, router: Any, autojump_clock: Any
) -> None:
    bench.engine.script = [1.0, b"abc", 1.0, b"de"]
    await bench.settle(1)
    router.bodies = {"late": [LOST, b"body"]}
    waiting, asked = router.offer(request="late", body=None), router.offer(request="now")
    await bench.settle(0.1)
    shown = {one.request: one for one in bench.sender.requests()}
    assert (shown["late"].phase, shown["now"].phase) == ("waiting", "prefill")
    assert (shown["now"].lease, shown["now"].bytes, shown["now"].chunks) == (asked, 0, 0)
    await bench.settle(1.2)
    now = next(one for one in bench.sender.requests() if one.request == "now")
    assert (now.phase, now.bytes, now.chunks) == ("streaming", 3, 1)
    assert now.seconds > 1
    router.ack = False
    await router.ended(asked)
    await bench.settle(0.1)
    assert next(one for one in bench.sender.requests() if one.request == "now").phase == "ending"
    router.ack = True
    await router.ended(waiting)
    await bench.settle(20)
    assert bench.sender.requests() == []
    assert not bench.sender._ending


async def test_the_engines_last_words_are_in_no_line(
    bench: Any, router: Any, caplog: pytest.LogCaptureFixture, autojump_clock: Any
) -> None:
    """They may quote what was asked; the client, who asked it, gets them."""
    caplog.set_level(5, "xim_agent")
    bench.engine.headers = {"content-type": "text/event-stream"}
    bench.engine.script = [b'data: {"error": {"message": "cannot read secret prompt"}}\n\n', b"data: [DONE]\n\n"]
    lease = router.offer(request="r9")
    ending = await router.ended(lease)
    assert "secret prompt" in ending.message
    (line,) = [r.__dict__ for r in caplog.records if r.getMessage() == "request failed"]
    assert (line["request"], line["lease"], line["code"]) == ("r9", lease, "engine_lost")
    assert "secret" not in caplog.text + str([r.__dict__ for r in caplog.records])
