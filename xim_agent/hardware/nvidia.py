"""NVIDIA GPUs through NVML. Imported only when the library is asked; `nvml` is the `pynvml` module or one like it."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xim_agent.hardware.report import Broken, Card, Device

BACK = "restart the machine; if it is lost again: power, cooling and seat of the card, then replace it"
RESET = "reset it (nvidia-smi --gpu-reset -i BUS) once nothing uses it"
CPU_INSTEAD = "; or set CUDA_VISIBLE_DEVICES=-1 to use the CPU"


@dataclass(frozen=True)
class Nvidia:
    """`broken`: what a driver that is there but broken said, and each GPU that cannot be used."""

    devices: tuple[Device, ...] = ()
    driver: str = ""
    cuda: str = ""
    broken: tuple[Broken, ...] = ()


def read_nvidia(nvml: Any = None, on_bus: Sequence[str] = ()) -> Nvidia:
    """Blocking. A GPU with MIG is replaced by its slices. No driver: nothing.

    `on_bus`: PCI addresses of GPUs that are this driver's or nobody's. Where its library is installed, a driver that
    is not loaded, or finds none, is broken, and no sign of a CPU machine: it may come up later.
    """
    nvml = nvml or pynvml()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return Nvidia(broken=_not_opened(nvml, error, on_bus))
    try:
        devices: list[Device] = []
        broken: list[Broken] = []
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                found = _device(nvml, index)
                devices += found
                if not found:
                    broken.append(
                        _broken(nvml, index, "is in MIG mode without a slice, so nothing can run on it", _MIG)
                    )
            except nvml.NVMLError as error:
                cure = RESET if error.value == nvml.NVML_ERROR_RESET_REQUIRED else BACK
                broken.append(_broken(nvml, index, f"cannot be used: {error}", cure))
        if on_bus and not devices and not broken:
            broken.append(_driver(f"the NVIDIA driver finds none of the GPUs at PCI {', '.join(on_bus)}", BACK))
        return Nvidia(tuple(devices), text(nvml.nvmlSystemGetDriverVersion()), _cuda(nvml), tuple(broken))
    except nvml.NVMLError as error:
        return Nvidia(broken=(_driver(f"the NVIDIA driver does not answer: {error}", _LOOK),))
    finally:
        nvml.nvmlShutdown()


def pynvml() -> Any:
    """The module, which loads the driver's library only when NVML is initialised."""
    with warnings.catch_warnings():
        # pynvml 13 is nvidia-ml-py, plus a hook that says so at each import.
        warnings.simplefilter("ignore", FutureWarning)
        import pynvml
    return pynvml


_LOOK = "look at nvidia-smi and dmesg"
_MIG = "make slices (nvidia-smi mig -cgi) or turn MIG off (nvidia-smi -mig 0)"


def unanswered(seconds: float) -> Nvidia:
    """Of a driver that hangs."""
    what = f"the NVIDIA driver has not answered for {seconds:.0f} s"
    return Nvidia(broken=(_driver(what, "look at dmesg; restart the machine if it stays so"),))


def card_of(nvml: Any, number: int, handle: Any) -> Card:
    """Raises NVMLError when it does not answer."""
    bus = text(nvml.nvmlDeviceGetPciInfo(handle).busId)
    return Card(number, text(nvml.nvmlDeviceGetName(handle)), text(nvml.nvmlDeviceGetUUID(handle)), bus)


def _driver(what: str, cure: str) -> Broken:
    return Broken(-1, "", what, cure + CPU_INSTEAD)


def _broken(nvml: Any, index: int, why: str, cure: str) -> Broken:
    try:
        card = card_of(nvml, index, nvml.nvmlDeviceGetHandleByIndex(index))
    except nvml.NVMLError:  # it says no more than its number
        return Broken(index, "", f"GPU {index} {why}", cure.replace("BUS", str(index)))
    return Broken(index, card.uuid, f"{card} {why}", cure.replace("BUS", card.bus))


def _not_opened(nvml: Any, error: Any, on_bus: Sequence[str]) -> tuple[Broken, ...]:
    if error.value == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        return ()
    if error.value == nvml.NVML_ERROR_DRIVER_NOT_LOADED:
        what = f"the NVIDIA driver is not loaded, and there are GPUs at PCI {', '.join(on_bus)}"
        return (_driver(what, "load it (modprobe nvidia; dmesg says why it fails)"),) if on_bus else ()
    cures = {
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "a newer driver does not run yet: restart the machine",
        nvml.NVML_ERROR_NO_PERMISSION: "give the agent's user access to /dev/nvidia*",
    }
    return (_driver(f"the NVIDIA driver does not answer: {error}", cures.get(error.value, _LOOK)),)


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
