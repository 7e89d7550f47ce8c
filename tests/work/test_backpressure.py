"""Readers that do not read: what they cost, and whom. In virtual time, over real sockets."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
from fakes.data_path import COMPLETE, DataPath, data_path

from xim_agent.engine.liveness import Liveness, Sign
from xim_agent.router.jobs import Limits

pytestmark = pytest.mark.filterwarnings(
    "ignore:Async generator 'http:ResourceWarning"  # httpx's, of an answer that was not read to its end
)
KIB, MIB = 1024, 1024 * 1024
WINDOW = 64 * KIB
LIMITS = Limits(window=WINDOW)
# What waits in the kernel on the way from the engine, and the one read that is in the agent's hands.
SOCKET = 512 * KIB
SLOW, NEVER = b"slow", 1e6


def flood(body: bytes) -> Iterator[tuple[float, bytes]]:
    """10 MiB, as fast as they are taken."""
    for _ in range(640):
        yield 0.0, b"data: " + b"x" * (16 * KIB - 8) + b"\n\n"


def trickle(body: bytes) -> Iterator[tuple[float, bytes]]:
    """For 2 s a chunk of 200 bytes every 50 ms; a flood for the slow one."""
    if body == SLOW:
        yield from flood(body)
        return
    for n in range(40):
        yield 0.05, b"data: %0192d\n\n" % n


async def others(path: DataPath, count: int) -> list[float]:
    first = len(path.clients)
    async with trio.open_nursery() as nursery:
        for n in range(count):
            nursery.start_soon(path.ask, b"%d" % n)
    found = path.clients[first:]
    assert all(client.outcome is COMPLETE for client in found)
    assert all(client.data == b"".join(chunk for _, chunk in trickle(client.body)) for client in found)
    return sorted(client.seconds for client in found)


async def test_one_that_reads_nothing_slows_nobody(tmp_path: Path, autojump_clock: Any) -> None:
    async with data_path(tmp_path, ceiling=128, limits=LIMITS) as path:
        path.engine.script = trickle
        alone = await others(path, 127)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: path.ask(SLOW, read=lambda taken: NEVER))
            await trio.sleep(1)
            beside = await others(path, 127)
            assert max(beside) < max(alone) + 0.1
            assert WINDOW <= path.engine.sent[SLOW] <= WINDOW + SOCKET
            assert path.agent.statistics.running == 1
            assert path.agent.statistics.outbox.unacknowledged_bytes <= WINDOW
            nursery.cancel_scope.cancel()
        await path.flushed()
        assert path.engine.open_now == 0


async def test_no_credit_no_reading(tmp_path: Path, autojump_clock: Any) -> None:
    """Credit comes by the mouthful, and so the engine is read."""
    taken = 0
    async with data_path(tmp_path, limits=LIMITS) as path:
        path.engine.script = flood

        def read(so_far: int) -> float:
            nonlocal taken
            taken = so_far
            return 1.0 if so_far < MIB else 0.0

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: path.ask(SLOW, read=read))
            most = 0
            while taken < MIB:
                await trio.sleep(0.1)
                most = max(most, path.engine.sent[SLOW] - taken)
        assert most <= WINDOW + SOCKET
        [client] = path.clients
        assert client.data == b"".join(chunk for _, chunk in flood(SLOW))
        await path.flushed()


async def test_client_that_pauses_restarts_nothing(tmp_path: Path, autojump_clock: Any) -> None:
    """The engine stands still because nobody takes what it has: whoever watches it must not see it busy."""
    liveness, looks = Liveness(30.0), 0
    async with data_path(tmp_path, limits=LIMITS) as path:
        path.engine.script = flood
        paused = 0

        def read(taken: int) -> float:
            nonlocal paused
            if taken >= MIB and not paused:
                paused = 1
                return 60.0
            return 0.0

        async with trio.open_nursery() as nursery:

            async def look() -> None:
                nonlocal looks
                while True:
                    proof = path.view.client.streamed
                    assert not liveness.hung(Sign(trio.current_time(), proof, path.view.client.waits.now))
                    looks += 1
                    await trio.sleep(1)

            nursery.start_soon(look)
            client = await path.ask(SLOW, read=read)
            nursery.cancel_scope.cancel()
        assert looks >= 60
        assert client.outcome is COMPLETE
        assert client.data == b"".join(chunk for _, chunk in flood(SLOW))
        assert path.agent.health.conditions() == []
        assert path.engine.asked[SLOW] == 1


@pytest.mark.parametrize("reads", [False, pytest.param(True, marks=pytest.mark.full)])
async def test_memory_is_bounded(tmp_path: Path, reads: bool, autojump_clock: Any) -> None:
    """10 MiB for each of 500: engine, agent and router in this one process, nobody keeps what arrived."""
    count, most, process = 500, 0, psutil.Process(os.getpid())
    async with data_path(tmp_path, ceiling=count, limits=LIMITS) as path:
        path.keep = False
        path.engine.script = flood
        before = process.memory_info().rss
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                nonlocal most
                while True:
                    most = max(most, process.memory_info().rss - before)
                    # And a few bytes around each piece.
                    assert path.agent.statistics.outbox.unacknowledged_bytes <= count * (WINDOW + KIB)
                    assert all(sent - 10 * MIB <= 0 for sent in path.engine.sent.values())
                    await trio.sleep(0.05)

            nursery.start_soon(watch)
            async with trio.open_nursery() as clients:
                for n in range(count):
                    clients.start_soon(lambda n=n: path.ask(b"%d" % n, read=lambda taken: 0.0 if reads else NEVER))
                if not reads:
                    await trio.sleep(60)
                    sent = path.engine.sent
                    assert len(sent) == count
                    assert max(sent.values()) <= WINDOW + SOCKET
                    clients.cancel_scope.cancel()
            nursery.cancel_scope.cancel()
        await path.flushed()
        assert path.engine.open_now == 0
        # A window in the router, as much unacknowledged and a read of 64 KiB in the agent, tasks and connections.
        assert most <= count * (2 * WINDOW + 256 * KIB)
        if reads:
            assert path.outcomes() == {"complete": count}
