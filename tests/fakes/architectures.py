"""Real models as their repositories describe them: config.json, and the tensors of their safetensors headers."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

Tensor = tuple[str, str, tuple[int, ...]]  # name, dtype of safetensors, shape
_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "U8": 1, "I32": 4}


def header(tensors: Iterator[Tensor]) -> dict[str, Any]:
    """As in a safetensors file, all in one."""
    at, found = 0, {}
    for name, dtype, shape in tensors:
        size = prod(shape) * _BYTES[dtype]
        found[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    return found


@dataclass(frozen=True)
class Decoder:
    """A decoder with gated feed-forward layers. `quant`: how its linear layers are stored."""

    config: dict[str, Any]
    prefix: str = "model."
    dtype: str = "BF16"
    quant: str = ""
    head: bool = True  # an lm_head is in the file
    norms: int = 2  # of `hidden`, in each layer
    qk_norm: bool = False
    bias: bool = False

    def __getattr__(self, name: str) -> Any:
        return {**self.config, **self.config.get("text_config", {})}[name]

    def tensors(self) -> Iterator[Tensor]:
        p, hidden = self.prefix, self.hidden_size
        yield f"{p}embed_tokens.weight", self.dtype, (self.vocab_size, hidden)
        for layer in range(self.num_hidden_layers):
            yield from self.layer(f"{p}layers.{layer}.")
        yield f"{p}norm.weight", self.dtype, (hidden,)
        if self.head:
            yield "lm_head.weight", self.dtype, (self.vocab_size, hidden)

    def layer(self, p: str) -> Iterator[Tensor]:
        hidden, width = self.hidden_size, self.head_dim
        q, kv = self.num_attention_heads * width, self.num_key_value_heads * width
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            yield from self.linear(f"{p}self_attn.{name}_proj", hidden, rows)
            if self.bias:
                yield f"{p}self_attn.{name}_proj.bias", self.dtype, (rows,)
        yield from self.linear(f"{p}self_attn.o_proj", q, hidden)
        if self.qk_norm:
            yield f"{p}self_attn.q_norm.weight", self.dtype, (width,)
            yield f"{p}self_attn.k_norm.weight", self.dtype, (width,)
        for number in range(self.norms):
            yield f"{p}norm{number}.weight", self.dtype, (hidden,)
        if experts := self.config.get("num_experts"):
            yield f"{p}mlp.gate.weight", self.dtype, (experts, hidden)
            for expert in range(experts):
                yield from self.mlp(f"{p}mlp.experts.{expert}.", self.moe_intermediate_size)
        else:
            yield from self.mlp(f"{p}mlp.", self.intermediate_size)

    def mlp(self, p: str, inner: int) -> Iterator[Tensor]:
        yield from self.linear(f"{p}gate_proj", self.hidden_size, inner)
        yield from self.linear(f"{p}up_proj", self.hidden_size, inner)
        yield from self.linear(f"{p}down_proj", inner, self.hidden_size)

    def linear(self, name: str, columns: int, rows: int) -> Iterator[Tensor]:
        if self.quant == "awq":  # eight 4-bit numbers in an I32, groups of 128 along the input
            yield f"{name}.qweight", "I32", (columns, rows // 8)
        elif self.quant == "gptq":
            yield f"{name}.qweight", "I32", (columns // 8, rows)
            yield f"{name}.g_idx", "I32", (columns,)
        else:
            yield f"{name}.weight", self.dtype, (rows, columns)
            return
        yield f"{name}.qzeros", "I32", (columns // 128, rows // 8)
        yield f"{name}.scales", "F16", (columns // 128, rows)


class Gemma(Decoder):
    """With its image encoder (SigLIP so400m, 27 layers of 1152)."""

    def tensors(self) -> Iterator[Tensor]:
        yield from super().tensors()
        v = "vision_tower.vision_model."
        yield f"{v}embeddings.patch_embedding.weight", "BF16", (1152, 3, 14, 14)
        yield f"{v}embeddings.position_embedding.weight", "BF16", (4096, 1152)
        for layer in range(27):
            for name in ("q", "k", "v", "out"):
                yield f"{v}encoder.layers.{layer}.self_attn.{name}_proj.weight", "BF16", (1152, 1152)
            yield f"{v}encoder.layers.{layer}.mlp.fc1.weight", "BF16", (4304, 1152)
            yield f"{v}encoder.layers.{layer}.mlp.fc2.weight", "BF16", (1152, 4304)
        yield "multi_modal_projector.mm_input_projection_weight", "BF16", (1152, self.hidden_size)


class DeepSeek(Decoder):
    """MLA, fp8 in blocks of 128 x 128, 256 experts, and a layer for multi-token prediction behind the last."""

    def tensors(self) -> Iterator[Tensor]:
        yield from super().tensors()
        p = f"model.layers.{self.num_hidden_layers}."
        yield from self.layer(p)
        yield f"{p}embed_tokens.weight", "BF16", (self.vocab_size, self.hidden_size)
        yield f"{p}shared_head.head.weight", "BF16", (self.vocab_size, self.hidden_size)
        yield f"{p}eh_proj.weight", "BF16", (self.hidden_size, 2 * self.hidden_size)

    def layer(self, p: str) -> Iterator[Tensor]:
        hidden, heads = self.hidden_size, self.num_attention_heads
        nope, rope, value = self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim
        yield from self.linear(f"{p}self_attn.q_a_proj", hidden, self.q_lora_rank)
        yield from self.linear(f"{p}self_attn.q_b_proj", self.q_lora_rank, heads * (nope + rope))
        yield from self.linear(f"{p}self_attn.kv_a_proj_with_mqa", hidden, self.kv_lora_rank + rope)
        yield from self.linear(f"{p}self_attn.kv_b_proj", self.kv_lora_rank, heads * (nope + value))
        yield from self.linear(f"{p}self_attn.o_proj", heads * value, hidden)
        if int(p.split(".")[2]) < self.first_k_dense_replace:
            yield from self.mlp(f"{p}mlp.", self.intermediate_size)
            return
        yield f"{p}mlp.gate.weight", "BF16", (self.n_routed_experts, hidden)
        yield from self.mlp(f"{p}mlp.shared_experts.", self.moe_intermediate_size)
        for expert in range(self.n_routed_experts):
            yield from self.mlp(f"{p}mlp.experts.{expert}.", self.moe_intermediate_size)

    def linear(self, name: str, columns: int, rows: int) -> Iterator[Tensor]:
        yield f"{name}.weight", "F8_E4M3", (rows, columns)
        yield f"{name}.weight_scale_inv", "F32", (-(-rows // 128), -(-columns // 128))


class GptOss(Decoder):
    """Experts in mxfp4: two numbers in a byte, and a byte of scale for 32 of them."""

    def layer(self, p: str) -> Iterator[Tensor]:
        hidden, experts, inner = self.hidden_size, self.num_local_experts, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        for name, columns, rows in (("q", hidden, q), ("k", hidden, kv), ("v", hidden, kv), ("o", q, hidden)):
            yield f"{p}self_attn.{name}_proj.weight", "BF16", (rows, columns)
        yield f"{p}mlp.router.weight", "BF16", (experts, hidden)
        for name, columns, rows in (("gate_up", hidden, 2 * inner), ("down", inner, hidden)):
            yield f"{p}mlp.experts.{name}_proj_blocks", "U8", (experts, rows, columns // 32, 16)
            yield f"{p}mlp.experts.{name}_proj_scales", "U8", (experts, rows, columns // 32)
            yield f"{p}mlp.experts.{name}_proj_bias", "BF16", (experts, rows)


class Bert(Decoder):
    def tensors(self) -> Iterator[Tensor]:
        hidden, inner = self.hidden_size, self.intermediate_size
        yield "embeddings.word_embeddings.weight", "F32", (self.vocab_size, hidden)
        yield "embeddings.position_embeddings.weight", "F32", (self.max_position_embeddings, hidden)
        for layer in range(self.num_hidden_layers):
            for name, rows, columns in (
                *((f"attention.self.{n}", hidden, hidden) for n in ("query", "key", "value")),
                ("attention.output.dense", hidden, hidden),
                ("intermediate.dense", inner, hidden),
                ("output.dense", hidden, inner),
            ):
                yield f"encoder.layer.{layer}.{name}.weight", "F32", (rows, columns)
                yield f"encoder.layer.{layer}.{name}.bias", "F32", (rows,)
        yield "pooler.dense.weight", "F32", (hidden, hidden)


def _config(
    name: str, hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "architectures": [name], "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab, "head_dim": hidden // heads,
        "torch_dtype": "bfloat16", "tie_word_embeddings": False, **more,
    }  # fmt: skip


_LLAMA3 = {
    "max_position_embeddings": 131072, "model_type": "llama",
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
}  # fmt: skip
_QWEN3 = {
    "head_dim": 128, "max_position_embeddings": 40960, "sliding_window": None, "use_sliding_window": False,
    "max_window_layers": 28, "rope_scaling": None,
}  # fmt: skip
_OSS = {
    "head_dim": 64, "sliding_window": 128, "max_position_embeddings": 131072, "model_type": "gpt_oss",
    "quantization_config": {"quant_method": "mxfp4"},
    "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096},
}  # fmt: skip
_LLAMA, _QWEN, _MOE, _GPT_OSS = "LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM"

MODELS: dict[str, Decoder] = {
    "Llama-3.1-8B": Decoder(_config(_LLAMA, 4096, 14336, 32, 32, 8, 128256, **_LLAMA3)),
    "Llama-3.1-70B": Decoder(_config(_LLAMA, 8192, 28672, 80, 64, 8, 128256, **_LLAMA3)),
    # The file holds the tied head once more.
    "Qwen3-0.6B": Decoder(
        _config(_QWEN, 1024, 3072, 28, 16, 8, 151936, **{**_QWEN3, "tie_word_embeddings": True}), qk_norm=True
    ),
    "Qwen3-32B": Decoder(_config(_QWEN, 5120, 25600, 64, 64, 8, 151936, **_QWEN3), qk_norm=True),
    "Qwen3-30B-A3B": Decoder(
        _config(_MOE, 2048, 6144, 48, 32, 4, 151936, num_experts=128, moe_intermediate_size=768, **_QWEN3), qk_norm=True
    ),
    "Mistral-7B-v0.1": Decoder(
        _config("MistralForCausalLM", 4096, 14336, 32, 32, 8, 32000, sliding_window=4096, max_position_embeddings=32768)
    ),
    # Its config.json leaves out what the class of transformers has as defaults, the pattern 5:1 among it.
    "Gemma-3-27B": Gemma(
        {
            "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "torch_dtype": "bfloat16",
            "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16},
            "vocab_size": 262208, "tie_word_embeddings": True,
            "text_config": {
                "model_type": "gemma3_text", "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62,
                "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "sliding_window": 1024,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        },
        prefix="language_model.model.", head=False, norms=4, qk_norm=True,
    ),
    "DeepSeek-V3": DeepSeek(
        _config(
            "DeepseekV3ForCausalLM", 7168, 18432, 61, 128, 128, 129280, moe_intermediate_size=2048,
            n_routed_experts=256, first_k_dense_replace=3, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128, max_position_embeddings=163840, model_type="deepseek_v3", num_nextn_predict_layers=1,
            quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
            rope_scaling={"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
        )
    ),
    "gpt-oss-20b": GptOss(_config(_GPT_OSS, 2880, 2880, 24, 64, 8, 201088, num_local_experts=32, **_OSS)),
    "gpt-oss-120b": GptOss(_config(_GPT_OSS, 2880, 2880, 36, 64, 8, 201088, num_local_experts=128, **_OSS)),
    "phi-4": Decoder(
        _config("Phi3ForCausalLM", 5120, 17920, 40, 40, 10, 100352, max_position_embeddings=16384, sliding_window=None)
    ),
    "Qwen2.5-7B-AWQ": Decoder(
        _config(
            "Qwen2ForCausalLM", 3584, 18944, 28, 28, 4, 152064, max_position_embeddings=32768, sliding_window=131072,
            use_sliding_window=False, max_window_layers=28, torch_dtype="float16",
            quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128},
        ),
        dtype="F16", quant="awq", bias=True,
    ),
    "Llama-2-13B-GPTQ": Decoder(
        _config(
            _LLAMA, 5120, 13824, 40, 40, 40, 32000, max_position_embeddings=4096, torch_dtype="float16",
            quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128},
        ),
        dtype="F16", quant="gptq",
    ),
    "bge-large-en-v1.5": Bert(
        _config("BertModel", 1024, 4096, 24, 16, 16, 30522, max_position_embeddings=512, torch_dtype="float32")
    ),
    "Qwen3-Embedding-8B": Decoder(
        _config(_QWEN, 4096, 12288, 36, 32, 8, 151665, **_QWEN3), prefix="", head=False, qk_norm=True
    ),
}  # fmt: skip
