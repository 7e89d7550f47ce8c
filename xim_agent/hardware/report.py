"""What the machine has, as one value: input of the engine's sizing, and what the router is told (wire §3.6)."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Accelerator = Literal["nvidia", "amd", "cpu"]


@dataclass(frozen=True)
class Device:
    """One GPU, or one MIG slice of it (`mig` True; memory and uuid are the slice's own). Memory in bytes.

    `compute_capability` is NVIDIA's `major.minor`, for AMD the gfx name; empty when unknown.
    """

    index: int
    uuid: str
    name: str
    memory_total_bytes: int
    memory_free_bytes: int
    compute_capability: str = ""
    mig: bool = False


@dataclass(frozen=True)
class Broken:
    """A GPU that is there and cannot be used; `index` -1: all of its driver's. `what` is a sentence that names it and
    says why, `cure` what brings it back."""

    index: int
    uuid: str
    what: str
    cure: str


@dataclass(frozen=True)
class Card:
    """`bus` is the PCI address, which finds it in `lspci`, in the kernel log and in the machine."""

    index: int
    name: str
    uuid: str
    bus: str

    def __str__(self) -> str:
        known = [self.name, self.uuid, self.bus and f"PCI {self.bus}"]
        return f"GPU {self.index} ({', '.join(word for word in known if word)})"


@dataclass(frozen=True)
class Cpu:
    """`cores` physical, `threads` logical, both of the host; `isa` the instruction sets that matter for inference."""

    model: str
    cores: int
    threads: int
    isa: tuple[str, ...] = ()
    vendor: str = ""


@dataclass(frozen=True)
class Hardware:
    """What sizing starts from.

    `cpus`: numbers of the CPUs this process may run on (affinity, so cpusets too); `core_of`: physical core of each.
    `cpu_limit`: CPU seconds per second that the cgroups allow, at most len(cpus). `memory_bytes`: the smaller of RAM
    and the cgroups' limit; `memory_total_bytes`: the host's RAM. `notes`: what could not be found out, for logs.
    `accelerator` is that of GPUs that are all `broken`, too: such a machine is no CPU machine.
    """

    accelerator: Accelerator
    devices: tuple[Device, ...]
    cpu: Cpu
    cpus: tuple[int, ...]
    cpu_limit: float
    memory_total_bytes: int
    memory_bytes: int
    shm_bytes: int
    driver: str = ""
    cuda: str = ""
    core_of: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    broken: tuple[Broken, ...] = ()

    @property
    def tier(self) -> str:
        """The product's slug (xerotier-facts §2.7) nearest to this machine."""
        if self.accelerator != "cpu":
            return f"gpu_{self.accelerator}_shared"
        by_vendor = {"AuthenticAMD": "cpu_amd_optimized", "GenuineIntel": "cpu_intel_optimized"}
        return by_vendor.get(self.cpu.vendor, "self_hosted")


def report(hardware: Hardware, cache_bytes: int) -> dict[str, Any]:
    """The hardware report sent at enrollment; `cache_bytes` is the bound of the model cache."""
    cpu = hardware.cpu
    return {
        "accelerator": hardware.accelerator,
        "devices": [asdict(device) for device in hardware.devices],
        "driver": hardware.driver,
        "cuda": hardware.cuda,
        "cpu": {"model": cpu.model, "cores": cpu.cores, "threads": cpu.threads, "isa": list(cpu.isa)},
        "memory_bytes": hardware.memory_bytes,
        "cache_bytes": cache_bytes,
        "shm_bytes": hardware.shm_bytes,
        "tier": hardware.tier,
    }
