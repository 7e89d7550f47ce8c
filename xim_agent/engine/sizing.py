"""How much memory a model leaves for its KV cache, and how many requests that holds. Bytes and tokens; pure."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from xim_agent.engine.budget import (
    TYPICAL_FLOOR,
    Term,
    Wishes,
    cpu_budget,
    gib,
    gpu_budget,
    host_offload,
    in_flight,
    typical_len,
)
from xim_agent.engine.facts import ModelFacts
from xim_agent.errors import AgentError, Exit
from xim_agent.hardware.report import Hardware

MOST_CONCURRENT = 256
ANY_LENGTH = 1 << 40


@dataclass(frozen=True)
class Sizing:
    """What to start vLLM with. `max_model_len` None: vLLM's own default. `kv_bytes`: per rank; a CPU engine is told it.

    `terms`: the sums behind the numbers; `warnings`: what was changed against a wish or a default.
    """

    max_model_len: int | None
    kv_bytes: int
    ceiling: int
    utilization: float | None
    quantization: str | None
    offload_bytes: int
    terms: tuple[Term, ...]
    warnings: tuple[str, ...]


def ceiling(model: ModelFacts, kv_bytes: int, max_len: int, wishes: Wishes) -> int:
    """Most leases at once: the operator's number, else how many sequences of typical length the cache holds."""
    if wishes.max_concurrent is not None:
        return wishes.max_concurrent
    each = model.sequence_bytes(typical_len(max_len), *wishes.split)
    return max(1, min(kv_bytes // max(1, each), MOST_CONCURRENT, wishes.max_num_seqs))


def longest(model: ModelFacts, kv_bytes: int, tensor_parallel: int, pipeline_parallel: int, in_flight: int = 0) -> int:
    """The longest single sequence, in tokens, that `kv_bytes` of one rank hold; at most ANY_LENGTH."""
    low, high = 0, ANY_LENGTH
    while low < high:
        middle = (low + high + 1) // 2
        if model.sequence_bytes(middle, tensor_parallel, pipeline_parallel, in_flight) <= kv_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def size(model: ModelFacts, hardware: Hardware, wishes: Wishes) -> Sizing:
    """Raises AgentError `model_does_not_fit` with the sum and the smallest change that would fit, and
    `tensor_parallel_unfit`."""
    if not model.splits(wishes.tensor_parallel):
        raise AgentError(
            "tensor_parallel_unfit",
            f"{model.architecture} has {model.heads} attention heads and {model.kv_heads} KV heads, which "
            f"TENSOR_PARALLEL_SIZE={wishes.tensor_parallel} does not split evenly",
            hint=f"these do: {', '.join(str(n) for n in range(1, 65) if model.splits(n))}",
            exit_code=Exit.CONFIG,
        )
    made = _sized(model, hardware, wishes)
    if not isinstance(made, Sizing):
        terms, least, missing = made
        cures = [f"{gib(missing)} more memory on each of {wishes.ranks} rank(s)", *_cures(model, hardware, wishes)]
        raise AgentError(
            "model_does_not_fit",
            f"{model.architecture} does not fit: {'; '.join(map(str, terms))}; {least} tokens are needed",
            hint=f"it would fit with {', or '.join(cures)}",
            exit_code=Exit.CONFIG,
        )
    return made


def _sized(model: ModelFacts, hardware: Hardware, wishes: Wishes) -> Sizing | tuple[list[Term], int, int]:
    """When it does not fit: the terms, tokens that one sequence needs at least, bytes that are missing on each rank."""
    on_cpu = hardware.accelerator == "cpu"
    quantization, utilization = wishes.quantization, None
    warnings: list[str] = []
    if on_cpu:
        kv_bytes, terms = cpu_budget(model, hardware, wishes)
    else:
        quantization, utilization, kv_bytes, terms, warnings = gpu_budget(model, hardware, wishes)
    if wishes.kv_bytes is not None:
        kv_bytes = wishes.kv_bytes
    flying = in_flight(hardware, wishes)
    wanted = wishes.max_model_len or model.max_len or TYPICAL_FLOOR
    least = min(wanted, TYPICAL_FLOOR) if wishes.max_model_len is None else wanted
    holds = longest(model, max(0, kv_bytes), *wishes.split, flying)
    told_kv = "" if wishes.kv_bytes is None else ", as VLLM_ARGS or VLLM_ENV say"
    terms.append(Term("kv_cache", max(0, kv_bytes), "bytes", f"KV cache of a rank{told_kv}"))
    terms.append(Term("kv_slot", ceil(model.slot_bytes(*wishes.split)), "bytes", "one token in it"))
    terms.append(Term("longest_sequence", min(holds, wanted), "tokens", "longest sequence it holds"))
    if holds < least or kv_bytes < 0:
        return terms, least, model.sequence_bytes(least, *wishes.split, flying) - kv_bytes
    told = wishes.max_model_len
    if told is None and holds < wanted:
        told = holds // 16 * 16
        warnings.append(f"maximum length lowered from the model's {wanted} to {told} tokens: no more fits the KV cache")
    offload = host_offload(hardware, wishes, warnings)
    if offload:
        terms.append(Term("kv_offload", offload, "bytes", "host memory for evicted KV blocks"))
    most = ceiling(model, kv_bytes, told or wanted, wishes)
    terms.append(Term("typical_sequence", typical_len(told or wanted), "tokens", "typical sequence"))
    terms.append(Term("max_concurrent", most, "requests", _why(wishes, most)))
    return Sizing(told, kv_bytes, most, utilization, quantization, offload, tuple(terms), tuple(warnings))


def _why(wishes: Wishes, most: int) -> str:
    if wishes.max_concurrent is not None:
        return "at once: MAX_CONCURRENT"
    return "at once: --max-num-seqs" if most == wishes.max_num_seqs else "at once: so many typical ones fit"


def _cures(model: ModelFacts, hardware: Hardware, wishes: Wishes) -> Iterator[str]:
    """What would make it fit, the least first."""

    def fits(changed: Wishes) -> bool:
        return isinstance(_sized(model, hardware, changed), Sizing)

    if wishes.max_model_len is not None:
        shorter = _sized(model, hardware, replace(wishes, max_model_len=None))
        if isinstance(shorter, Sizing):
            holds = next(t.value for t in shorter.terms if t.item == "longest_sequence")
            yield f"a maximum length of {(min(holds, wishes.max_model_len - 1)) // 16 * 16} tokens"
            return
    if hardware.accelerator == "cpu":
        return
    emptied = tuple(replace(d, memory_free_bytes=d.memory_total_bytes) for d in wishes.devices)
    if fits(replace(wishes, devices=emptied)):
        yield "what other processes hold of the GPU's memory"
    if wishes.utilization < 0.95 and fits(replace(wishes, utilization=0.95)):
        yield "GPU_MEMORY_UTILIZATION=0.95"
    largest = wishes.devices[: wishes.ranks]
    for more in (n for n in (2, 4, 8, 16) if n > wishes.tensor_parallel and model.splits(n)):
        ranks = more * wishes.pipeline_parallel
        enough = wishes.devices if ranks <= len(wishes.devices) else (largest * ranks)[:ranks]
        if fits(replace(wishes, tensor_parallel=more, devices=enough)):
            yield f"TENSOR_PARALLEL_SIZE={more}" + ("" if ranks <= len(wishes.devices) else f" on {ranks} such GPUs")
            return
