"""The agent itself, as a process, on a machine with a driver's library from a script."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from fakes.nvml import Machine
from fakes.stack import free_port, until

from xim_agent.config.fields import Config
from xim_agent.engine.environment import gpu_environment
from xim_agent.router.store import Store

CARD = "GPU 1 (NVIDIA A10, GPU-1111-aaaa, PCI 00000000:02:00.0)"


@pytest.mark.parametrize(
    ("facts", "code", "text"),
    [
        ({"recovery": 1}, "gpu_lost", f"{CARD} cannot go on: its driver asks for recovery"),
        ({"memory_error": 16}, "gpu_unusable", f"{CARD} cannot be used: GPU requires restart"),
    ],
)
def test_the_running_agent_tells_of_a_card_in_trouble(
    nvml: Machine, tmp_path: Path, facts: dict[str, int], code: str, text: str
) -> None:
    nvml.add()
    nvml.add(**facts)
    nvml.write()
    port, now = free_port(), time.time()
    with Store.open(tmp_path / "router") as store:
        _, key = store.create_join_key(project="p", region="local", uses=1, expires_at=now + 3600, now=now)
    own = {
        "JOIN_KEY": key,
        "ROUTER_URL": f"http://127.0.0.1:{free_port()}",
        "CONFIG_PATH": str(tmp_path / "state"),
        "MODEL_CACHE_PATH": str(tmp_path / "cache"),
        "METRICS_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "1",
    }
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("XEROTIER")},
        **{f"XEROTIER_AGENT_{name}": value for name, value in own.items()},
        "LD_LIBRARY_PATH": str(Path(nvml.library._name).parent),
        "CUDA_VISIBLE_DEVICES": "",  # the agent's own option is what counts
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    with (tmp_path / "log").open("wb") as log:
        agent = subprocess.Popen([sys.executable, "-m", "xim_agent", "run"], env=env, stdout=log, stderr=log)
    try:

        def reasons() -> str:
            try:
                return httpx.get(f"http://127.0.0.1:{port}/readyz").text
            except httpx.TransportError:
                assert agent.poll() is None, (tmp_path / "log").read_text()
                return ""

        until(code, lambda: code in reasons(), 30)
        assert f"{code}: {text}; reset it (nvidia-smi --gpu-reset -i 00000000:02:00.0)" in reasons()
        status = httpx.get(f"http://127.0.0.1:{port}/status").json()
        assert "nvidia-smi --gpu-reset -i 00000000:02:00.0" in str(status["health"])
        assert status["hardware"]["accelerator"] == "nvidia"
        assert [text] * (code == "gpu_unusable") == [one["what"] for one in status["hardware"]["broken"]]
    finally:
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(20) == 0


def test_what_hides_gpus_from_vllm() -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "0", "ROCR_VISIBLE_DEVICES": "1", "LD_LIBRARY_PATH": "/x"}
    assert gpu_environment(Config(), environ)["CUDA_VISIBLE_DEVICES"] == "0"
    ours = gpu_environment(Config(cuda_visible_devices="1"), environ)
    assert "CUDA_VISIBLE_DEVICES" not in ours
    assert ours["ROCR_VISIBLE_DEVICES"] == "1"
    assert gpu_environment(Config(vllm_env=("HIP_VISIBLE_DEVICES=2",)), environ)["HIP_VISIBLE_DEVICES"] == "2"


def test_plan_names_a_card_that_cannot_be_used(nvml: Machine) -> None:
    nvml.add(memory_error=15)
    nvml.write()
    env = {
        "HOME": "/nowhere",
        "PATH": os.defpath,
        "FAKE_NVML": os.environ["FAKE_NVML"],
        "LD_LIBRARY_PATH": str(Path(nvml.library._name).parent),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-m", "xim_agent", "plan"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)["hardware"]
    assert (found["accelerator"], found["devices"]) == ("nvidia", [])
    assert done.stderr.startswith(
        "GPU 0 (NVIDIA A10, GPU-0000-aaaa, PCI 00000000:01:00.0) cannot be used: GPU is lost; "
    )
    asked = {**env, "XEROTIER_AGENT_CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(command, env=asked, capture_output=True, text=True, check=True)
    assert (json.loads(done.stdout)["hardware"]["accelerator"], done.stderr) == ("cpu", "")
