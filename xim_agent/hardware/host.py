"""CPU, memory and limits of this process, from /proc, /sys and the cgroups. `root` is `/`, or a tree like it."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from xim_agent.hardware.report import Cpu

# Instruction sets that decide how vLLM's CPU kernels and their data types perform.
_ISA = re.compile(
    r"sse4_2|avx2?|fma|f16c|avx_vnni|avx512(f|bw|vl|_vnni|_bf16|_fp16)|amx_(tile|int8|bf16)"
    r"|asimd(dp|hp)?|fphp|sve2?|bf16|i8mm"
)


@dataclass(frozen=True)
class Host:
    """See `Hardware` for the fields."""

    cpu: Cpu
    cpus: tuple[int, ...]
    core_of: tuple[int, ...]
    cpu_limit: float
    memory_total_bytes: int
    memory_bytes: int
    shm_bytes: int


def read_host(root: Path, affinity: Iterable[int]) -> Host:
    """Blocking. `affinity`: CPU numbers the process may run on. Raises OSError when /proc is not there."""
    cpu, numbers = cpu_info((root / "proc/cpuinfo").read_text(errors="replace"))
    cpus = tuple(sorted(affinity))
    core_of = tuple(numbers.get(number) or _sysfs_core(root, number) for number in cpus)
    cores = {core: index for index, core in enumerate(dict.fromkeys(core_of))}
    if not any(numbers.values()):
        every = {_sysfs_core(root, number) for number in numbers}
        cpu = Cpu(cpu.model, max(1, len(every)), cpu.threads, cpu.isa, cpu.vendor)
    total = _memory_total((root / "proc/meminfo").read_text())
    quota, limit = limits(root)
    return Host(
        cpu=cpu,
        cpus=cpus,
        core_of=tuple(cores[core] for core in core_of),
        cpu_limit=min(float(len(cpus)), quota),
        memory_total_bytes=total,
        memory_bytes=int(min(total, limit)),
        shm_bytes=_shm(root),
    )


def cpu_info(text: str) -> tuple[Cpu, dict[int, tuple[int, int] | None]]:
    """The CPU, and (package, core) of each processor where the file says it (x86 does, ARM does not)."""
    processors: dict[int, dict[str, str]] = {}
    for block in text.split("\n\n"):
        pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
        fields = {name.strip(): value.strip() for name, value in pairs}
        if fields.get("processor", "").isdecimal():
            processors[int(fields["processor"])] = fields
    first = next(iter(processors.values()), {})
    flags = set((first.get("flags") or first.get("Features") or "").split())
    where: dict[int, tuple[int, int] | None] = {
        number: (int(fields.get("physical id", 0)), int(fields["core id"])) if "core id" in fields else None
        for number, fields in processors.items()
    }
    cores = len({core for core in where.values() if core is not None}) or len(processors)
    model = first.get("model name") or first.get("Processor") or first.get("CPU implementer", "unknown")
    return Cpu(
        model, cores, len(processors), tuple(sorted(filter(_ISA.fullmatch, flags))), first.get("vendor_id", "")
    ), where


def _sysfs_core(root: Path, number: int) -> tuple[int, int]:
    topology = root / f"sys/devices/system/cpu/cpu{number}/topology"
    try:
        return int((topology / "physical_package_id").read_text()), int((topology / "core_id").read_text())
    except (OSError, ValueError):
        return -1, number


def _memory_total(text: str) -> int:
    found = re.search(r"^MemTotal:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _shm(root: Path) -> int:
    try:
        status = os.statvfs(root / "dev/shm")
    except OSError:
        return 0
    return status.f_blocks * status.f_frsize


def limits(root: Path) -> tuple[float, float]:
    """CPU seconds per second and bytes of memory that the cgroups of this process allow; infinity for no limit.

    Version 1, version 2 and both at once; the smallest limit on the way up to the mount point counts.
    """
    cpu = memory = float("inf")
    for kind, directory in _directories(root):
        if kind in ("2", "memory"):
            names = ("memory.max",) if kind == "2" else ("memory.limit_in_bytes",)
            memory = min([memory, *(value for name in names for value in _numbers(directory / name)[:1])])
        if kind == "2":
            cpu = min(cpu, _ratio(_numbers(directory / "cpu.max")))
        elif kind == "cpu":
            quota, period = _numbers(directory / "cpu.cfs_quota_us"), _numbers(directory / "cpu.cfs_period_us")
            cpu = min(cpu, _ratio([*quota, *period]))
    return cpu, memory


def oom_kills(root: Path = Path("/")) -> tuple[int, int]:
    """How many processes the kernel has killed for want of memory: in our memory cgroup, and on the machine.

    Blocking, microseconds. 0 where it is not told: before Linux 4.13, or without a memory controller.
    """
    own = next((directory for kind, directory in _directories(root) if kind == "memory"), None)
    files = [own / "memory.oom_control"] if own else []  # version 1
    files += [directory / "memory.events" for kind, directory in _directories(root) if kind == "2"][:1]
    return sum(_counted(file) for file in files), _counted(root / "proc/vmstat")


def gpus_on_bus(root: Path, vendor: int) -> tuple[str, ...]:
    """PCI addresses of the vendor's GPUs, but for those that another driver has (nouveau, or vfio for a guest).

    Blocking. In a container these are the host's, whether or not it may use them.
    """
    found = []
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        try:
            is_gpu = int((device / "class").read_text(), 16) >> 16 in (0x03, 0x12)  # display, accelerator
            if is_gpu and int((device / "vendor").read_text(), 16) == vendor and _driver(device) in _GPU_DRIVERS:
                found.append(device.name)
        except (OSError, ValueError):
            continue
    return tuple(found)


_GPU_DRIVERS = ("", "nvidia", "amdgpu")


def _driver(device: Path) -> str:
    link = device / "driver"
    return link.resolve().name if link.exists() else ""


def _counted(file: Path) -> int:
    try:
        found = re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def _directories(root: Path) -> Iterator[tuple[str, Path]]:
    """("2", "memory" or "cpu", directory) of each cgroup this process is in, and of its parents as far as seen."""
    try:
        mine = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return
    paths: dict[str, str] = {}
    for line in mine:
        number, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path) if number != "0" else {"2": path})
    for line in mounts:
        before, _, after = line.partition(" - ")
        kind, options, (base, point) = after.split()[0], after.split()[-1].split(","), before.split()[3:5]
        names = ["2"] if kind == "cgroup2" else [n for n in ("memory", "cpu") if kind == "cgroup" and n in options]
        for name in names:
            if name in paths:
                top = root / point.lstrip("/")
                relative = _below(paths[name], base)
                for directory in (top / relative, *(top / parent for parent in relative.parents)):
                    yield name, directory


def _below(path: str, base: str) -> PurePosixPath:
    """`path` seen from a mount of `base`. Containers may be shown a path outside their mount; then the mount counts."""
    try:
        return PurePosixPath(path).relative_to(base)
    except ValueError:
        return PurePosixPath()


def _numbers(path: Path) -> list[float]:
    try:
        return [float(word) if word != "max" else float("inf") for word in path.read_text().split()]
    except (OSError, ValueError):
        return []


def _ratio(quota_period: list[float]) -> float:
    if len(quota_period) != 2 or quota_period[0] <= 0 or quota_period[1] <= 0:
        return float("inf")
    return quota_period[0] / quota_period[1]
