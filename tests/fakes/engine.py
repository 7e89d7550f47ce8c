"""What tests of the engine share: the scripted launcher, a model directory, a service over both."""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import trio

from xim_agent.assignment.plan import EngineTarget
from xim_agent.clock import SystemClock
from xim_agent.config.fields import Config
from xim_agent.engine.gate import ReadMemory
from xim_agent.engine.guard import Guard
from xim_agent.engine.oom import Counts
from xim_agent.engine.planner import Usable
from xim_agent.engine.service import EngineService
from xim_agent.engine.tree import process
from xim_agent.hardware.report import Cpu, Hardware
from xim_agent.health import Health
from xim_agent.mesh.messages import Assignment, ModelRef, Serving

GIB = 1 << 30
FAKE = Path(__file__).parent / "fake_vllm.py"
CPU_HOST = Hardware("cpu", (), Cpu("a CPU", 2, 2), (0, 1), 2.0, 24 * GIB, 24 * GIB, 24 * GIB, core_of=(0, 1))


def assignment(**serving: Any) -> Assignment:
    ref = ModelRef("m", "m", "r1", "sha256:" + "0" * 64, 1)
    return Assignment("issuer", "agent", 1, 1, ref, Serving(**{"served_model_name": "m", **serving}))


def write_model(directory: Path, **config: Any) -> Path:
    """A model directory as the planner reads it: one tensor of 1000 bfloat16."""
    directory.mkdir(exist_ok=True)
    facts = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps({**facts, **config}))
    header = json.dumps({"w": {"dtype": "BF16", "shape": [1000], "data_offsets": [0, 2000]}}).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(2000))
    return directory


async def until(true: Callable[[], bool], seconds: float = 15.0) -> None:
    """Waits for what other processes do; fails when it does not come."""
    with trio.fail_after(seconds):
        while True:
            if true():
                return
            await trio.sleep(0.02)


def shm() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def alive(pid: int) -> bool:
    found = process(pid)
    return found is not None and found.state not in "ZX"


@dataclass
class Bench:
    """`starts`: the pids of all launchers so far, in order. `say` writes the words that the fake obeys."""

    guard: Guard
    runtime: Path
    model: Path
    health: Health = field(default_factory=lambda: Health(now=time.time))
    settings: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    blocked: Callable[[], bool] = lambda: False
    hardware: Hardware = CPU_HOST
    gpu_memory: ReadMemory = lambda _: ()
    oom_kills: Callable[[], Counts] = lambda: (0, 0)
    usable: Usable | None = None

    def service(self) -> EngineService:
        known = {"FAKE_VLLM_CONTROL": str(self.runtime / "control"), "FAKE_VLLM_COUNT": str(self.runtime / "starts")}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        pairs = tuple(f"{k}={v}" for k, v in {"PATH": path, **known, **self.env}.items())
        config = replace(Config(vllm_path=str(FAKE), vllm_env=pairs, drain_timeout_seconds=5), **self.settings)
        return EngineService(
            config=config,
            hardware=self.hardware,
            guard=self.guard,
            runtime_dir=self.runtime,
            clock=SystemClock(),
            health=self.health,
            compile_cache=lambda version: self.runtime / "caches",
            changed=lambda: None,
            blocked=self.blocked,
            gpu_memory=self.gpu_memory,
            oom_kills=self.oom_kills,
            usable=self.usable,
        )

    def target(self, **serving: Any) -> EngineTarget:
        return EngineTarget(assignment(**serving), self.model)

    @property
    def starts(self) -> list[int]:
        file = self.runtime / "starts"
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def say(self, words: str) -> None:
        (self.runtime / "control").write_text(words)
