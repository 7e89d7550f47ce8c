"""A whole agent tree over a scripted vLLM, without a router, to be ended in every way: `agent_with_engine.py RUNTIME`.

Guard, signals, drain and engine are the real ones. RUNTIME/model holds a model. Writes RUNTIME/ready at each start that
becomes ready, with the pids of agent and guard, and a line to RUNTIME/failures for each engine that failed.
A request without an end runs all the time.
"""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import trio
from engine import Bench, until  # its neighbour: this file is run as a program

from xim_agent import agent
from xim_agent.engine.client import EngineLost
from xim_agent.engine.guard import Guard
from xim_agent.engine.service import EngineService
from xim_agent.hardware.host import oom_kills

LONG = {"model": "m", "prompt": "hi", "stream": True, "max_tokens": 1_000_000, "fake": {"delay": 0.05}}


class Idle:
    """Identity, sender: nothing to do."""

    async def run(self) -> None:
        await trio.sleep_forever()

    async def flushed(self) -> None:
        return

    def spool(self) -> None:
        return

    def remains(self) -> dict[str, int]:
        return {"requests": 0, "leases": 0}


class Assignment:
    def __init__(self, bench: Bench, engine: EngineService) -> None:
        self.bench, self.engine = bench, engine

    async def run(self) -> None:
        await self.engine.switch(self.bench.target())
        await trio.sleep_forever()


class Work:
    """Always one request, until the drain."""

    def __init__(self, bench: Bench, engine: EngineService) -> None:
        self.bench, self.engine, self.draining = bench, engine, False

    async def run(self, work: trio.Nursery) -> None:
        while not self.draining:
            await self.engine.wait_ready()
            work.start_soon(self.request)
            ready = self.bench.runtime / "ready"
            pids = {"agent": os.getpid(), "guard": self.bench.guard.pid, "start": len(self.bench.starts)}
            ready.with_suffix(".new").write_text(json.dumps(pids))
            ready.with_suffix(".new").rename(ready)
            await until(lambda: not self.engine.ready, float("inf"))
        await trio.sleep_forever()

    async def request(self) -> None:
        with suppress(EngineLost):
            async with self.engine.client.open("/v1/completions", {}, json.dumps(LONG).encode()) as reply:
                async for _ in reply.chunks():
                    pass

    def drain(self) -> None:
        self.draining = True

    async def told_draining(self) -> None:
        await trio.lowlevel.checkpoint()


def note_failure(bench: Bench, engine: EngineService) -> None:
    failed = [row for row in bench.health.report() if row["code"] == "engine_failed"]
    if failed:
        with (bench.runtime / "failures").open("a") as file:
            file.write(json.dumps({"class": engine.statistics().failure, **failed[0]}) + "\n")


def main() -> None:
    runtime = Path(sys.argv[1])
    guard = Guard.start()
    env = {name: value for name, value in os.environ.items() if name.startswith("FAKE_VLLM_")}
    settings = {"engine_hang_seconds": float(os.environ.get("HANG_SECONDS", "60"))}
    bench = Bench(guard, runtime, runtime / "model", env=env, settings=settings, oom_kills=oom_kills)

    async def run() -> None:
        engine = bench.service()
        bench.health.on_change = lambda: note_failure(bench, engine)
        idle = Idle()
        drain = float(os.environ.get("DRAIN_SECONDS", "0.5"))
        await agent.run(
            agent.Parts(
                identity=idle, engine=engine, assignment=Assignment(bench, engine), poller=Work(bench, engine),
                sender=idle, listeners=(), drain_seconds=drain,
            )
        )  # fmt: skip

    try:
        trio.run(run)
    finally:
        guard.close()


if __name__ == "__main__":
    main()
