"""The local router's own data path; by hand: `PYTHONPATH=. python tests/bench/fleet_streams.py [STREAMS] [SECONDS]`.

One agent answers STREAMS clients, each with an event of about 190 bytes every 20 ms, in one events call every 10 ms as
the real agent sends them. Prints the router's CPU per chunk, and how late chunks are at the client after the call of
the agent, with the lag of this process.
"""

import argparse
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import trio
from fleet import PORT, RouterProcess, at, prepare
from fleet_agents import MODEL, PIECE, Agent, Load, Wire

EVERY = 0.01
_encode = msgspec.msgpack.Encoder().encode


class Source(Agent):
    """Every second call has a chunk of a stream, the even leases' or the odd ones'."""

    leases: dict[int, int]

    async def run(self) -> None:
        """Until cancelled."""
        self.leases = {}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send)
            await super().run()

    async def _serve(self, lease: int) -> None:
        self.leases[lease] = 0

    async def _send(self) -> None:
        turn, due = 0, trio.current_time()
        while True:
            due += EVERY
            await trio.sleep_until(due)
            frames: list[Any] = []
            for lease, seq in self.leases.items():
                if not seq:
                    head = {"status": 200, "headers": {"content-type": "text/event-stream"}}
                    frames.append([lease, 0, "head", head])
                elif lease % 2 == turn % 2:
                    frames.append([lease, seq, "data", b"data: %.6f %s" % (time.perf_counter(), PIECE[22:])])
                else:
                    continue
                self.leases[lease] = seq + 1
            turn += 1
            if frames:
                body = _encode({"boot": self._boot, "frames": frames})
                await self._events.call("/v1/work/events", body, self._load.events)


async def client(load: Load, late: list[float]) -> None:
    headers = {"authorization": f"Bearer {load.key}", "content-type": "application/json"}
    wire = Wire(load, headers)
    await wire.ask("/v1/chat/completions", b'{"model":"%s","stream":true}' % MODEL.encode())
    while True:
        data = await wire.more()
        now = time.perf_counter()
        late.extend(now - float(piece[: piece.index(b" ")]) for piece in data.split(b"data: ")[1:])


async def run(streams: int, seconds: float, profile: str | None, data: Path) -> None:
    (token,), key = prepare(data, 1)
    load = Load("127.0.0.1", PORT, key)
    router = RouterProcess(data, argparse.Namespace(profile=profile, files=None))
    late: list[float] = []
    try:
        await router.ready()
        print(f"router is {router.pid}", flush=True)
        async with trio.open_nursery() as nursery:
            agent = Source(load, 1, token, ceiling=streams)
            nursery.start_soon(agent.run)
            await load.all_polled(1)
            for _ in range(streams):
                nursery.start_soon(client, load, late)
            with trio.fail_after(30):
                while len(late) < streams * 10:  # noqa: ASYNC110 until all streams run
                    await trio.sleep(0.1)
            late.clear()
            load.clear()
            began, cpu, own = time.perf_counter(), router.cpu(), time.process_time()
            await trio.sleep(seconds)
            took, cpu, own = time.perf_counter() - began, router.cpu() - cpu, time.process_time() - own
            nursery.cancel_scope.cancel()
        print(
            f"{streams} streams: {len(late) / took:.0f} chunks/s in {load.events.calls / took:.0f} calls/s,"
            f" router {cpu / len(late) * 1e6:.1f} us of CPU per chunk ({cpu / took:.2f} of a core, this process"
            f" {own / took:.2f}), late {statistics.median(late) * 1000:.1f} ms, p99 {at(late, 99) * 1000:.1f} ms,"
            f" peak {router.rss('VmHWM'):.0f} MiB"
        )
    finally:
        router.stop()


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the router must not be left behind
    words = sys.argv[1:]
    streams, seconds = int(words[0]) if words else 128, float(words[1]) if words[1:] else 10.0
    with tempfile.TemporaryDirectory() as scratch:
        trio.run(run, streams, seconds, words[2] if words[2:] else None, Path(scratch))


if __name__ == "__main__":
    main()
