"""What polls say and when they are sent; drain, pause, and what is kept for the next start."""

import errno
import math
from typing import Any

import pytest
import trio
from msgspec import Raw

from xim_agent.mesh.codec import encode_frame
from xim_agent.mesh.messages import Error, Progress
from xim_agent.outcome import RouterError
from xim_agent.work.spool import Spool


async def test_the_first_poll_is_answered_at_once_and_later_ones_are_held(
    bench: Any, router: Any, autojump_clock: Any
) -> None:
    router.generation = 3
    await bench.settle(26)
    assert [p.wait_ms for p in router.polls[:2]] == [0, 25_000]
    assert [p.n for p in router.polls] == list(range(1, len(router.polls) + 1))
    assert {p.boot for p in router.polls} == {"boot-1"}
    assert len(router.polls) == 3
    assert bench.generations[-1] == 3
    assert bench.poller.statistics().idle_reason == "no request"


async def test_what_must_be_told_replaces_the_held_poll(bench: Any, router: Any, autojump_clock: Any) -> None:
    await bench.settle(1)
    bench.engine.ready = False
    bench.poller.changed()
    await bench.settle(1)
    assert (router.polls[-1].phase, router.polls[-1].capacity) == ("starting", 0)
    bench.engine.ready = True
    bench.poller.changed()
    await bench.settle(0.001)
    assert (router.polls[-1].phase, router.polls[-1].capacity) == ("ready", 4)
    bench.engine.degraded = True
    bench.poller.changed()
    bench.poller.changed()
    await bench.settle(0.001)
    assert router.polls[-1].phase == "degraded"
    assert bench.poller.statistics().replaced_polls == 3


async def test_a_free_slot_is_told_at_once(bench: Any, router: Any, autojump_clock: Any) -> None:
    bench.engine.ceiling, bench.engine.script = 1, [1.0, b"x"]
    bench.poller.changed()
    first, second = router.offer(), None
    await bench.settle(0.5)
    assert router.polls[-1].capacity == 0
    second = router.offer()
    await router.ended(first)
    await bench.settle(0.05)
    assert second in router.polls[-1].held


async def test_progress_replaces_at_most_once_a_second(bench: Any, router: Any, autojump_clock: Any) -> None:
    await bench.settle(1)
    before = len(router.polls)
    for done in range(200):
        bench.progress = Progress("fetch", done, 200, 1.0)
        bench.poller.changed()
        await bench.settle(0.05)
    assert 9 <= len(router.polls) - before <= 13
    await bench.settle(1.5)
    assert router.polls[-1].progress.done == 199


async def test_health_is_told(bench: Any, router: Any, autojump_clock: Any) -> None:
    await bench.settle(5)
    bench.health.set("disk_full", "no room")
    await bench.settle(1.1)
    assert [c.code for c in router.polls[-1].health] == ["disk_full"]


async def test_a_router_that_answers_at_once_is_asked_less_and_less(
    bench: Any, router: Any, autojump_clock: Any
) -> None:
    router.instant = True
    await bench.settle(20)
    assert len(router.polls) < 30
    router.instant = False
    await bench.settle(2)
    router.retry_ms = 10_000
    router.say(generation=2)
    await bench.settle(0.1)
    before = len(router.polls)
    await bench.settle(9)
    assert len(router.polls) == before
    bench.poller.drain()
    await bench.settle(0.1)
    assert router.polls[-1].phase == "draining"


async def test_drain_finishes_what_runs_and_cuts_the_rest(bench: Any, router: Any, autojump_clock: Any) -> None:
    bench.engine.script = [2.0, b"x"]
    short = router.offer()
    await bench.settle(1)
    bench.engine.script = [b"a", math.inf]
    endless = router.offer()
    await bench.settle(0.5)
    bench.poller.drain()
    await bench.settle(0.001)
    assert (router.polls[-1].phase, router.polls[-1].capacity) == ("draining", 0)
    bench.work.cancel_scope.deadline = trio.current_time() + 20
    router.instant = True  # work that comes all the same
    late = router.offer()
    assert (await router.ended(late)).code == "draining"
    router.instant = False
    assert (await router.ended(short)).reason == "complete"
    polls = len(router.polls)
    await bench.settle(15)
    assert 2 <= len(router.polls) - polls <= 4
    ending = await router.ended(endless)
    assert (ending.code, ending.retryable) == ("draining", False)
    with trio.fail_after(1):
        await bench.sender.flushed()
    await bench.settle(10)
    assert router.polls[-1].held == []


async def test_the_router_asks_to_drain_and_takes_it_back(bench: Any, router: Any, autojump_clock: Any) -> None:
    await bench.settle(1)
    router.say(drain=True)
    await bench.settle(1)
    assert (router.polls[-1].phase, router.polls[-1].capacity) == ("draining", 0)
    router.say(drain=False)
    await bench.settle(1)
    assert (router.polls[-1].phase, router.polls[-1].capacity) == ("ready", 4)


