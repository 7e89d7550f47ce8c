"""Outages, restarts of the router, and what it refuses, in virtual time."""

import math
from typing import Any

import pytest
import trio
import trio.lowlevel

from xim_agent.errors import AgentError
from xim_agent.health import Health
from xim_agent.mesh.messages import OddLease
from xim_agent.outcome import RouterError
from xim_agent.work.link import Link

LOST = RouterError("connection_refused", "router refused the connection")


async def test_a_stream_goes_on_through_an_outage(bench: Any, router: Any, autojump_clock: Any) -> None:
    bench.engine.script = [0.05, b"word "] * 200
    lease = router.offer()
    await bench.settle(2)
    router.cut(LOST)
    await bench.settle(5)
    assert not bench.link.up
    assert [c.code for c in bench.health.conditions()] == ["router_unreachable"]
    router.cut(None)
    back = trio.current_time()
    assert (await router.ended(lease)).reason == "complete"
    stream = router.streams[lease]
    assert stream.data == b"word " * 200
    assert min(t for t in stream.arrivals if t > back) - back < 2
    assert bench.health.conditions() == []
    assert len(bench.engine.requests) == 1


@pytest.mark.parametrize("seconds", [1, 30])
async def test_few_attempts_and_a_quick_return(bench: Any, router: Any, seconds: float, autojump_clock: Any) -> None:
    bench.engine.script = [0.01, b"x"] * 100_000
    router.offer()
    await bench.settle(1)
    router.attempts.clear()
    router.cut(LOST)
    await bench.settle(seconds)
    assert len(router.attempts) <= seconds + 4  # what was in flight when it happened
    router.cut(None)
    polls = len(router.polls)
    await bench.settle(2)
    assert len(router.polls) > polls
    assert bench.link.up


async def test_a_long_outage_is_tried_twice_a_minute(bench: Any, router: Any, autojump_clock: Any) -> None:
    router.cut(LOST)
    await bench.settle(900)
    router.attempts.clear()
    await bench.settle(300)
    assert 9 <= len(router.attempts) <= 12


async def test_lost_replies_and_missing_acknowledgements(bench: Any, router: Any, autojump_clock: Any) -> None:
    bench.engine.script = [0.05, b"x"] * 50
    router.lose = 5
    lease = router.offer()
    assert (await router.ended(lease)).bytes == 50
    assert len(router.streams[lease].data) == 50
    router.ack = False
    lease = router.offer()
    await router.ended(lease)
    await bench.settle(5)
    assert lease in router.polls[-1].held
    assert len(router.streams[lease].endings) == 1
    router.ack = True
    with trio.fail_after(2):
        await bench.sender.flushed()


async def test_a_lease_lapses(bench: Any, router: Any, autojump_clock: Any) -> None:
    bench.engine.script = [b"one", math.inf]
    lease = router.offer(ttl_ms=20_000)
    await bench.settle(60)
    assert bench.engine.open_now == 1  # polls renew it
    router.cut(LOST)
    cut = trio.current_time()
    await bench.settle(40)
    assert bench.engine.open_now == 0
    assert 13 < bench.engine.closed[0] - cut < 22
    router.cut(None)
    ending = await router.ended(lease)
    assert (ending.code, ending.retryable) == ("internal", False)


async def test_frames_alone_renew_a_lease(bench: Any, router: Any, autojump_clock: Any) -> None:
    """Polls are refused for a while, events are not: a suspended agent finishes what it holds."""
    bench.engine.script = [1.0, b"x"] * 100
    lease = router.offer(ttl_ms=5_000)
    await bench.settle(2)
    suspended = RouterError("agent_suspended", "no", status=403)

    async def refuse(request: Any) -> Any:
        await trio.lowlevel.checkpoint()
        raise suspended

    router.poll = refuse
    router.changed.bump()
    assert (await router.ended(lease)).bytes == 100


async def test_a_router_that_has_forgotten(bench: Any, router: Any, autojump_clock: Any) -> None:
    bench.engine.script = [0.1, b"x"] * 1000
    lease = router.offer()
    await bench.settle(1)
    router.cut(LOST)
    await bench.settle(1)
    router.unknown = {lease}
    router.cut(None)
    await bench.settle(3)
    assert bench.engine.open_now == 0
    assert router.streams[lease].endings == []
    assert bench.sender.leases.held() == []
    assert bench.poller.statistics().sender.ended == {"unknown": 1}
    calls = len(router.events_calls)
    await bench.settle(10)
    assert len(router.events_calls) == calls
    assert (await router.ended(router.offer(id=50, deadline_ms=500))).reason == "deadline"


async def test_events_that_are_refused_cost_their_leases_only(
    bench: Any, router: Any, error_logs: Any, autojump_clock: Any
) -> None:
    bench.engine.script = [b"x", math.inf]
    router.events_down = RouterError("invalid_request", "cannot be decoded", status=400)
    router.offer()
    await bench.settle(1)
    assert bench.engine.open_now == 0
    router.events_down = None
    bench.engine.script = [b"x"]
    assert (await router.ended(router.offer(id=2))).reason == "complete"
    assert router.streams[1].endings == []
    assert {r.getMessage() for r in error_logs} == {"events refused"}  # head and data may have left in two calls


async def test_broken_events_are_no_hot_loop_although_polls_work(bench: Any, router: Any, autojump_clock: Any) -> None:
    bench.engine.script = [b"x"]
    router.events_down = RouterError("http_500", "broken", status=500)
    lease = router.offer()
    await bench.settle(1)
    before = len(router.attempts)
    await bench.settle(100)
    assert len(router.attempts) - before < 60
    router.events_down = None
    with trio.fail_after(60):
        assert (await router.ended(lease)).reason == "complete"


