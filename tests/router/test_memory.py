"""What a router keeps of requests and answers, and until when: a body may have 32 MiB, an answer take half an hour."""

import json
from typing import Any

import pytest
import trio
from fakes.agent import MODEL, Bench, FakeAgent, answer
from fakes.dispatching import World, head, stream
from fakes.garbage import watched

from xim_agent.router import incoming
from xim_agent.router.endpoint import Endpoint
from xim_agent.router.incoming import PATIENCE_SECONDS
from xim_agent.router.jobs import Limits
from xim_agent.router.replies import ApiError

SIZE = 8 << 20


@pytest.fixture
def world() -> World:
    return World()


async def test_a_body_is_there_once_and_until_the_client_has_data(bench: Bench, agent: FakeAgent) -> None:
    body = json.dumps({"model": MODEL, "stream": True, "prompt": "x" * SIZE}).encode()
    request = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {bench.api_key}\r\n"
    frames = answer([b"data: 1\n\n", b"data: 2\n\n"])
    await agent.poll(wait_ms=0)
    async with await trio.open_tcp_stream("127.0.0.1", int(bench.url.rpartition(":")[2])) as client:
        with watched(SIZE) as kept:
            await client.send_all(f"{request}content-length: {len(body)}\r\n\r\n".encode())
            await client.send_all(body)
            lease = await agent.take()
            url = f"{bench.url}/v1/work/leases/{lease['request']}/body"
            async with agent.http.stream("GET", url) as reply:
                assert sum([len(piece) async for piece in reply.aiter_bytes(65536)]) == len(body)
            await agent.events(lease["id"], frames[:1])
            assert len(kept()) == 1, "another agent may have to answer"
            await agent.events(lease["id"], frames[1:2])
            await received(client, b"data: 1\n\n")
            assert not kept()
        assert (await agent.http.get(url)).json()["code"] == "lease_unknown"
        await agent.events(lease["id"], frames[2:])
        await received(client, b"data: 2\n\n")


async def received(client: trio.SocketStream, end: bytes) -> None:
    """Until the client has a chunk that ends so."""
    data = b""
    with trio.fail_after(10):
        while end not in data:
            data += await client.receive_some()


def test_what_nobody_takes_is_dropped_with_the_client(world: World) -> None:
    """The lease goes on until the agent says that it ended, or is not heard of for a while."""
    job, lease = world.leased(body=b"{}")
    world.events((lease, 0, head(200, {})), (lease, 1, b"x"))
    assert (job.body, list(job.chunks)) == (b"{}", [b"x"]), "it is no stream: kept until its end"
    world.dispatch.release(job, world.now)
    world.events((lease, 2, b"x"))
    assert world.dispatch.agents["a"].grants[lease].job is job
    assert (job.body, list(job.chunks)) == (b"", [])


def test_bodies_that_wait_are_counted_until_they_are_dropped(world: World) -> None:
    world.answer(world.poll(capacity=0))
    jobs = [world.submit(body=b"x" * size) for size in (1, 10, 100)]
    assert world.dispatch.board.queues.bytes == 111
    world.dispatch.release(jobs[1], world.now)
    assert world.dispatch.board.queues.bytes == 101
    assert len(world.answer(world.poll(capacity=2)).leases) == 2
    assert world.dispatch.board.queues.bytes == 0
    assert [job.body for job in jobs] == [b"x", b"", b"x" * 100]


def test_endings_of_a_dead_agent_are_not_remembered(world: World) -> None:
    _, lease = world.leased()
    frames = stream(lease, [b"x"])
    assert world.events(*frames).acked == {lease: 2}
    world.pass_time(500)
    assert world.events(frames[-1]).acked == {lease: 2}, "it may not have heard of that"
    world.pass_time(700)
    assert not world.dispatch.agents["a"].finished
    assert world.events(frames[-1]).unknown == [lease], "that settles it as well"