async def test_who_asks_to_drain_takes_it_back_for_itself_alone(bench: Any, router: Any, autojump_clock: Any) -> None:
    await bench.settle(1)
    bench.poller.drain("an operator")
    router.say(drain=True)
    await bench.settle(1)
    assert bench.poller.statistics().drained_by == ["an operator", "the router"]
    bench.poller.undrain("an operator")
    await bench.settle(1)
    assert (router.polls[-1].phase, bench.poller.statistics().drained_by) == ("draining", ["the router"])
    bench.poller.drain("an operator")
    router.say(drain=False)
    await bench.settle(1)
    assert (router.polls[-1].phase, router.polls[-1].capacity) == ("draining", 0)
    bench.poller.undrain("an operator")
    await bench.settle(1)
    assert (router.polls[-1].phase, router.polls[-1].capacity) == ("ready", 4)


async def test_a_drain_is_told_when_the_router_has_answered(bench: Any, router: Any, autojump_clock: Any) -> None:
    await bench.settle(1)
    bench.poller.drain()
    before = trio.current_time()
    with trio.fail_after(10):
        await bench.poller.told_draining()
    assert trio.current_time() - before < 0.1, "that poll is not held"
    await bench.settle(0.1)
    assert [p.wait_ms for p in router.polls if p.phase == "draining"] == [0, 5000]


@pytest.mark.parametrize("code", ["connection_lost", "agent_suspended"])
async def test_a_drain_waits_for_no_router_that_does_not_listen(
    bench: Any, router: Any, code: str, autojump_clock: Any
) -> None:
    await bench.settle(1)
    router.cut(RouterError(code, "no", status=403 if code == "agent_suspended" else None))
    bench.poller.drain()
    with trio.fail_after(0.1):
        await bench.poller.told_draining()


async def test_pause_waits_for_what_runs(bench: Any, router: Any, autojump_clock: Any) -> None:
    bench.engine.script = [2.0, b"x"]
    router.offer()
    await bench.settle(1)
    started = trio.current_time()
    await bench.poller.pause()
    assert 0.9 < trio.current_time() - started < 1.1
    second = router.offer()
    await bench.settle(10)
    assert (router.polls[-1].phase, router.polls[-1].capacity, len(bench.engine.requests)) == ("ready", 0, 1)
    bench.poller.resume()
    assert (await router.ended(second)).reason == "complete"


async def test_endings_that_were_not_acknowledged_go_before_the_next_first_poll(
    boot: Any, router: Any, autojump_clock: Any
) -> None:
    async with trio.open_nursery() as services:
        first = await boot("boot-1", services)
        first.engine.script = [b"x"]
        router.ack = False
        lease = router.offer()
        await router.ended(lease)
        router.cut(RouterError("connection_lost", "gone"))
        first.sender.spool()
        services.cancel_scope.cancel()
    router.streams.clear()
    router.polls.clear()
    router.events_calls.clear()
    router.ack = True
    second = await boot("boot-2")
    await second.settle(3)
    assert (router.polls, router.events_calls) == ([], [])
    router.cut(None)
    await second.settle(2)
    assert router.events_calls == [("boot-1", 1)]
    assert router.polls[0].boot == "boot-2"
    assert list(router.streams[lease].frames) == [2]  # the ending alone, under the number it had
    assert Spool(second.sender._spool._path).load() == []


async def test_a_spool_that_cannot_be_read_is_passed_over(
    boot: Any, router: Any, tmp_path: Any, autojump_clock: Any
) -> None:
    (tmp_path / "spool").write_bytes(b"\xc1 not ours")
    bench = await boot()
    await bench.settle(1)
    assert router.polls


async def test_a_spool_that_cannot_be_removed_is_sent_and_left(
    boot: Any, router: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, autojump_clock: Any
) -> None:
    Spool(tmp_path / "spool").save("boot-0", [Raw(encode_frame(9, 0, "error", Error("draining", "x", True)))])

    def refuse(self: Any, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(type(tmp_path), "unlink", refuse)
    bench = await boot()
    assert (await router.ended(router.offer(id=1))).reason == "complete"
    assert router.events_calls[0][0] == "boot-0"
    assert bench.link.up


def test_the_spool_adds_up_and_is_private(tmp_path: Any) -> None:
    spool = Spool(tmp_path / "spool")
    spool.save("a", [])
    assert list(tmp_path.iterdir()) == []
    spool.save("a", [Raw(b"\x91\x01")])
    spool.save("b", [Raw(b"\x91\x02"), Raw(b"\x91\x03")])
    assert [(e.boot, [bytes(f) for f in e.frames]) for e in spool.load()] == [
        ("a", [b"\x91\x01"]),
        ("b", [b"\x91\x02", b"\x91\x03"]),
    ]
    assert (tmp_path / "spool").stat().st_mode & 0o777 == 0o600
    spool.clear()
    spool.clear()
    assert spool.load() == []
