"""What config.json and the safetensors headers say about the sizes of a model. Bytes, tokens, layers; pure.

Source of the rules: vLLM 0.32 (`model_arch_config_convertor`, `kv_cache_interface`, `kv_cache_utils`, `config/model`)
and, for what a config.json leaves out, the configuration classes of transformers.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

DTYPE_BYTES = {"float32": 4.0, "float": 4.0, "float16": 2.0, "half": 2.0, "bfloat16": 2.0}
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_OTHER_PART = re.compile(r"(?:^|\.)(?:vision|visual|audio|image|multi_modal|mm_projector|embed_vision)")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|tok_embeddings|word_embeddings)\.weight$")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.|^output\.weight$")
# An encoder looks at a whole text at once and keeps nothing of it.
_ENCODER = re.compile(r"Bert|Roberta|Electra|^GteModel|^GteNewModel|^NewModel$|^T5Encoder")
_SCALED_ALREADY = {"su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"}
_LENGTHS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length",
    "max_target_positions", "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
_KV_HEADS = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num", "num_attention_groups")
_PATTERN = "sliding_window_pattern"  # every so-manieth layer sees all
_LEFT_OUT: dict[str, dict[str, Any]] = {
    "gemma2": {_PATTERN: 2, "head_dim": 256, "max_position_embeddings": 8192},
    "gemma3_text": {
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096, _PATTERN: 6,
        "max_position_embeddings": 131072,
    },
    "cohere2": {_PATTERN: 4},
    "gpt_oss": {_PATTERN: 2, "max_position_embeddings": 131072},
    "qwen3_next": {"full_attention_interval": 4},
}  # fmt: skip
_DELTA_NET = {
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """Bytes as served. `first`: of `total`, what is in front of the layers (embeddings, image encoders); `last`: what
    is behind them, also when it is the embeddings once more and so not in `total` again; `draft`: layers behind the
    last one, that only speculative decoding loads, not in `total`."""

    total: int
    first: int = 0
    last: int = 0
    tied: bool = False
    draft: int = 0


@dataclass(frozen=True)
class ModelFacts:
    """`kv_heads` and `head_dim` are of one layer, `dtype_bytes` of an element of the KV cache.

    `full_layers` keep every token, `sliding_layers` the last `window` ones, `state_layers` `state_bytes` of a sequence
    each, however long it is. `mla_width`: elements per token and layer of a compressed cache (kv_lora_rank + rope), 0
    when there is none. `max_len` 0: unknown. `heads` 0: unknown.
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
    heads: int = 0
    layers: int = 0
    first_bytes: int = 0
    last_bytes: int = 0
    tied: bool = False
    draft_bytes: int = 0
    state_layers: int = 0
    state_bytes: int = 0

    def layer_bytes(self, tensor_parallel: int) -> float:
        """KV bytes of one token in one layer, per rank. Heads are split over ranks, never below one; MLA is not."""
        if self.mla_width:
            return self.mla_width * self.dtype_bytes
        return 2 * max(1, self.kv_heads // tensor_parallel) * self.head_dim * self.dtype_bytes

    def splits(self, tensor_parallel: int) -> bool:
        """vLLM gives each rank the same number of heads; KV heads are split, or the same one goes to several ranks."""
        most, least = max(self.kv_heads, tensor_parallel), min(self.kv_heads, tensor_parallel)
        even = self.heads % tensor_parallel == 0 and (self.mla_width > 0 or most % max(1, least) == 0)
        return even or not self.heads  # unknown

    @property
    def group(self) -> int:
        """Layers that share a block of vLLM's pool. Where layers are of several kinds it cuts each kind into groups of
        one size, the last one filled up: the smaller kind's number, or the larger one's when that is close."""
        kinds = [n for n in (self.full_layers, self.sliding_layers, self.state_layers) if n]
        if len(kinds) < 2:
            return sum(kinds)
        return max(kinds) if max(kinds) < 1.5 * min(kinds) else min(kinds)

    def _filled(self, layers: int) -> int:
        return ceil(layers / self.group) * self.group if self.group else 0

    def slot_bytes(self, tensor_parallel: int, pipeline_parallel: int) -> float:
        """Bytes of one token in one block of the pool, on the rank that holds most."""
        return self.group * self._share(pipeline_parallel) * self.layer_bytes(tensor_parallel)

    def sequence_bytes(
        self, tokens: int, tensor_parallel: int = 1, pipeline_parallel: int = 1, in_flight: int = 0
    ) -> int:
        """KV bytes of a sequence of `tokens`, on the rank that holds most. `in_flight`: tokens of the batches that are
        being computed, which layers with a window keep besides."""
        kept = self._filled(self.full_layers) * tokens
        kept += self._filled(self.sliding_layers) * min(tokens, self.window + in_flight)
        states = self._filled(self.state_layers) * self.state_bytes / tensor_parallel if tokens else 0.0
        return ceil((kept * self.layer_bytes(tensor_parallel) + states) * self._share(pipeline_parallel))

    def _share(self, pipeline_parallel: int) -> float:
        """Of the layers, those of the rank that has most."""
        layers = self.layers or self.full_layers + self.sliding_layers + self.state_layers
        return ceil(layers / pipeline_parallel) / layers if layers else 1.0

    def rank_bytes(self, tensor_parallel: int, pipeline_parallel: int) -> int:
        """Weights of the rank that holds most. The first stage has the embeddings, the last the head; a head that is
        the embeddings is there twice then."""
        if pipeline_parallel == 1:
            return ceil(self.weights_bytes / tensor_parallel)
        layers = self.weights_bytes - self.first_bytes - (0 if self.tied else self.last_bytes)
        most = layers * self._share(pipeline_parallel) + max(self.first_bytes, self.last_bytes)
        return ceil(most / tensor_parallel)


def weigh(headers: Iterable[Mapping[str, Any]], config: Mapping[str, Any]) -> Weights:
    """From the decoded headers of all safetensors files. vLLM turns float32 into 16 bits, and loads neither a copy of
    tied embeddings nor layers beyond num_hidden_layers (MTP)."""
    inner = _inner(config)
    layers = int(inner.get("num_hidden_layers") or 0)
    tied = inner.get("tie_word_embeddings") is True
    total = first = head = embedding = draft = 0
    for header in headers:
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            begin, end = tensor["data_offsets"]
            size = (end - begin) // {"F32": 2, "F64": 4}.get(tensor["dtype"], 1)
            layer = None if _OTHER_PART.search(name) else _LAYER.search(name)
            if layer is not None and 0 < layers <= int(layer[1]):
                draft += size
                continue
            if _HEAD.search(name):
                head += 0 if tied else size
                total += 0 if tied else size
                continue
            total += size
            if layer is None:
                first += size
                embedding += size if _EMBEDDING.search(name) else 0
    tied = tied or not head
    return Weights(total, first, embedding if tied else head, tied, draft)


def _inner(config: Mapping[str, Any]) -> dict[str, Any]:
    """Models of several parts keep the language model's numbers in `text_config`."""
    inner = {**config, **(config.get("text_config") or {})}
    known = {name: value for name, value in inner.items() if value is not None}
    return {**_LEFT_OUT.get(str(inner.get("model_type")), {}), **known}


def facts(config: Mapping[str, Any], weights: Weights) -> ModelFacts:
    """From a decoded config.json and the headers. Raises what nonsense in it makes Python raise."""
    inner = _inner(config)
    architecture = (config.get("architectures") or ["unknown"])[0]
    layers = int(inner.get("num_hidden_layers") or inner.get("n_layer") or 0)
    heads = int(inner.get("num_attention_heads") or inner.get("n_head") or 1)
    hidden = int(inner.get("hidden_size") or inner.get("n_embd") or 0)
    mla = int(inner.get("kv_lora_rank") or 0)
    window, sliding, states = _kinds(inner, layers)
    encoder = isinstance(architecture, str) and _ENCODER.search(architecture) is not None
    quantization = inner.get("quantization_config") or inner.get("compression_config") or {}
    return ModelFacts(
        architecture=architecture,
        weights_bytes=weights.total,
        full_layers=0 if encoder else layers - sliding - states,
        kv_heads=int(next((inner[key] for key in _KV_HEADS if inner.get(key)), heads)),
        head_dim=int(inner.get("head_dim") or (hidden // heads)),
        dtype_bytes=1.0 if _eight_bit_cache(quantization) else 2.0,  # vLLM serves float32 in 16 bits
        max_len=_max_len(config, inner),
        sliding_layers=0 if encoder else sliding,
        window=window,
        mla_width=mla + int(inner.get("qk_rope_head_dim") or 0) if mla else 0,
        quantization=quantization.get("quant_method") or None,
        heads=int(inner.get("num_attention_heads") or inner.get("n_head") or 0),
        layers=layers,
        first_bytes=weights.first,
        last_bytes=weights.last,
        tied=weights.tied,
        draft_bytes=weights.draft,
        state_layers=0 if encoder else states,
        state_bytes=_state_bytes(inner) if states else 0,
    )


def _kinds(inner: Mapping[str, Any], layers: int) -> tuple[int, int, int]:
    """Window, and how many layers slide or keep a state instead of tokens."""
    window = int(inner.get("sliding_window") or 0) if inner.get("use_sliding_window", True) else 0
    kinds = inner.get("layer_types") or []
    pattern, interval = int(inner.get(_PATTERN) or 0), int(inner.get("full_attention_interval") or 0)
    states = layers - layers // interval if interval else 0
    if kinds:
        sliding = sum("sliding" in kind for kind in kinds) if window else 0
        states = sum(kind in ("linear_attention", "mamba", "conv") for kind in kinds)
    elif not window:
        sliding = 0
    elif pattern:
        sliding = layers - layers // pattern
    elif inner.get("use_sliding_window") and "max_window_layers" in inner:  # Qwen: those before it see all
        sliding = max(0, layers - int(inner["max_window_layers"]))
    else:
        sliding = layers
    return window, sliding, states


def _state_bytes(inner: Mapping[str, Any]) -> int:
    """Gated delta net of Qwen3-Next: convolution and temporal state of one layer and sequence, in 16 bits."""
    told = {**_DELTA_NET, **inner}
    key_heads, value_heads, key, value, kernel = (int(told[name]) for name in _DELTA_NET)
    return 2 * ((2 * key_heads * key + value_heads * value) * (kernel - 1) + value_heads * value * key)


def _eight_bit_cache(quantization: Mapping[str, Any]) -> bool:
    """Checkpoints of NVIDIA's ModelOpt say how their KV cache is to be kept, and vLLM does it."""
    if not str(quantization.get("quant_method")).startswith("modelopt"):
        return False
    told = {**quantization, **(quantization.get("quantization") or {})}
    scheme = told.get("kv_cache_scheme") or told.get("kv_cache_quant_algo")
    return (scheme.get("num_bits") == 8) if isinstance(scheme, dict) else str(scheme).lower() == "fp8"


def _max_len(config: Mapping[str, Any], inner: Mapping[str, Any]) -> int:
    """vLLM's own default of --max-model-len."""
    found = min((int(inner[key]) for key in _LENGTHS if inner.get(key)), default=0)
    found = int(inner.get("model_max_length") or found)
    rope = inner.get("rope_scaling") or inner.get("rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "longrope":
        return int(config.get("original_max_position_embeddings") or found)
    if kind not in _SCALED_ALREADY and "gemma3" not in str(config.get("model_type")):
        found = int(found * float(rope.get("factor") or 1.0))
    return found