def test_an_agent_silent_for_a_day_is_forgotten() -> None:
    world = World(Limits(ttl=1e6))
    agents, diary = world.dispatch.agents, world.dispatch.board.diary
    world.leased()
    world.ready("waits")
    for phase in ("starting", "degraded"):
        world.answer(world.poll("quiet", phase=phase, wait_ms=0))
    diary.written()
    world.pass_time(86_000)
    assert set(agents) == {"a", "waits", "quiet"}
    assert diary.of("quiet")
    world.pass_time(401)
    assert set(agents) == {"a", "waits"}, "it is not silent, or has a lease that goes on"
    assert not diary.of("quiet")


def test_a_forgotten_agent_comes_back_as_after_a_restart_of_the_router(world: World) -> None:
    _, before = world.leased()
    world.events(*stream(before, [b"x"]))
    world.pass_time(90_000)
    assert not world.dispatch.agents
    reply = world.answer(world.poll(held=[before]))
    assert (reply.generation, reply.cancel) == (1, [before])
    poll, job = world.poll(), world.submit()
    (lease,) = world.answer(poll).leases
    assert lease.request == job.request
    assert lease.id != before, "the same process may know that one"


def test_who_is_to_be_forgotten_is_looked_for_once_a_minute(world: World) -> None:
    world.answer(world.poll(capacity=0))
    world.pass_time(86_350)
    world.pass_time(59)
    assert world.dispatch.agents
    world.pass_time(1)
    assert not world.dispatch.agents


class Sends:
    """A call whose body comes in parts of SIZE bytes: before each a pause of so many seconds, and silence at last.

    `kept`: of the parts that came before, at each time when more is waited for.
    """

    def __init__(self, *pauses: float) -> None:
        self.pauses = list(pauses)
        self.kept: list[int] = []
        self.status: int | None = None

    async def run(self, *, limit: int = 1 << 30, refused: bool = False) -> float:
        """Until the router gives up; returns how many seconds that took."""
        began = trio.current_time()

        def admit(_: object) -> None:
            if refused:
                raise ApiError(401, "invalid_api_key", "no")

        async def handle(request: Any, _: None) -> Any:
            raise ApiError(418, "teapot", f"{len(await request.body())}")

        with trio.fail_after(3600), watched(SIZE) as kept:
            self._count = kept
            endpoint = Endpoint(frozenset({"POST"}), limit, admit, handle)
            scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
            await endpoint(scope, self._receive, self._send)
            assert not kept()
        return trio.current_time() - began

    async def _receive(self) -> Any:
        self.kept.append(len(self._count()))
        if not self.pauses:
            await trio.sleep_forever()
        await trio.sleep(self.pauses.pop(0))
        return {"type": "http.request", "body": bytes(SIZE), "more_body": True}

    async def _send(self, message: Any) -> None:
        self.status = message.get("status", self.status)


@pytest.mark.parametrize("refused", [False, True])
async def test_a_client_that_falls_silent_in_its_request_is_given_up(refused: bool, autojump_clock: Any) -> None:
    sends = Sends(0, PATIENCE_SECONDS - 1, PATIENCE_SECONDS - 1)
    assert await sends.run(refused=refused) == 3 * PATIENCE_SECONDS - 2
    assert sends.kept == ([0, 0, 0, 0] if refused else [0, 1, 2, 3])
    assert sends.status == (401 if refused else 408)


async def test_what_came_of_a_body_that_is_too_large_is_not_kept_while_the_rest_comes(autojump_clock: Any) -> None:
    sends = Sends(0, 0, 0, 0)
    await sends.run(limit=2 * SIZE)
    assert sends.kept == [0, 1, 2, 0, 0]


async def test_the_connection_of_such_a_client_is_closed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "PATIENCE_SECONDS", 0.01)
    async with await trio.open_tcp_stream("127.0.0.1", int(bench.url.rpartition(":")[2])) as client:
        fields = f"host: x\r\nauthorization: Bearer {bench.api_key}\r\ncontent-length: 9\r\n\r\n"
        await client.send_all(f"POST /v1/completions HTTP/1.1\r\n{fields}half".encode())
        with trio.fail_after(10):
            reply = b"".join([part async for part in client])
    assert reply.startswith(b"HTTP/1.1 408")
    assert b'"code": "request_timeout"' in reply
