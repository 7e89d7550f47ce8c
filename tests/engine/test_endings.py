"""However it ends, nothing of ours is left 10 s later, and all of a neighbour's is.

The launcher is as hard to end as can be: its engine core and its worker have sessions of their own, ignore SIGTERM,
hold shared memory, and a request runs. One agent an ending, all at once, and a neighbour's between them.

Out of memory: the whole agent is in a cgroup, as in a container, and the kernel's OOM killer takes what is largest of
the engine. Where no memory cgroup can be made (a plain user's machine), an RLIMIT_AS refuses the memory instead.
"""

import json
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import trio
from fakes.cgroup import memory_limit
from fakes.engine import alive, shm, until, write_model

from xim_agent.engine.tree import descendants

AGENT = Path(__file__).parent.parent / "fakes" / "agent_with_engine.py"
HARD = {"FAKE_VLLM_CORE": "1", "FAKE_VLLM_WORKER": "1", "FAKE_VLLM_SHM": "1"}
GONE_SECONDS = 10.0
LIMIT = 192 << 20  # an agent and its guard take 60 MiB of it, each process of the fake 15


@dataclass
class Running:
    """`tree`: API server, engine core, worker. `shm`: names of the files in /dev/shm that were noted as theirs."""

    runtime: Path
    agent: int
    guard: int
    tree: list[int]
    shm: set[str]
    process: trio.Process

    @property
    def socket(self) -> Path:
        return self.runtime / "engine.sock"

    def untouched(self) -> None:
        assert all(map(alive, [self.agent, self.guard, *self.tree]))
        assert self.shm <= shm()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self.socket))

    def ready_again(self) -> bool:
        return bool(json.loads((self.runtime / "ready").read_text())["start"] == 2)


def tree(guard: int) -> list[int]:
    """By age: API server, engine core, worker."""
    return [p.pid for p in sorted(descendants(guard), key=lambda p: (p.started, p.pid))]


def noted(runtime: Path) -> set[str]:
    return set(json.loads((runtime / "leftovers.json").read_text())["shm"])


@asynccontextmanager
async def agent(runtime: Path, before: Sequence[str] = (), **env: str) -> AsyncIterator[Running]:
    """A running agent with a ready engine. Nothing of it is left afterwards in any case."""
    write_model(runtime / "model")
    command = [*before, sys.executable, str(AGENT), str(runtime)]
    paths = {"PYTHONPATH": f"{AGENT.parent.parent.parent}"}
    log = (runtime / "log").open("wb")
    process = await trio.lowlevel.open_process(command, env={**os.environ, **paths, **HARD, **env}, stderr=log)
    log.close()
    pids: list[int] = []
    try:
        await until((runtime / "ready").exists, 60)
        told = json.loads((runtime / "ready").read_text())
        await until(lambda: len(tree(told["guard"])) == 3 and len(noted(runtime)) == 2, 30)
        pids = tree(told["guard"])
        yield Running(runtime, told["agent"], told["guard"], pids, noted(runtime), process)
    finally:
        if process.returncode is None:
            process.kill()
        with trio.move_on_after(GONE_SECONDS, shield=True):
            await process.wait()
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)


Strike = Callable[[Running], Awaitable[None]]


def kill(victim: Callable[[Running], int], signum: signal.Signals = signal.SIGKILL) -> Strike:
    async def strike(running: Running) -> None:
        os.kill(victim(running), signum)

    return strike


async def terminate_twice(running: Running) -> None:
    running.process.terminate()
    await trio.sleep(1.2)  # signals.py takes two within a second for one of a terminal
    assert running.process.returncode is None, "it drains"
    running.process.terminate()


async def out_of_memory(running: Running) -> None:
    (running.runtime / "control").write_text("oom")


async def worker_at_its_cpu_limit(running: Running) -> None:
    """The kernel's own SIGKILL, as its OOM killer sends it."""
    (running.runtime / "control").write_text("compute")
    resource.prlimit(running.tree[2], resource.RLIMIT_CPU, (0, 0))


