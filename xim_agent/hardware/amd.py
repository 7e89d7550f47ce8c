"""What `amd-smi` and, on older machines, `rocm-smi` print as JSON, turned into devices."""

import json
import re
from dataclasses import dataclass
from typing import Any

from xim_agent.hardware.report import Device

AMD_SMI_STATIC = ("amd-smi", "static", "--asic", "--vram", "--driver", "--json")
AMD_SMI_MEMORY = ("amd-smi", "metric", "--mem-usage", "--json")
AMD_SMI_LIST = ("amd-smi", "list", "--json")
AMD_SMI_STATE = ("amd-smi", "metric", "--mem-usage", "--ecc", "--json")
ROCM_SMI = ("rocm-smi", "--showproductname", "--showuniqueid", "--showmeminfo", "vram", "--showdriverversion", "--json")
ROCM_SMI_STATE = ("rocm-smi", "--showbus", "--showmeminfo", "vram", "--json")
CURE_ALL = (
    "look at dmesg | grep amdgpu, and whether the agent's user may use /dev/kfd (group render); restart the machine if "
    "that is no help; or set CUDA_VISIBLE_DEVICES=-1 to use the CPU"
)
_UNITS = {"B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30}  # amd-smi says MB and means MiB


def from_amd_smi(static: bytes, memory: bytes, listing: bytes) -> tuple[tuple[Device, ...], str]:
    """Devices and driver version; free memory is 0 when `memory` does not tell.

    Raises ValueError for other output, and when it names no GPU.
    """
    used, ids = _by_gpu(memory), _by_gpu(listing)
    devices, driver = [], ""
    for gpu, entry in sorted(_by_gpu(static).items()):
        asic = _dict(entry.get("asic"))
        usage = _dict(used.get(gpu, {}).get("mem_usage"))
        vram = _dict(entry.get("vram"))
        total = _bytes(vram.get("size", vram.get("vram_size_mb"))) or _bytes(usage.get("total_vram"))
        free = _bytes(usage.get("free_vram"))
        name, gfx = str(asic.get("market_name", "AMD GPU")), str(asic.get("target_graphics_version", ""))
        uuid = _uuid(asic.get("asic_serial")) or str(ids.get(gpu, {}).get("uuid", ""))
        devices.append(Device(gpu, uuid, name, total, free, gfx))
        about = _dict(entry.get("driver"))
        driver = driver or str(about.get("version", about.get("driver_version", "")))
    if not devices:
        raise ValueError("amd-smi names no GPU")
    return tuple(devices), driver


def from_rocm_smi(output: bytes) -> tuple[tuple[Device, ...], str]:
    """The same from `rocm-smi --json`, whose every value is text. Raises ValueError likewise."""
    cards = _dict(_json(output))
    devices = []
    for name, card in cards.items():
        if name.startswith("card") and name[4:].isdecimal() and isinstance(card, dict):
            low = {key.lower(): str(value) for key, value in card.items()}
            total, used = int(low.get("vram total memory (b)", 0)), int(low.get("vram total used memory (b)", 0))
            series = low.get("card series") or low.get("card model", "AMD GPU")
            gfx = low.get("gfx version", "")
            devices.append(Device(int(name[4:]), _uuid(low.get("unique id")), series, total, total - used, gfx))
    if not devices:
        raise ValueError("rocm-smi names no GPU")
    return tuple(sorted(devices, key=lambda device: device.index)), str(
        _dict(cards.get("system")).get("Driver version", "")
    )


@dataclass(frozen=True)
class State:
    """`answers`: it tells of its memory. `errors`: uncorrectable ones (ECC, RAS) since its driver was loaded, None
    where that is not told (rocm-smi prints them, but not as JSON)."""

    index: int
    answers: bool
    errors: int | None = None


def states_of_amd_smi(listing: bytes, metric: bytes) -> dict[str, State]:
    """By PCI address. Raises ValueError for other output; a driver without any GPU lists none."""
    metrics = _by_gpu(metric)
    found = {}
    for gpu, row in _by_gpu(listing).items():
        usage = _dict(metrics.get(gpu, {}).get("mem_usage"))
        errors = str(_dict(metrics.get(gpu, {}).get("ecc")).get("total_uncorrectable_count"))
        counted = int(errors) if errors.isdecimal() else None
        found[str(row.get("bdf", gpu)).lower()] = State(gpu, _bytes(usage.get("total_vram")) > 0, counted)
    return found


def states_of_rocm_smi(output: bytes) -> dict[str, State]:
    """The same from `rocm-smi`. Raises ValueError likewise."""
    found = {}
    for name, card in _dict(_json(output)).items():
        if name.startswith("card") and name[4:].isdecimal():
            low = {key.lower(): str(value) for key, value in _dict(card).items()}
            total = low.get("vram total memory (b)", "")
            found[low.get("pci bus", name).lower()] = State(int(name[4:]), total.isdecimal() and int(total) > 0)
    return found


def _by_gpu(output: bytes) -> dict[int, dict[str, Any]]:
    data = _json(output)
    rows = data.get("gpu_data") if isinstance(data, dict) else data  # ROCm 7 wraps the list
    if not isinstance(rows, list):
        raise ValueError(f"amd-smi printed {output[:80]!r}")
    return {row["gpu"]: row for row in rows if isinstance(row, dict) and isinstance(row.get("gpu"), int)}


def _json(output: bytes) -> Any:
    """Both tools print warnings before it: of groups the user is not in, of a GPU that sleeps."""
    starts = [at for at in (output.find(b"["), output.find(b"{")) if at >= 0]
    try:
        return json.loads(output[min(starts, default=0) :])
    except ValueError as error:
        raise ValueError(f"no JSON was printed, but {output[:80]!r}") from error


def _bytes(value: object) -> int:
    """`{"value": 196592, "unit": "MB"}`; from older versions "196592 MB" or a bare number of MB; 0 for N/A."""
    number, unit = (value.get("value"), value.get("unit", "MB")) if isinstance(value, dict) else (value, "MB")
    if isinstance(number, str) and (found := re.fullmatch(r"(\d+) ?([KMG]?B)?", number)):
        number, unit = int(found[1]), found[2] or unit
    return int(number * _UNITS.get(str(unit), 0)) if isinstance(number, int | float) and number >= 0 else 0


def _uuid(serial: object) -> str:
    """`0x2CD5…` as ROCm writes it in ROCR_VISIBLE_DEVICES; empty when there is none."""
    try:
        return f"GPU-{int(str(serial), 16):016x}"
    except ValueError:
        return ""


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
