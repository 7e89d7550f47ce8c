"""The memory of NVIDIA GPUs and who holds it, now. `nvml` is the `pynvml` module or one like it."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from xim_agent.hardware.memory import CardMemory, Holder
from xim_agent.hardware.nvidia import pynvml, text


def read_memory(uuids: Collection[str], nvml: Any = None) -> list[CardMemory]:
    """Blocking, milliseconds. Of these cards or slices; one that does not answer is left out: vLLM will tell."""
    nvml = nvml or pynvml()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return []
    found = []
    try:
        for uuid in uuids:
            try:
                found.append(_card(nvml, uuid))
            except nvml.NVMLError:
                continue
    finally:
        nvml.nvmlShutdown()
    return found


def _card(nvml: Any, uuid: str) -> CardMemory:
    handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
    name, memory = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetMemoryInfo(handle)
    holders = [
        Holder(process.pid, _program(process.pid), int(process.usedGpuMemory or 0))
        for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    ]
    return CardMemory(uuid, text(name), int(memory.total), int(memory.free), tuple(holders))


def _program(pid: int) -> str:
    """The driver counts pids of the host; in a container they may be another's or nobody's."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return "a process"
