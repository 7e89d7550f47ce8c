"""One blob over a scripted source, in virtual time."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from xim_agent.backoff import Backoff
from xim_agent.cache.download import Memory
from xim_agent.cache.transfer import STALL, Counters, Retry, WrongBlob, get_blob
from xim_agent.errors import AgentError
from xim_agent.outcome import RouterError

BLOB = bytes(range(100))


@dataclass
class Reply:
    status: int
    start: int
    total: int | None
    script: list[Any]

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """A number is a pause in seconds, an error is raised, bytes are sent."""
        for step in self.script:
            if isinstance(step, BaseException):
                raise step
            if isinstance(step, bytes):
                yield step
            else:
                await trio.sleep(step)


@dataclass
class Scripted:
    """A reply or an error for each request in turn."""

    replies: list[Any]
    offsets: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    @asynccontextmanager
    async def blob(self, sha256_hex: str, offset: int) -> AsyncIterator[Reply]:
        self.offsets.append(offset)
        self.times.append(trio.current_time())
        reply = self.replies.pop(0)
        if isinstance(reply, BaseException):
            raise reply
        yield reply

    async def manifest(self, sha256_hex: str) -> bytes:
        raise NotImplementedError


@dataclass
class World:
    source: Scripted
    counters: Counters = field(default_factory=Counters)
    trouble: list[str | None] = field(default_factory=list)
    done: int = 0

    async def get(self) -> bytes:
        def arrived(n: int) -> None:
            self.done += n

        retry = Retry(Backoff, lambda: 0.999, self.counters, self.trouble.append)
        return bytes(await get_blob(self.source, "d", len(BLOB), retry, self.counters, arrived))


def reply(*script: Any, start: int = 0, total: int | None = len(BLOB)) -> Reply:
    return Reply(206 if start else 200, start, total, list(script))


async def test_silence_for_30_s_drops_the_transfer_and_the_next_goes_on(autojump_clock: MockClock) -> None:
    w = World(Scripted([reply(BLOB[:40], 3600), reply(BLOB[40:], start=40)]))
    assert await w.get() == BLOB
    assert w.source.offsets == [0, 40]
    assert STALL <= w.source.times[1] - w.source.times[0] <= STALL + 1
    assert (w.counters.stalls, w.counters.network_bytes, w.done) == (1, 100, 100)


async def test_a_byte_every_29_s_is_slow_but_alive(autojump_clock: MockClock) -> None:
    script = [step for i in range(100) for step in (29.0, BLOB[i : i + 1])]
    w = World(Scripted([reply(*script)]))
    assert await w.get() == BLOB
    assert w.counters.stalls == 0


async def test_the_speed_of_a_blob_is_that_of_all_its_attempts(autojump_clock: MockClock) -> None:
    parts = [reply(5.0, BLOB[:40], RouterError("connection_lost", "cut")), reply(5.0, BLOB[40:], start=40)]
    w = World(Scripted(parts))
    assert await w.get() == BLOB
    waited = w.source.times[1] - 5.0
    assert waited > 0
    assert w.counters.speed.sum == pytest.approx(len(BLOB) / (10.0 + waited))
    w = World(Scripted([reply(BLOB, b"and more")]))
    with pytest.raises(WrongBlob):
        await w.get()
    assert sum(w.counters.speed.counts) == 0, "what is no blob has no speed"


async def test_a_cut_at_99_percent_costs_one_percent(autojump_clock: MockClock) -> None:
    w = World(Scripted([reply(BLOB[:99], RouterError("connection_lost", "cut")), reply(BLOB[99:], start=99)]))
    assert await w.get() == BLOB
    assert (w.source.offsets, w.counters.network_bytes) == ([0, 99], 100)
    assert w.trouble == ["cut", None]


@pytest.mark.parametrize("end", [RouterError("connection_lost", "cut"), 3600], ids=["cut", "silence"])
async def test_a_whole_blob_whose_reply_does_not_end_cleanly_is_whole(autojump_clock: MockClock, end: Any) -> None:
    w = World(Scripted([reply(BLOB, end)]))
    assert await w.get() == BLOB
    assert (w.source.offsets, w.done, w.trouble) == ([0], 100, [])


async def test_a_range_answered_with_200_starts_over(autojump_clock: MockClock) -> None:
    w = World(Scripted([reply(BLOB[:60], RouterError("x", "cut")), reply(BLOB[:30], BLOB[30:])]))
    assert await w.get() == BLOB
    assert w.done == 100


@pytest.mark.parametrize(
    "answer",
    [
        [reply(BLOB[:99]), reply(start=99)],
        [reply(BLOB[:99], total=None), reply(BLOB[:99], total=None)],
        [reply(BLOB, b"x")],
        [reply(total=99)],
        [reply(BLOB[5:], start=5)],
        [reply()],
        [reply(BLOB[:99], RouterError("x", "cut")), reply(BLOB[:1], start=100)],
        [reply(BLOB[:99], RouterError("x", "cut")), RouterError("http_416", "no", status=416)],
    ],
    ids=["short", "whole and short", "long", "another total", "from elsewhere", "nothing", "beyond", "416"],
)
async def test_what_cannot_be_the_blob_is_wrong(answer: list[Any], autojump_clock: MockClock) -> None:
    w = World(Scripted(answer))
    with pytest.raises(WrongBlob):
        await w.get()
    assert (w.done, w.source.replies) == (0, [])


async def test_an_end_without_a_length_may_be_a_cut(autojump_clock: MockClock) -> None:
    w = World(Scripted([reply(BLOB[:60], total=None), reply(BLOB[60:99], start=60), reply(BLOB[99:], start=99)]))
    assert await w.get() == BLOB
    assert (w.source.offsets, w.counters.network_bytes) == ([0, 60, 99], 100)


async def test_what_was_here_before_is_no_progress(autojump_clock: MockClock) -> None:
    """A router that ignores Range and always breaks off at the same place is asked ever more seldom."""
    cut = RouterError("connection_lost", "cut")
    w = World(Scripted([*(reply(BLOB[:99], cut) for _ in range(8)), reply(BLOB)]))
    assert await w.get() == BLOB
    gaps = [b - a for a, b in pairwise(w.source.times)]
    assert gaps == pytest.approx([1, 2, 4, 8, 16, 30, 30, 30], abs=0.1)
    assert w.done == 100


async def test_the_first_byte_more_is_progress(autojump_clock: MockClock) -> None:
    cut = RouterError("connection_lost", "cut")
    w = World(Scripted([reply(BLOB[n : n + 1], cut, start=n) for n in range(99)] + [reply(BLOB[99:], start=99)]))
    assert await w.get() == BLOB
    assert max(b - a for a, b in pairwise(w.source.times)) < 1


async def test_retry_after_is_obeyed_and_the_backoff_grows(autojump_clock: MockClock) -> None:
    busy = RouterError("x", "busy", status=503, retry_after=77)
    w = World(Scripted([busy, RouterError("x", "500", status=500), RouterError("x", "no"), reply(BLOB)]))
    await w.get()
    gaps = [b - a for a, b in zip(w.source.times, w.source.times[1:], strict=False)]
    assert gaps == pytest.approx([77, 2, 4], abs=0.1)


async def test_a_suspended_agent_waits_30_s(autojump_clock: MockClock) -> None:
    w = World(Scripted([RouterError("agent_suspended", "no", status=403), reply(BLOB)]))
    await w.get()
    assert w.source.times[1] - w.source.times[0] == 30


@pytest.mark.parametrize(
    ("status", "code"), [(404, "blob_unknown"), (410, "agent_removed"), (426, "protocol_unsupported")]
)
async def test_what_no_waiting_cures_is_raised_at_once(status: int, code: str) -> None:
    w = World(Scripted([RouterError(code, "no", status=status)]))
    with pytest.raises(AgentError) as e:
        await w.get()
    assert e.value.code == code


async def test_memory_is_bounded_and_first_come_first_served(autojump_clock: MockClock) -> None:
    memory, order, held, most = Memory(100), [], 0, 0

    async def use(i: int, amount: int) -> None:
        nonlocal held, most
        await memory.take(amount)
        order.append(i)
        held += amount
        most = max(most, held)
        await trio.sleep(1)
        held -= amount
        memory.give(amount)

    async with trio.open_nursery() as nursery:
        for i, amount in enumerate([60, 60, 10, 100, 1]):
            nursery.start_soon(use, i, amount)
            await trio.sleep(0.01)
    assert (order, most, memory.free) == ([0, 1, 2, 3, 4], 100, 100)
