"""The agent's work side against the local router's dispatcher, through calls that are lost, repeated and reordered."""

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from msgspec import Raw

from xim_agent.mesh import codec
from xim_agent.mesh.messages import EventsReply, ModelState, PollReply, PollRequest
from xim_agent.outcome import RouterError
from xim_agent.router.dispatch import Dispatch
from xim_agent.router.fleet import Duty
from xim_agent.router.jobs import COMPLETE, Job, Limits
from xim_agent.watch import Watch
from xim_agent.work.poller import Poller

DUTY = Duty("p", 1, "m")


def answer(body: bytes) -> list[bytes]:
    """What the engine says to `body`: the same every time."""
    dice = random.Random(body)
    return [dice.randbytes(dice.choice((1, 50, 200, 5000))) for _ in range(dice.randint(0, 60))]


class Link:
    """§5 over a bad line. `fault`: how likely each mishap is."""

    def __init__(self, dispatch: Dispatch, seed: int, fault: float) -> None:
        self.dispatch, self.dice, self.fault = dispatch, random.Random(seed), fault

    def mishap(self) -> None:
        if self.dice.random() < self.fault:
            raise RouterError("connection_lost", "lost")

    async def poll(self, request: PollRequest) -> PollReply:
        await trio.sleep(self.dice.uniform(0, 0.05))
        self.mishap()
        request = codec.decode_poll_request(codec.encode(request))
        watch, now = Watch(), trio.current_time()
        poll = self.dispatch.poll(
            "a", DUTY, request, serves="m", address="a:1", wake=watch.bump, now=now, wall=1e9 + now
        )
        seen = 0
        try:
            while (reply := self.dispatch.answer(poll, trio.current_time())) is None:
                with trio.move_on_at(poll.until):
                    seen = await watch.wait_beyond(seen)
        finally:
            self.dispatch.abandon(poll, trio.current_time())
        await trio.sleep(self.dice.uniform(0, 0.05))
        self.mishap()
        return codec.decode_poll_reply(codec.encode(reply))

    async def events(self, boot: str, frames: Sequence[Raw]) -> EventsReply:
        await trio.sleep(self.dice.uniform(0, 0.2))
        self.mishap()
        decoded = [(lease, seq, payload) for lease, seq, _, payload in map(codec.decode_frame, frames)]
        for _ in range(1 + (self.dice.random() < self.fault)):
            reply = self.dispatch.events("a", boot, decoded, trio.current_time())
        await trio.sleep(self.dice.uniform(0, 0.2))
        self.mishap()
        return codec.decode_events_reply(codec.encode(reply))

    async def lease_body(self, request_id: str) -> bytes:
        await trio.lowlevel.checkpoint()
        job = self.dispatch.held_job("a", request_id)
        if job is None:
            raise RouterError("lease_unknown", "no such lease", status=404)
        return job.body


class Reply:
    status = 200
    headers = {"content-type": "text/event-stream"}  # noqa: RUF012

    def __init__(self, body: bytes) -> None:
        self.body = body

    async def relay(self, taker: Any) -> None:
        dice = random.Random(self.body)
        for chunk in answer(self.body):
            await trio.sleep(dice.choice((0.0, 0.002, 0.05)))
            if not taker.take(chunk):
                await taker.room()


@asynccontextmanager
async def open_engine(path: str, headers: Any, body: bytes, *, tenant: str = "") -> AsyncIterator[Reply]:
    await trio.lowlevel.checkpoint()
    yield Reply(body)


@pytest.fixture
def dispatch(window: int) -> Dispatch:
    return Dispatch(Limits(window=window))


@pytest.fixture
async def client(dispatch: Dispatch, nursery: trio.Nursery) -> Callable[..., Any]:
    async def tick() -> None:
        while True:
            dispatch.tick(trio.current_time())
            await trio.sleep(0.25)

    async def ask(number: int, got: dict[int, tuple[Any, bytes]], give_up: bool) -> None:
        """Reads an answer slowly; may go away half-way."""
        watch, dice, data = Watch(), random.Random(number), b""
        body = b"x" * (1_200_000 if number % 10 == 3 else 10) + str(number).encode()
        job = Job(
            request=f"r{number}", project="p", model="m", path="/v1/completions", headers={}, body=body, stream=True,
            tenant="t", wake=watch.bump, expected=True,
        )  # fmt: skip
        dispatch.submit(job, trio.current_time())
        while True:
            seen = watch.version
            if job.chunks:
                part = dispatch.take(job)
                await trio.sleep(dice.uniform(0, 0.1))
                data += part
                dispatch.consumed(job, len(part), trio.current_time())
                if give_up:
                    break
            elif job.outcome is not None:
                break
            else:
                await watch.wait_beyond(seen)
        dispatch.release(job, trio.current_time())
        got[number] = job.outcome, data

    nursery.start_soon(tick)
    return ask


@pytest.mark.parametrize(
    ("seed", "fault", "window"),
    [(1, 0.0, 8192), (2, 0.05, 1 << 19), (3, 0.15, 1 << 19), (4, 0.15, 8192), (5, 0.15, 16384)],
)
async def test_every_answer_arrives_whole(
    boot: Any, dispatch: Dispatch, client: Any, seed: int, fault: float, autojump_clock: Any
) -> None:
    bench = await boot(start=False)
    link = Link(dispatch, seed, fault)
    bench.engine.ceiling = 32
    bench.engine.open = open_engine
    bench.sender._router = bench.poller._router = link
    bench.poller._model = lambda: ModelState("m", "r", 1)
    await bench.start()
    while not any(agent.key for agent in dispatch.agents.values()):
        await bench.link._changed.wait_beyond(bench.link._changed.version)
    got: dict[int, tuple[Any, bytes]] = {}
    async with trio.open_nursery() as clients:
        for number in range(60):
            clients.start_soon(client, number, got, number % 7 == 0)
            await trio.sleep(0.02)
    for number, (outcome, data) in got.items():
        whole = b"".join(answer(b"x" * (1_200_000 if number % 10 == 3 else 10) + str(number).encode()))
        if number % 7:
            assert outcome is COMPLETE
            assert data == whole
        else:
            assert whole.startswith(data)
    link.fault = 0.0
    with trio.fail_after(60):
        await bench.sender.flushed()
    statistics = bench.poller.statistics().sender
    assert statistics.running == 0
    assert statistics.outbox.unacknowledged == 0
    assert statistics.ended["complete"] >= 60 - 9
    assert set(statistics.ended) <= {"complete", "cancelled", "unknown"}
    assert isinstance(bench.poller, Poller)