# What ends, how, and whether the agent lives on and starts the engine again; else its exit status.
ENDINGS: dict[str, tuple[Strike, dict[str, str], int | None]] = {
    "drain": (kill(lambda r: r.agent, signal.SIGTERM), {}, 0),
    "second signal": (terminate_twice, {"DRAIN_SECONDS": "60"}, 0),
    "kill -9 of the agent": (kill(lambda r: r.agent), {}, -9),
    "kill -9 of the guard": (kill(lambda r: r.guard), {}, 1),
    "kill -9 of the API server": (kill(lambda r: r.tree[0]), {}, None),
    "kill -9 of EngineCore": (kill(lambda r: r.tree[1]), {}, None),
    "kill -9 of the worker": (kill(lambda r: r.tree[2]), {}, None),
    "out of memory, by rlimit": (out_of_memory, {}, None),
    "killed by the kernel, by rlimit": (worker_at_its_cpu_limit, {}, None),
    **{
        name: (out_of_memory, env, None)
        for name, env in {
            "OOM kill of the worker": {"FAKE_VLLM_OOM": "worker"},
            "OOM kill of EngineCore": {"FAKE_VLLM_OOM": "core"},
            "OOM kill, the API server lives and says so": {"FAKE_VLLM_OOM": "worker", "FAKE_VLLM_SURVIVES": "503"},
            "OOM kill, the API server lives as if all were well": {
                "FAKE_VLLM_OOM": "core", "FAKE_VLLM_SURVIVES": "200", "HANG_SECONDS": "3",
            },
        }.items()
    },
}  # fmt: skip


def for_want_of_memory(runtime: Path, killed: bool) -> None:
    """`killed`: by the kernel, so that nobody of the engine could say why."""
    (failure,) = [json.loads(line) for line in (runtime / "failures").read_text().splitlines()]
    assert failure["class"] == "host_out_of_memory"
    assert "give the host or the container more memory" in failure["hint"]
    if killed:
        assert "the kernel has killed for want of memory (in the agent's own container or unit)" in failure["text"]


async def ends(name: str, runtime: Path, neighbour: Running) -> None:
    with memory_limit(LIMIT) if name.startswith("OOM") else nullcontext([]) as before:
        await _ends(name, runtime, neighbour, before)


async def _ends(name: str, runtime: Path, neighbour: Running, before: Sequence[str]) -> None:
    strike, env, status = ENDINGS[name]
    async with agent(runtime, before, **env) as running:
        try:
            await strike(running)
            ours = running.tree if status is None else [running.agent, running.guard, *running.tree]
            await until(lambda: not any(map(alive, ours)) and not running.shm & shm(), GONE_SECONDS)
            if status is None:
                (runtime / "control").write_text("")
                await until(running.ready_again, 30)
                if strike is out_of_memory:
                    for_want_of_memory(runtime, killed=bool(before))
                neighbour.untouched()
                running.process.terminate()
                status = 0
            assert await running.process.wait() == status
        except BaseException as error:
            error.add_note(f"{name}:\n{(runtime / 'log').read_text(errors='replace')[-3000:]}")
            raise
        left = {*os.listdir(runtime)} & {"engine.sock", "leftovers.json"} | {*os.listdir(runtime / "t")}  # noqa: PTH208
        assert not left, name


async def test_nothing_is_left_and_a_neighbour_is_untouched(runtime: Path) -> None:
    places = [runtime / str(number) for number in range(len(ENDINGS) + 1)]
    for place in places:
        place.mkdir()
    async with agent(places[0]) as neighbour:
        async with trio.open_nursery() as nursery:
            for name, place in zip(ENDINGS, places[1:], strict=True):
                nursery.start_soon(ends, name, place, neighbour)
        neighbour.untouched()
        assert not (places[0] / "starts").read_text().split()[1:], "its engine was not started again"
