"""The work side over sockets to a router whose replies make no sense for a while: counted, and it goes on."""

from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import trio
import zstandard

from xim_agent.backoff import Backoff
from xim_agent.clock import SystemClock
from xim_agent.health import Health
from xim_agent.mesh import codec
from xim_agent.mesh.messages import End, EventsReply, Lease, Load, PollReply
from xim_agent.work.link import Link
from xim_agent.work.poller import Poller
from xim_agent.work.sender import Sender
from xim_agent.work.spool import Spool

PACKED = {"content-encoding": "zstd"}


def pack(**members: Any) -> tuple[dict[str, str], bytes]:
    return {}, msgspec.msgpack.encode(members)


SENSELESS: list[tuple[dict[str, str], bytes]] = [
    ({}, b""),
    ({}, b"<html>welcome to the hotel</html>"),
    ({}, msgspec.msgpack.encode([1])),
    ({}, b"\xc1"),
    ({}, b"\x91" * 60_000),
    ({}, b"\x81\xa6cancel"),
    (PACKED, b"no zstd"),
    (PACKED, zstandard.compress(bytes(70_000_000))),
    ({"content-encoding": "gzip"}, b"x"),
    pack(credit={"a": 1}),
    pack(credit={1: 2**80 / 3}),
    pack(cancel=7),
    pack(cancel=[None]),
]
POLLS = [
    pack(leases=5), pack(leases=[1]), pack(generation="new"), pack(drain="yes"), pack(retry_ms=1.5),
    pack(idle_reason=b"x"), ({}, b"\x81\xabidle_reason\xa2\xff\xfe"),
]  # fmt: skip
EVENTS = [pack(acked=[1]), pack(acked={1: None}), pack(unknown={1: 1}), pack(acked={1: 2**64 - 1}, unknown="x")]
LEASE = Lease(1, "r", "POST", "/v1/completions", {}, b"{}", True, "t", 60_000, 10_000)


class Engine:
    """Says what is asked of an engine, and answers with two pieces."""

    ready, degraded, ceiling, status, headers = True, False, 4, 200, {"content-type": "text/plain"}

    @property
    def client(self) -> "Engine":
        return self

    def load(self) -> Load:
        return Load()

    @asynccontextmanager
    async def open(self, *_: Any, **__: Any) -> Any:
        await trio.lowlevel.checkpoint()
        yield self

    async def relay(self, taker: Any) -> None:
        for piece in (b"one", b"two"):
            await trio.lowlevel.checkpoint()
            if not taker.take(piece):
                await taker.room()


async def test_it_goes_on_when_replies_make_sense_again(
    client: Any, start: Any, login: Any, answer: Any, tmp_path: Path, nursery: trio.Nursery
) -> None:
    polls, events = [*SENSELESS, *POLLS], [*SENSELESS, *EVENTS]
    senseless = len(polls) + len(events)
    frames: dict[int, Any] = {}
    given = False

    async def reply(call: Any) -> Any:
        nonlocal given
        if call.path == "/v1/work/events":
            body = zstandard.decompress(call.body) if "content-encoding" in call.headers else call.body
            if events:
                return answer(200, *events.pop(0))
            for raw in codec.decode_events_request(body).frames:
                _, seq, _, payload = codec.decode_frame(raw)
                assert frames.setdefault(seq, payload) == payload
            return answer(body=codec.encode(EventsReply(acked={1: max(frames)})))
        if polls:
            return answer(200, *polls.pop(0))
        if given:
            await trio.sleep_forever()
        given = True
        return answer(body=codec.encode(PollReply(leases=[LEASE])))

    server = await start(reply)
    client.credentials = login(server.url)
    health = Health(SystemClock().now)
    link = Link(health=health)
    link._backoff = Backoff(0.001, 0.001)
    sender = Sender(router=client, boot="b", link=link, spool=Spool(tmp_path / "spool"))
    poller = Poller(
        router=client, sender=sender, engine=Engine(), link=link, health=health, clock=SystemClock(), boot="b",
        generation_seen=lambda generation: None, model=lambda: None, progress=lambda: None,
    )  # fmt: skip
    async with trio.open_nursery() as services:
        services.start_soon(sender.run)
        services.start_soon(poller.run, services)
        with trio.fail_after(30):
            while not (given and frames and not len(sender.leases)):
                await link.next_call()
        statistics = poller.statistics()
        services.cancel_scope.cancel()
    assert [p for _, p in sorted(frames.items())][1:3] == [b"one", b"two"]
    assert isinstance(frames[3], End)
    # Of one reply only a lease made no sense: the call itself did not fail.
    assert client.statistics().failures == {
        "reply_malformed": senseless - 3, "reply_too_large": 2, "lease_malformed": 1,
    }  # fmt: skip
    assert statistics.failed_polls + statistics.sender.failed_calls == senseless - 1
    assert statistics.sender.ended == {"complete": 1}
    assert health.conditions() == []
