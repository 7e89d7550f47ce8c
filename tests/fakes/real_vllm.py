"""A service over real vLLM on a CPU, and what vLLM tells of itself."""

import array
import ast
import json
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from fakes.engine import CPU_HOST, until

from xim_agent.clock import SystemClock
from xim_agent.config.fields import Config
from xim_agent.engine.guard import Guard
from xim_agent.engine.service import EngineService
from xim_agent.engine.tree import descendants
from xim_agent.hardware.report import Hardware
from xim_agent.health import Health

START_SECONDS = 480  # of a machine that is busy with much else; alone two cores take 20
JSON = {"content-type": "application/json"}
_ARGUMENTS = "non-default args: "


def real_service(config: Config, guard: Guard, runtime: Path, hardware: Hardware = CPU_HOST) -> EngineService:
    """Compile caches lie in the model cache, as in an agent."""
    return EngineService(
        config=config,
        hardware=hardware,
        guard=guard,
        runtime_dir=runtime,
        clock=SystemClock(),
        health=Health(now=time.time),
        compile_cache=lambda version: config.model_cache_path / version,
        changed=lambda: None,
    )


async def ready(service: EngineService) -> None:
    """Fails at once when it cannot be expected any more."""
    await until(lambda: service.ready or service.degraded, START_SECONDS)
    assert service.ready, service.statistics()


async def post(service: EngineService, path: str, body: Mapping[str, Any], tenant: str = "") -> Any:
    """The answer, decoded."""
    async with service.client.open(path, JSON, json.dumps(body).encode(), tenant=tenant) as reply:
        raw = b"".join([chunk async for chunk in reply.chunks()])
    assert reply.status == 200, raw
    return json.loads(raw)


async def server_info(service: EngineService) -> dict[str, Any]:
    """vLLM's configuration and variables; it tells them with VLLM_SERVER_DEV_MODE=1."""
    found: dict[str, Any] = json.loads(await _get(service, "/server_info?config_format=json"))
    return found


async def counters(service: EngineService, prefix: str) -> dict[str, float]:
    """Of its metrics now, those that begin so, without labels and prefix; all engines together."""
    found: dict[str, float] = {}
    for line in (await _get(service, "/metrics")).splitlines():
        if line.startswith(prefix):
            name = line.removeprefix(prefix).partition("{")[0]
            found[name] = found.get(name, 0.0) + float(line.rpartition(" ")[2])
    return found


async def _get(service: EngineService, path: str) -> str:
    transport = httpx.AsyncHTTPTransport(uds=service._planner.socket)
    async with httpx.AsyncClient(transport=transport, timeout=60) as client:
        return (await client.get(f"http://vllm{path}")).text


def repeating(toy: Path, directory: Path) -> Path:
    """The toy model with 1/256 of its attention: mostly the last token decides alone, so that it repeats itself."""
    shutil.copytree(toy, directory)
    file = directory / "model.safetensors"
    raw = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(raw[:8], "little")
    for name, tensor in json.loads(raw[8:begin]).items():
        if name.endswith("o_proj.weight"):
            first, last = (begin + offset for offset in tensor["data_offsets"])
            numbers = array.array("H", raw[first:last])
            raw[first:last] = array.array("H", [n - (8 << 7) for n in numbers]).tobytes()  # bfloat16's exponent
    file.write_bytes(raw)
    return directory


def logged_arguments(records: list[logging.LogRecord]) -> dict[str, Any]:
    """Arguments of its API server that are not the defaults, as vLLM logs them at its start."""
    lines = [text for text in (record.getMessage() for record in records) if _ARGUMENTS in text]
    assert len(lines) == 1, lines
    found: dict[str, Any] = ast.literal_eval(lines[0].partition(_ARGUMENTS)[2])
    return found


def noted(service: EngineService) -> set[str]:
    """Names in /dev/shm that its engine is known to use."""
    notes = Path(service._planner.notes)
    return set(json.loads(notes.read_text())["shm"]) if notes.exists() else set()


def launcher(pid: int) -> str:
    """What the process was started with: a script behind its interpreter."""
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[1]


def api_server(guard: Guard) -> int:
    """The guard's own child, by its name too: the guard adopts orphans, and pids start again at their end."""
    own = [process.pid for process in descendants(guard.pid) if process.parent == guard.pid]
    (found,) = [pid for pid in own if "\0serve\0" in Path(f"/proc/{pid}/cmdline").read_text()]
    return found


def environment(pid: int) -> dict[str, str]:
    words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(word.decode().split("=", 1) for word in words if b"=" in word)


def workers(guard: Guard) -> list[int]:
    """Pids, by rank."""
    named = [(Path(f"/proc/{p.pid}/cmdline").read_text(), p.pid) for p in descendants(guard.pid)]
    return [pid for name, pid in sorted(named) if name.startswith("VLLM::Worker")]
