"""GPUs and shared memory against what the configuration wants of them. Pure."""

import re
from collections.abc import Sequence
from dataclasses import replace

from xim_agent.config.fields import Config
from xim_agent.doctor.report import Finding, failure, ok, skipped, warning, worst
from xim_agent.engine.budget import GIB, Wishes, host_offload
from xim_agent.hardware.report import Hardware
from xim_agent.hardware.visible import usable

OLDEST_DRIVER = 535  # the first with CUDA 12.2, and the oldest branch of NVIDIA's that container images still count on
SHM = "/dev/shm"  # noqa: S108
# What NCCL's documentation wants of containers (`--shm-size=1g`): each pair of GPUs exchanges data there.
NCCL_SHM = GIB
# The larger of two queues to vLLM's one worker, which on a CPU is a process: 10 messages of 24 MiB
# (vllm/distributed/device_communicators/shm_broadcast.py, 0.32). vLLM ends where it has no room.
WORKER_SHM = 240 * 2**20
_DRIVER = "install an NVIDIA driver 535 or later, then restart the machine"
_AMD_GROUPS = "add the agent's user to the groups that own /dev/kfd and /dev/dri (as a rule render and video)"


def chosen(hardware: Hardware, config: Config) -> Hardware:
    """With the GPUs that CUDA_VISIBLE_DEVICES of the configuration leaves."""
    if config.cuda_visible_devices is None or hardware.accelerator == "cpu":
        return hardware
    selection = {"CUDA_VISIBLE_DEVICES": config.cuda_visible_devices}
    devices, broken, hidden = usable(hardware.devices, hardware.broken, hardware.accelerator, selection)
    return replace(hardware, devices=devices, broken=broken, notes=(*hardware.notes, *filter(None, [hidden])))


def idle(hardware: Hardware) -> Hardware:
    """With all memory of the GPUs free."""
    devices = tuple(replace(device, memory_free_bytes=device.memory_total_bytes) for device in hardware.devices)
    return replace(hardware, devices=devices)


def gpu(hardware: Hardware, config: Config, lost: Sequence[tuple[str, str]]) -> Finding:
    """NVIDIA's. `lost`: what a closer look at the cards that the engine would use says, with cures."""
    if hardware.accelerator == "amd":
        return skipped("gpu", "no NVIDIA GPU; see amd")
    notes = list(hardware.notes)
    if hardware.accelerator == "cpu":
        if notes:
            text = f"no GPU can be used, vLLM would run on the CPU: {'; '.join(notes)}"
            return failure("gpu", text, "repair what it names; nvidia-smi and dmesg tell more")
        return skipped("gpu", "no NVIDIA driver here: vLLM runs on the CPU")
    found = [failure("gpu", what, cure) for what, cure in lost]
    found += _broken_or_few("gpu", hardware, config)
    found += [warning("gpu", note, "repair it; the engine runs on the others") for note in notes]
    if 0 < driver_branch(hardware.driver) < OLDEST_DRIVER:
        found.append(warning("gpu", f"the NVIDIA driver {hardware.driver} is older than {OLDEST_DRIVER}", _DRIVER))
    return worst(
        "gpu", found or [ok("gpu", f"{_names(hardware)}, driver {hardware.driver}, CUDA {hardware.cuda or '?'}")]
    )


def driver_branch(version: str) -> int:
    """535 of `535.129.03`; 0 when it has no such form."""
    found = re.match(r"(\d+)\.", version)
    return int(found[1]) if found else 0


def amd(hardware: Hardware, config: Config, present: bool, opened: bool) -> Finding:
    """`present`: the kernel has an AMD compute device; `opened`: this user may open /dev/kfd."""
    if not present:
        return skipped("amd", "no AMD GPU")
    if hardware.accelerator == "nvidia":
        return skipped("amd", "an AMD GPU is there, NVIDIA's are used")
    if not opened:
        return failure("amd", "this user may not open /dev/kfd, so ROCm finds no GPU", _AMD_GROUPS)
    if hardware.accelerator != "amd":
        why = "; ".join(hardware.notes) or "neither amd-smi nor rocm-smi names one"
        return failure("amd", f"no AMD GPU can be used: {why}", "install ROCm's amd-smi, and look at dmesg")
    found = _broken_or_few("amd", hardware, config)
    return worst("amd", found or [ok("amd", f"{_names(hardware)}, driver {hardware.driver or '?'}")])


def _broken_or_few(check: str, hardware: Hardware, config: Config) -> list[Finding]:
    """Broken ones are a failure where the others are too few for the engine."""
    ranks, here = _ranks(config), len(hardware.devices)
    few = here < (1 if config.distributed_backend == "ray" else ranks)
    found = [(failure if few else warning)(check, card.what, card.cure) for card in hardware.broken]
    if few and (here or not found):
        text = f"{ranks} GPUs are wanted (tensor x pipeline parallel), {here} can be used"
        found.append(failure(check, text, "lower TENSOR_PARALLEL_SIZE or PIPELINE_PARALLEL_SIZE"))
    return found


def shm(hardware: Hardware, config: Config) -> Finding:
    """Shared memory holds what evicted KV blocks are offloaded to, and what several ranks exchange."""
    size, ranks = hardware.shm_bytes, _ranks(config)
    exchange = NCCL_SHM if ranks > 1 else WORKER_SHM if hardware.accelerator == "cpu" else 0
    lowered: list[str] = []
    offload = _offload(replace(hardware, shm_bytes=hardware.memory_bytes), config, lowered)
    parts = [f"{offload / GIB:.1f} for KV offload"] if offload else []
    parts += [f"{exchange / GIB:.1f} for {f'{ranks} ranks' if ranks > 1 else 'its worker'}"] if exchange else []
    has, wants = f"{SHM} has {size / GIB:.1f} GiB", f"of use are {' and '.join(parts)}" if parts else "none is needed"
    larger, smaller = _larger(max(GIB, offload + exchange)), "set KV_OFFLOAD_SIZE_GB lower"
    if not size:
        return failure("shm", f"there is no {SHM}; {wants}", larger)
    if size < exchange or (not config.auto_config and size < offload + exchange):
        return failure("shm", f"{has}, that is too little: {wants}", larger)
    if size < offload + exchange:
        return warning("shm", f"{has}, so that KV offload is lowered: {wants}", f"{larger}, or {smaller}")
    if lowered:
        return warning("shm", f"{has}; {lowered[0]}", smaller)
    return ok("shm", f"{has}; {wants}")


def _offload(hardware: Hardware, config: Config, lowered: list[str]) -> int:
    """Bytes, as far as host memory allows them. `lowered` gains a sentence when that is less than was asked for."""
    told = None if config.kv_offload_size_gb is None else int(config.kv_offload_size_gb * 10**9)
    if config.kv_cache_backend == "none" or hardware.accelerator == "cpu":
        return 0
    return host_offload(hardware, Wishes(offload_bytes=told), lowered) if config.auto_config else told or 0


def _larger(size: int) -> str:
    gib = -(-size // GIB)
    ways = f"compose: SHM_SIZE={gib}g, docker: --shm-size={gib}g, a host: `mount -o remount,size={gib}G {SHM}`"
    return f"make {SHM} {gib} GiB or larger ({ways})"


def _ranks(config: Config) -> int:
    return config.tensor_parallel_size * config.pipeline_parallel_size


def _names(hardware: Hardware) -> str:
    names = [device.name for device in hardware.devices]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
