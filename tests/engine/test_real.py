"""The same service over real vLLM on a CPU."""

import json
import os
import signal
import time
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


@pytest.mark.engine
async def test_real_vllm_serves_dies_and_leaves_nothing(
    guard: Guard, runtime: Path, toy_model: Path, vllm_launcher: str, nursery: trio.Nursery, error_logs: list[Any]
) -> None:
    service = EngineService(
        config=Config(vllm_path=vllm_launcher, vllm_args=("--enforce-eager",), max_num_seqs=8, drain_timeout_seconds=5),
        hardware=CPU_HOST,
        guard=guard,
        runtime_dir=runtime,
        clock=SystemClock(),
        health=Health(now=time.time),
        compile_cache=lambda version: runtime / version,
        changed=lambda: None,
    )
    nursery.start_soon(service.run)
    await service.switch(EngineTarget(assignment(), toy_model))
    with trio.fail_after(START_SECONDS):
        await service.wait_ready()
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


async def completion(service: EngineService, body: dict[str, Any]) -> bytes:
    headers = {"content-type": "application/json"}
    async with service.client.open("/v1/completions", headers, json.dumps(body).encode()) as reply:
        return b"".join([chunk async for chunk in reply.chunks()])
