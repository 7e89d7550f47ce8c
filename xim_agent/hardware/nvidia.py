"""NVIDIA GPUs through NVML. Imported only when the library is asked; `nvml` is the `pynvml` module or one like it."""

import warnings
from dataclasses import dataclass
from typing import Any

from xim_agent.hardware.report import Device


@dataclass(frozen=True)
class Nvidia:
    """`notes`: what a driver that is there but broken said, and each GPU that did not answer."""

    devices: tuple[Device, ...] = ()
    driver: str = ""
    cuda: str = ""
    notes: tuple[str, ...] = ()


def read_nvidia(nvml: Any = None) -> Nvidia:
    """Blocking. A GPU with MIG is replaced by its slices, one that does not answer by a note. No driver: nothing."""
    nvml = nvml or pynvml()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        absent = error.value in (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED)
        return Nvidia(notes=() if absent else (f"NVML: {error}{_cure(nvml, error)}",))
    try:
        devices: list[Device] = []
        notes: list[str] = []
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                found = _device(nvml, index)
                devices += found
                if not found:
                    notes.append(f"GPU {index} is in MIG mode without a slice, so nothing can run on it")
            except nvml.NVMLError as error:
                notes.append(f"NVML, of GPU {index}: {error}")
        return Nvidia(tuple(devices), text(nvml.nvmlSystemGetDriverVersion()), _cuda(nvml), tuple(notes))
    except nvml.NVMLError as error:
        return Nvidia(notes=(f"NVML: {error}",))
    finally:
        nvml.nvmlShutdown()


def pynvml() -> Any:
    """The module, which loads the driver's library only when NVML is initialised."""
    with warnings.catch_warnings():
        # pynvml 13 is nvidia-ml-py, plus a hook that says so at each import.
        warnings.simplefilter("ignore", FutureWarning)
        import pynvml
    return pynvml


def _cure(nvml: Any, error: Any) -> str:
    cures = {
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "; a newer driver does not run yet: restart the machine",
        nvml.NVML_ERROR_NO_PERMISSION: "; give the agent's user access to /dev/nvidia*",
    }
    return cures.get(error.value, "")


def _cuda(nvml: Any) -> str:
    try:
        version = nvml.nvmlSystemGetCudaDriverVersion_v2()
    except nvml.NVMLError:  # drivers older than 410
        return ""
    return f"{version // 1000}.{version % 1000 // 10}"


def _device(nvml: Any, index: int) -> list[Device]:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    name = text(nvml.nvmlDeviceGetName(handle))
    capability = "{}.{}".format(*nvml.nvmlDeviceGetCudaComputeCapability(handle))
    slices = _slices(nvml, handle)
    return [
        Device(index, text(nvml.nvmlDeviceGetUUID(part)), name, *_memory(nvml, part), capability, slices is not None)
        for part in ([handle] if slices is None else slices)
    ]


def _slices(nvml: Any, handle: Any) -> list[Any] | None:
    """None without MIG. With MIG on and no slice made, CUDA cannot use the GPU at all: an empty list."""
    try:
        if nvml.nvmlDeviceGetMigMode(handle)[0] != nvml.NVML_DEVICE_MIG_ENABLE:
            return None
    except nvml.NVMLError as error:
        if error.value in without_answer(nvml):
            return None
        raise
    found = []
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number))
        except nvml.NVMLError as error:
            if error.value not in (nvml.NVML_ERROR_NOT_FOUND, nvml.NVML_ERROR_NO_PERMISSION):
                raise
    return found


def _memory(nvml: Any, handle: Any) -> tuple[int, int]:
    """(0, 0) where the GPU has no memory of its own (integrated ones share the host's)."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError as error:
        if error.value in without_answer(nvml):
            return 0, 0
        raise
    return int(memory.total), int(memory.free)


def without_answer(nvml: Any) -> tuple[int, ...]:
    """Codes of a query that this GPU or this driver does not have."""
    return nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_FUNCTION_NOT_FOUND


def text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