async def test_retry_after_holds_for_both(bench: Any, router: Any, autojump_clock: Any) -> None:
    bench.engine.script = [1.0, b"x"] * 20
    router.offer()
    await bench.settle(5)
    router.cut(RouterError("busy", "come later", status=503, retry_after=100))
    await bench.settle(1)
    router.attempts.clear()
    router.cut(None)
    await bench.settle(95)
    assert router.attempts == []
    await bench.settle(10)
    assert bench.link.up


async def test_suspended(bench: Any, router: Any, autojump_clock: Any) -> None:
    await bench.settle(1)
    router.cut(RouterError("agent_suspended", "no", status=403))
    await bench.settle(1)
    router.attempts.clear()
    assert bench.poller.statistics().suspended
    await bench.settle(95)
    assert len(router.attempts) == 3
    assert [c.code for c in bench.health.conditions()] == ["agent_suspended"]
    router.cut(None)
    await bench.settle(31)
    assert bench.health.conditions() == []
    assert (await router.ended(router.offer())).reason == "complete"


@pytest.mark.parametrize(
    ("status", "code", "exit_code", "start"),
    [
        (410, "agent_removed", 12, 0),
        (426, "protocol_unsupported", 13, 0),
        (409, "identity_in_use", 14, 1_600_000_000),
        (409, "identity_in_use", 14, 1_900_000_000),  # refused again and again: the clocks are wrong
        (409, "identity_in_use", 14, 1_600_000_000_000),
        (409, "identity_in_use", 14, "soon"),
    ],
)
async def test_the_end(
    boot: Any, router: Any, status: int, code: str, exit_code: int, start: Any, autojump_clock: Any
) -> None:
    problem = {"address": "10.0.0.9", "start": start}
    router.down = RouterError(code, "the end", status=status, problem=problem)

    def right(error: AgentError) -> bool:
        return error.exit_code == exit_code and ("10.0.0.9" in error.message or status != 409)

    with pytest.RaisesGroup(pytest.RaisesExc(AgentError, check=right), flatten_subgroups=True):
        async with trio.open_nursery() as services:
            await boot(under=services)


@pytest.mark.parametrize("start", [1_600_000_000_000, math.inf, "soon", None])
async def test_one_refusal_without_a_usable_start_ends_nobody(
    bench: Any, router: Any, start: Any, autojump_clock: Any
) -> None:
    await bench.settle(1)
    router.cut(RouterError("identity_in_use", "two of you", status=409, problem={"start": start}))
    await bench.settle(0.5)
    router.cut(None)
    await bench.settle(60)
    assert [c.code for c in bench.health.conditions()] == ["identity_in_use"]
    assert (await router.ended(router.offer())).reason == "complete"


async def test_the_next_router_is_asked_for_after_three_calls_without_a_reply(autojump_clock: Any) -> None:
    asked: list[float] = []
    link = Link(health=Health(trio.current_time), unreachable=lambda: asked.append(trio.current_time()))
    busy = RouterError("http_503", "busy", status=503)

    async def calls(*errors: RouterError | None) -> int:
        asked.clear()
        for error in errors:
            await link.turn()
            try:
                with link.call("poll"):
                    if error is not None:
                        raise error
            except RouterError:
                pass
        return len(asked)

    assert await calls(LOST, LOST) == 0
    assert await calls(LOST) == 1
    assert await calls(LOST, LOST, LOST, LOST, LOST, LOST) == 2
    assert await calls(LOST, LOST, busy, LOST, LOST, None, LOST, LOST) == 0


async def test_an_odd_lease_ends_alone(bench: Any, router: Any, autojump_clock: Any) -> None:
    odd = OddLease(90, "", "", "", {}, None, False, "", 0, 0, flaw="Expected `int` - at `$.credit`")
    router.offers.append(odd)
    good = router.offer()
    assert (await router.ended(90)).code == "invalid_request"
    assert (await router.ended(good)).reason == "complete"


async def test_the_earlier_of_two_clones_stays(bench: Any, router: Any, autojump_clock: Any) -> None:
    await bench.settle(1)
    problem = {"address": "10.0.0.9", "start": 1_900_000_000.0}
    router.cut(RouterError("identity_in_use", "two of you", status=409, problem=problem))
    await bench.settle(1)
    router.cut(None)
    await bench.settle(60)
    assert [c.code for c in bench.health.conditions()] == ["identity_in_use"]
    assert "10.0.0.9, since 2030-03-17" in bench.health.conditions()[0].text
    assert (await router.ended(router.offer())).reason == "complete"
    await bench.settle(200)
    assert bench.health.conditions() == []


async def test_router_that_knows_who_came_first_is_believed(bench: Any, router: Any, autojump_clock: Any) -> None:
    """However often a copy restarts, and whatever our clock says: by the router's, we were here first."""
    await bench.settle(1)
    problem = {"address": "10.0.0.9", "start": 1_900_000_000.0, "yours": 1_899_999_999.0}
    router.cut(RouterError("identity_in_use", "two of you", status=409, problem=problem))
    await bench.settle(300)
    router.cut(None)
    await bench.settle(30)
    assert [c.code for c in bench.health.conditions()] == ["identity_in_use"]
    assert (await router.ended(router.offer())).reason == "complete"
