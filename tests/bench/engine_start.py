"""Start of a model with compilation on, cold and warm, through the agent's engine service and by vLLM alone.

Run by hand in the root: `PYTHONPATH=.:tests python tests/bench/engine_start.py VLLM MODEL_DIR [NAME=VALUE ...]`, with
more of VLLM_ENV. Takes some minutes. The CPU time of the start is shown too: it tells more on a machine that is used by
others. Exit 1 when the agent's second start is not 1.5 times as fast as its first, or the
agent adds more than a tenth to a start of vLLM alone (both cold).
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import trio
from fakes.engine import assignment

from xim_agent.assignment.plan import EngineTarget
from xim_agent.clock import SystemClock
from xim_agent.config.fields import Config
from xim_agent.engine.guard import Guard
from xim_agent.engine.probe import Answer, Probe
from xim_agent.engine.service import EngineService
from xim_agent.engine.tree import cpu_seconds
from xim_agent.hardware.probe import probe
from xim_agent.health import Health


def running(guard: Guard) -> tuple[list[str], dict[str, str]]:
    """Command line (interpreter, script, arguments) and environment of the engine."""
    pid = Path(f"/proc/{guard.pid}/task/{guard.pid}/children").read_text().split()[0]
    argv = Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")
    env = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return argv[1:], dict(pair.split("=", 1) for pair in env if "=" in pair)


@dataclass(frozen=True)
class Seconds:
    wall: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.wall:5.1f} s ({self.cpu:5.1f} s CPU)"


Started = tuple[list[Seconds], list[str], dict[str, str]]


async def through_the_agent(guard: Guard, place: Path, vllm: str, model: Path, env: tuple[str, ...]) -> Started:
    """Seconds of the first and of the second start, and what was started."""
    service = EngineService(
        config=Config(vllm_path=vllm, vllm_env=env, max_num_seqs=8, drain_timeout_seconds=5),
        hardware=await probe(),
        guard=guard,
        runtime_dir=place / "run",
        clock=SystemClock(),
        health=Health(now=time.time),
        compile_cache=lambda version: place / "caches" / version,
        changed=lambda: None,
    )
    times = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.run)
        for _ in range(2):
            before = cpu_seconds(guard.pid)
            await service.switch(EngineTarget(assignment(), model))
            await service.wait_ready()
            wall = service.statistics().seconds_to_ready or 0.0
            times.append(Seconds(wall, cpu_seconds(guard.pid) - before))
            started = running(guard)
            await service.stop()
        nursery.cancel_scope.cancel()
    return times, *started


async def alone(argv: list[str], env: dict[str, str], place: Path) -> list[Seconds]:
    """The same command and environment with caches of its own, until the same proof: health and one token."""
    sock = str(place / "s")
    argv = [sock if before == "--uds" else word for before, word in zip(["", *argv], argv, strict=False)]
    known = env["VLLM_CACHE_ROOT"]
    env = {name: value.replace(known, str(place / "caches")) for name, value in env.items()}
    env |= {"TMPDIR": str(place), "VLLM_RPC_BASE_PATH": str(place)}
    times = []
    for _ in range(2):
        await trio.Path(sock).unlink(missing_ok=True)  # over a stale socket vLLM does not start
        begin = time.monotonic()
        process = await trio.lowlevel.open_process(argv, env=env, stdout=subprocess.DEVNULL)
        asked = Probe(sock, "generate")
        while await asked.health() is not Answer.OK:
            assert process.poll() is None, "vLLM has ended"
            await trio.sleep(0.25)
        await asked.one_token()
        times.append(Seconds(time.monotonic() - begin, cpu_seconds(process.pid)))
        process.terminate()
        await process.wait()
    return times


def show(name: str, starts: list[Seconds]) -> None:
    cold, warm = starts
    print(f"{name:>10}: cold {cold}, warm {warm}, ratio {cold.wall / warm.wall:.2f} ({cold.cpu / warm.cpu:.2f})")


async def run(guard: Guard, vllm: str, model: Path, place: Path, env: tuple[str, ...]) -> bool:
    ours, *started = await through_the_agent(guard, place, vllm, model, env)
    show("agent", ours)
    with tempfile.TemporaryDirectory(prefix="xim") as other:
        theirs = await alone(*started, Path(other))
    show("vLLM alone", theirs)
    more = [f"{a.wall / b.wall:.2f} ({a.cpu / b.cpu:.2f})" for a, b in zip(ours, theirs, strict=True)]
    print(f"agent / vLLM alone: cold {more[0]}, warm {more[1]}")
    return ours[0].wall / ours[1].wall >= 1.5 and ours[0].wall / theirs[0].wall <= 1.1


def main() -> None:
    vllm, model, env = sys.argv[1], Path(sys.argv[2]), tuple(sys.argv[3:])
    guard = Guard.start()
    try:
        with tempfile.TemporaryDirectory(prefix="xim") as place:
            good = trio.run(run, guard, vllm, model, Path(place), env)
    finally:
        guard.close()
    sys.exit(not good)


if __name__ == "__main__":
    main()
