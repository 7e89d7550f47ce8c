"""Looks at the machine: host and NVIDIA in a thread, AMD through its own tools."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import trio

from xim_agent.hardware import amd
from xim_agent.hardware.drivers import Drivers
from xim_agent.hardware.host import gpus_on_bus, read_host
from xim_agent.hardware.report import Accelerator, Broken, Device, Hardware
from xim_agent.hardware.visible import usable

NVIDIA, AMD = 0x10DE, 0x1002  # PCI vendors


async def probe(
    *,
    root: Path = Path("/"),
    affinity: Iterable[int] | None = None,
    nvml: Any = None,
    env: Mapping[str, str] | None = None,
    drivers: Drivers | None = None,
) -> Hardware:
    """Never fails for want of a GPU; what a driver or tool said instead is in `broken` and `notes`. About 50 ms
    without AMD.

    GPUs that variables of `env` hide from vLLM are left out; AMD's tools run with it too. `drivers`: for the next call
    to know what hung in this one. `root`, `affinity`, `nvml` stand in for the machine in tests. Raises OSError when
    /proc cannot be read. Cancellation kills a running tool, and leaves a driver that hangs to its thread.
    """
    drivers = drivers or Drivers(env)
    environ = os.environ if env is None else env
    allowed = os.sched_getaffinity(0) if affinity is None else affinity
    host = await trio.to_thread.run_sync(read_host, root, allowed)
    on_bus = await trio.to_thread.run_sync(gpus_on_bus, root, NVIDIA)
    if environ.get("NVIDIA_VISIBLE_DEVICES") in ("none", "void"):
        on_bus = ()  # a container that has the driver and no GPU, on purpose
    nvidia = await drivers.nvidia(on_bus, nvml)
    devices, broken, driver, note = nvidia.devices, nvidia.broken, nvidia.driver, ""
    accelerator: Accelerator = "nvidia"
    if not devices and not broken and await trio.to_thread.run_sync(_has_amd, root, drivers):
        devices, broken, driver, note = await _amd(drivers)
        accelerator = "amd"
    devices, broken, hidden = usable(devices, broken, accelerator, environ)
    return Hardware(
        accelerator=accelerator if devices or broken else "cpu",
        devices=devices,
        driver=driver,
        cuda=nvidia.cuda,
        notes=tuple(said for said in (note, hidden) if said),
        broken=broken,
        **{name: getattr(host, name) for name in host.__dataclass_fields__},
    )


def _has_amd(root: Path, drivers: Drivers) -> bool:
    """Where ROCm's tools are installed the driver may come up later."""
    if (root / "sys/class/kfd/kfd/topology").exists():
        return True
    return bool(gpus_on_bus(root, AMD)) and any(map(drivers.has, ("amd-smi", "rocm-smi")))


async def _amd(drivers: Drivers) -> tuple[tuple[Device, ...], tuple[Broken, ...], str, str]:
    """Devices, what is broken, driver version, and a note on a GPU that nobody has ROCm for: it is not used."""
    output = drivers.output
    try:
        outputs = [await output(cmd) for cmd in (amd.AMD_SMI_STATIC, amd.AMD_SMI_MEMORY, amd.AMD_SMI_LIST)]
        devices, driver = amd.from_amd_smi(*outputs)
        return devices, (), driver, ""
    except (OSError, ValueError) as error:
        first = error
    try:
        devices, driver = amd.from_rocm_smi(await output(amd.ROCM_SMI))
        return devices, (), driver, ""
    except (OSError, ValueError) as error:
        what = f"an AMD GPU is there, but {first}; {error}"
        if isinstance(first, FileNotFoundError) and isinstance(error, FileNotFoundError):
            return (), (), "", what
        return (), (Broken(-1, "", what, amd.CURE_ALL),), "", ""
