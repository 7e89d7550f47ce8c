"""The same service over real vLLM on a CPU."""

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from fakes.engine import CPU_HOST, alive, assignment, shm, until

from xim_agent.assignment.plan import EngineTarget
from xim_agent.clock import SystemClock
from xim_agent.config.fields import Config
from xim_agent.engine.client import EngineLost
from xim_agent.engine.guard import Guard
from xim_agent.engine.service import EngineService
from xim_agent.engine.tree import descendants
from xim_agent.health import Health

START_SECONDS = 240  # of a loaded machine with two cores; alone it takes 20


@pytest.fixture
def service(guard: Guard, runtime: Path, vllm_launcher: str) -> EngineService:
    return EngineService(
        config=Config(vllm_path=vllm_launcher, vllm_args=("--enforce-eager",), max_num_seqs=8, drain_timeout_seconds=5),
        hardware=CPU_HOST,
        guard=guard,
        runtime_dir=runtime,
        clock=SystemClock(),
        health=Health(now=time.time),
        compile_cache=lambda version: runtime / version,
        changed=lambda: None,
    )


async def ready(service: EngineService) -> None:
    with trio.fail_after(START_SECONDS):
        await service.wait_ready()


@pytest.mark.engine
async def test_real_vllm_serves_dies_and_leaves_nothing(
    service: EngineService, guard: Guard, runtime: Path, toy_model: Path, nursery: trio.Nursery, error_logs: list[Any]
) -> None:
    nursery.start_soon(service.run)
    await service.switch(EngineTarget(assignment(), toy_model))
    await ready(service)
    assert service.ceiling == 8
    body = {"model": "m", "prompt": "The router", "max_tokens": 8, "temperature": 0, "stream": True}
    answer = await completion(service, body)
    assert answer.endswith(b"data: [DONE]\n\n")
    await until(lambda: service.load().running == 0)
    tree = [p.pid for p in descendants(guard.pid)]
    api_server = min(tree)
    assert len(tree) >= 3, "API server, EngineCore, worker"
    notes = runtime / "leftovers.json"
    await until(lambda: "psm_" in notes.read_text())
    noted = json.loads(notes.read_text())["shm"]

    async def strike() -> None:
        await until(lambda: service.client.active == 1)
        os.kill(api_server, signal.SIGKILL)

    nursery.start_soon(strike)
    with trio.fail_after(10), pytest.raises(EngineLost):
        await completion(service, {**body, "max_tokens": 15000, "ignore_eos": True})
    await until(lambda: not any(map(alive, tree)), 10)
    await service.stop()
    assert descendants(guard.pid) == []
    assert not set(noted) & shm()
    assert not (runtime / "engine.sock").exists()


def process_named(guard: Guard, name: str) -> int:
    """Pid of EngineCore or worker, as vLLM calls them."""
    found = [p.pid for p in descendants(guard.pid) if name in Path(f"/proc/{p.pid}/cmdline").read_text()]
    assert len(found) == 1, name
    return found[0]


async def asked_for_ever(service: EngineService, number: int) -> None:
    """One long request after the other; ends with the engine."""
    with suppress(EngineLost):
        while True:
            text = f"The router {number}"
            await completion(service, {"model": "m", "prompt": text, "max_tokens": 4000, "ignore_eos": True})


@pytest.mark.engine
@pytest.mark.full
async def test_a_real_hang_is_cured_a_full_queue_is_not_and_a_dead_worker_leaves_nothing(
    service: EngineService, guard: Guard, runtime: Path, toy_model: Path, nursery: trio.Nursery, error_logs: list[Any]
) -> None:
    nursery.start_soon(service.run)
    await service.switch(EngineTarget(assignment(), toy_model))
    await ready(service)
    for number in range(24):  # three for each place that it has
        nursery.start_soon(asked_for_ever, service, number)
    await until(lambda: (service.load().waiting or 0) >= 8)
    with trio.move_on_after(75):  # longer than a hang may last
        await until(lambda: not service.ready, 100)
    assert service.ready, [record.getMessage() for record in error_logs]
    assert (service.load().waiting or 0) >= 8

    tree = [p.pid for p in descendants(guard.pid)]
    os.kill(process_named(guard, "VLLM::EngineCore"), signal.SIGSTOP)
    stopped = trio.current_time()
    await until(lambda: not service.ready, 75)
    print(f"EngineCore under SIGSTOP: given up after {trio.current_time() - stopped:.1f} s")
    await ready(service)
    print(f"EngineCore under SIGSTOP: ready again after {trio.current_time() - stopped:.1f} s")
    assert "made no step" in error_logs[0].getMessage()
    assert not any(map(alive, tree))
    body = {"model": "m", "prompt": "The router", "max_tokens": 8}
    assert b"text_completion" in await completion(service, body)

    await until(lambda: "psm_" in (runtime / "leftovers.json").read_text())
    noted = json.loads((runtime / "leftovers.json").read_text())["shm"]
    tree = [p.pid for p in descendants(guard.pid)]
    os.kill(process_named(guard, "VLLM::Worker"), signal.SIGKILL)
    killed = trio.current_time()
    await until(lambda: not service.ready, 30)
    print(f"worker killed: seen after {trio.current_time() - killed:.1f} s")
    await until(lambda: not any(map(alive, tree)), 10)
    await until(lambda: not set(noted) & shm(), 1)
    await ready(service)
    await service.stop()
    assert descendants(guard.pid) == []


async def completion(service: EngineService, body: dict[str, Any]) -> bytes:
    headers = {"content-type": "application/json"}
    async with service.client.open("/v1/completions", headers, json.dumps(body).encode()) as reply:
        return b"".join([chunk async for chunk in reply.chunks()])
