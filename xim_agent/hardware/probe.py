"""Looks at the machine once: host and NVIDIA in a thread, AMD through its own tools."""

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import trio

from xim_agent.hardware import amd
from xim_agent.hardware.host import read_host
from xim_agent.hardware.nvidia import read_nvidia
from xim_agent.hardware.report import Accelerator, Device, Hardware
from xim_agent.hardware.visible import visible

TOOL_SECONDS = 20  # amd-smi takes 1 to 3 s on eight GPUs; one that hangs must not stop the start


async def probe(
    *,
    root: Path = Path("/"),
    affinity: Iterable[int] | None = None,
    nvml: Any = None,
    env: Mapping[str, str] | None = None,
) -> Hardware:
    """Never fails for want of a GPU; what a driver or tool said instead is in `notes`. About 50 ms without AMD.

    GPUs that variables of `env` hide from vLLM are left out; AMD's tools run with it too. `root`, `affinity`, `nvml`
    stand in for the machine in tests. Raises OSError when /proc cannot be read. Cancellation kills a running tool,
    and leaves a driver that hangs to its thread.
    """
    allowed = os.sched_getaffinity(0) if affinity is None else affinity
    host = await trio.to_thread.run_sync(read_host, root, allowed)
    nvidia = await trio.to_thread.run_sync(read_nvidia, nvml, abandon_on_cancel=True)
    devices, driver, notes = nvidia.devices, nvidia.driver, list(nvidia.notes)
    accelerator: Accelerator = "nvidia" if devices else "cpu"
    if not devices and (root / "sys/class/kfd/kfd/topology").exists():
        devices, driver, note = await _amd(env)
        notes.append(note)
        accelerator = "amd" if devices else "cpu"
    devices, hidden = visible(devices, accelerator, os.environ if env is None else env)
    notes.append(hidden)
    return Hardware(
        accelerator=accelerator if devices else "cpu",
        devices=devices,
        driver=driver,
        cuda=nvidia.cuda,
        notes=tuple(note for note in notes if note),
        **{name: getattr(host, name) for name in host.__dataclass_fields__},
    )


async def _amd(env: Mapping[str, str] | None) -> tuple[tuple[Device, ...], str, str]:
    """Devices, driver version, and a note when neither tool gave an answer."""
    try:
        outputs = [await _output(cmd, env) for cmd in (amd.AMD_SMI_STATIC, amd.AMD_SMI_MEMORY, amd.AMD_SMI_LIST)]
        return *amd.from_amd_smi(*outputs), ""
    except (OSError, ValueError) as error:
        first = str(error)
    try:
        return *amd.from_rocm_smi(await _output(amd.ROCM_SMI, env)), ""
    except (OSError, ValueError) as error:
        return (), "", f"an AMD GPU is there, but {first}; {error}"


async def _output(command: tuple[str, ...], env: Mapping[str, str] | None) -> bytes:
    """Standard output of a tool. Raises OSError when it is missing, fails or hangs."""
    path = shutil.which(command[0], path=(env or os.environ).get("PATH", os.defpath) + ":/opt/rocm/bin")
    if path is None:
        raise FileNotFoundError(f"{command[0]} is not installed")
    with trio.move_on_after(TOOL_SECONDS):
        done = await trio.run_process(
            [path, *command[1:]], capture_stdout=True, stderr=subprocess.DEVNULL, check=False, env=env
        )
        if done.returncode != 0:
            raise OSError(f"{command[0]} ended with status {done.returncode}")
        return done.stdout
    raise TimeoutError(f"{command[0]} said nothing for {TOOL_SECONDS} s")
