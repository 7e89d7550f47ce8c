"""NVIDIA GPUs through NVML. Imported only when the library is asked; `nvml` is the `pynvml` module or one like it."""

import warnings
from dataclasses import dataclass
from typing import Any

from xim_agent.hardware.report import Device


@dataclass(frozen=True)
class Nvidia:
    devices: tuple[Device, ...] = ()
    driver: str = ""
    cuda: str = ""
    note: str = ""


def read_nvidia(nvml: Any = None) -> Nvidia:
    """Blocking. A GPU with MIG is replaced by its slices. Without a driver: nothing; `note`: what a broken one said."""
    nvml = nvml or _pynvml()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        absent = error.value in (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED)
        return Nvidia(note="" if absent else f"NVML: {error}")
    try:
        version = nvml.nvmlSystemGetCudaDriverVersion_v2()
        devices: list[Device] = []
        for index in range(nvml.nvmlDeviceGetCount()):
            devices += _device(nvml, index)
        cuda = f"{version // 1000}.{version % 1000 // 10}"
        return Nvidia(tuple(devices), _text(nvml.nvmlSystemGetDriverVersion()), cuda)
    except nvml.NVMLError as error:
        return Nvidia(note=f"NVML: {error}")
    finally:
        nvml.nvmlShutdown()


def _pynvml() -> Any:
    with warnings.catch_warnings():
        # pynvml 13 is nvidia-ml-py, plus a hook that says so at each import.
        warnings.simplefilter("ignore", FutureWarning)
        import pynvml
    return pynvml


def _device(nvml: Any, index: int) -> list[Device]:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    name = _text(nvml.nvmlDeviceGetName(handle))
    capability = "{}.{}".format(*nvml.nvmlDeviceGetCudaComputeCapability(handle))
    slices = _slices(nvml, handle)
    return [
        Device(index, _text(nvml.nvmlDeviceGetUUID(part)), name, *_memory(nvml, part), capability, bool(slices))
        for part in slices or [handle]
    ]


def _slices(nvml: Any, handle: Any) -> list[Any]:
    try:
        if nvml.nvmlDeviceGetMigMode(handle)[0] != nvml.NVML_DEVICE_MIG_ENABLE:
            return []
    except nvml.NVMLError:
        return []
    found = []
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number))
        except nvml.NVMLError:
            continue
    return found


def _memory(nvml: Any, handle: Any) -> tuple[int, int]:
    """(0, 0) where the GPU has no memory of its own (integrated ones share the host's)."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError:
        return 0, 0
    return int(memory.total), int(memory.free)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
