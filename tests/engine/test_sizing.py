import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xim_agent.engine.budget import GIB, Wishes, in_flight
from xim_agent.engine.facts import ModelFacts, Weights, facts, weigh
from xim_agent.engine.model import read_model
from xim_agent.engine.sizing import longest, size
from xim_agent.errors import AgentError
from xim_agent.hardware.report import Cpu, Device, Hardware

CPU_HOST = Hardware("cpu", (), Cpu("a CPU", 2, 2), (0, 1), 2.0, 24 * GIB, 24 * GIB, 24 * GIB, core_of=(0, 1))
SMOL = ModelFacts("LlamaForCausalLM", 269_060_552, 30, 3, 64, max_len=8192)
LLAMA_8B = ModelFacts("LlamaForCausalLM", 16_060_522_496, 32, 8, 128, max_len=131072)


def gpu(total: float, free: float | None = None, capability: str = "8.6") -> Device:
    return Device(0, "GPU-0", "a GPU", int(total * GIB), int((total if free is None else free) * GIB), capability)


def gpu_host(*devices: Device) -> Hardware:
    return replace(CPU_HOST, accelerator="nvidia", devices=devices, memory_bytes=64 * GIB)


def test_kv_bytes_of_a_token() -> None:
    assert LLAMA_8B.sequence_bytes(1) == 2 * 32 * 8 * 128 * 2  # 128 KiB, as vLLM reports
    assert SMOL.sequence_bytes(1) == 23040
    assert LLAMA_8B.sequence_bytes(1, tensor_parallel=4) == 2 * 32 * 2 * 128 * 2
    assert LLAMA_8B.sequence_bytes(1, tensor_parallel=16) == 2 * 32 * 1 * 128 * 2, "never less than one head a rank"
    deepseek = ModelFacts("DeepseekV3ForCausalLM", 0, 61, 128, 128, mla_width=576)
    assert deepseek.sequence_bytes(1, tensor_parallel=8) == 61 * 576 * 2, "the compressed cache is on every rank"
    gemma = ModelFacts("Gemma3ForCausalLM", 0, 8, 8, 256, sliding_layers=40, window=1024)
    assert gemma.sequence_bytes(8192) == (8 * 8192 + 40 * 1024) * 2 * 8 * 256 * 2


def test_facts_of_config_json() -> None:
    gemma = facts(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": {
                "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
                "sliding_window": 1024, "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
                "max_position_embeddings": 131072, "dtype": "bfloat16",
            },
        },
        Weights(10),
    )  # fmt: skip
    assert (gemma.full_layers, gemma.sliding_layers, gemma.window, gemma.kv_heads) == (1, 5, 1024, 4)
    quantized = facts(
        {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 256, "sliding_window": 4096,
         "use_sliding_window": False, "torch_dtype": "float16", "quantization_config": {"quant_method": "awq"}},
        Weights(10),
    )  # fmt: skip
    assert (quantized.quantization, quantized.head_dim, quantized.kv_heads, quantized.sliding_layers) == (
        "awq",
        64,
        4,
        0,
    )


def test_weights_from_headers(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "BF16", "shape": [10], "data_offsets": [0, 20]},
        "b": {"dtype": "F32", "shape": [10], "data_offsets": [20, 60]},
    }
    assert weigh([header], {}).total == 20 + 20, "float32 is served in 16 bits"
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 1, "num_attention_heads": 1}))
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 16)
    with pytest.raises(AgentError) as broken:
        read_model(tmp_path)
    assert broken.value.code == "model_unreadable"


def test_small_models_on_a_small_cpu_host_take_what_they_can_use_and_no_more() -> None:
    toy = ModelFacts("LlamaForCausalLM", 853_248, 2, 2, 32, max_len=16384)
    made = size(toy, CPU_HOST, Wishes())
    assert (made.kv_bytes, made.max_model_len, made.ceiling) == (GIB, None, 64)
    smol = size(SMOL, CPU_HOST, Wishes())
    assert smol.kv_bytes == 3 * GIB  # 64 sequences of 2048 tokens are 2.8 GiB
    assert (smol.max_model_len, smol.ceiling) == (None, 64)


def test_a_length_that_does_not_fit_is_lowered_and_said_aloud() -> None:
    small = replace(CPU_HOST, memory_bytes=22 * GIB)
    made = size(LLAMA_8B, small, Wishes())
    assert made.kv_bytes == 3 * GIB
    assert made.max_model_len == 3 * GIB // LLAMA_8B.sequence_bytes(1)
    assert "131072" in made.warnings[0]
    assert str(made.max_model_len) in made.warnings[0]


def test_a_wanted_length_that_does_not_fit_is_refused_with_the_sum_and_a_cure() -> None:
    with pytest.raises(AgentError) as refused:
        size(LLAMA_8B, replace(CPU_HOST, memory_bytes=22 * GIB), Wishes(max_model_len=131072))
    assert refused.value.code == "model_does_not_fit"
    assert "14.96 GiB" in refused.value.message
    assert "24576 tokens" in refused.value.hint


def test_gpu_budget_follows_what_is_free_now() -> None:
    whole = size(LLAMA_8B, gpu_host(gpu(24)), Wishes(devices=(gpu(24),)))
    assert whole.utilization == 0.95
    assert whole.kv_bytes == int(24 * GIB * 0.95) - 2 * GIB - LLAMA_8B.weights_bytes
    shared = size(LLAMA_8B, gpu_host(gpu(24, 21)), Wishes(devices=(gpu(24, 21),)))
    assert shared.utilization == 0.85, "half a GiB is left to the CUDA context"
    assert "21.00 GiB of 24.00 GiB are free" in shared.warnings[0]


def test_quantization_is_chosen_only_when_it_must_and_can_be() -> None:
    for capability, method in (("8.9", "fp8"), ("8.6", "fp8"), ("7.5", "bitsandbytes")):
        card = gpu(16, capability=capability)
        assert size(LLAMA_8B, gpu_host(card), Wishes(devices=(card,), bitsandbytes=True)).quantization == method
    big = gpu(48)
    assert size(LLAMA_8B, gpu_host(big), Wishes(devices=(big,))).quantization is None
    awq = replace(LLAMA_8B, weights_bytes=6 * GIB, quantization="awq")
    assert size(awq, gpu_host(gpu(16)), Wishes(devices=(gpu(16),))).quantization is None


def test_offload_is_a_quarter_of_memory_unless_that_is_too_much() -> None:
    card = gpu(48)
    wishes = Wishes(devices=(card,), offload_bytes=None)
    host = replace(gpu_host(card), shm_bytes=32 * GIB)
    assert size(LLAMA_8B, host, wishes).offload_bytes == 16 * GIB
    tight = size(LLAMA_8B, replace(host, shm_bytes=GIB), wishes)
    assert tight.offload_bytes == GIB
    assert "/dev/shm" in tight.warnings[-1]
    assert size(LLAMA_8B, CPU_HOST, wishes).offload_bytes == 0


@given(
    st.builds(
        ModelFacts, st.just("X"), st.integers(0, 40 * GIB), st.integers(0, 80), st.integers(1, 64),
        st.sampled_from([64, 128]), max_len=st.integers(0, 1 << 20), sliding_layers=st.integers(1, 60),
        window=st.integers(1, 8192), mla_width=st.sampled_from([0, 576]),
    ),
    st.integers(1, 256 * GIB), st.sampled_from([1, 2, 4, 8]), st.one_of(st.none(), st.integers(1, 4096)),
)  # fmt: skip
def test_a_plan_never_promises_more_than_the_cache_holds(
    model: ModelFacts, memory: int, ranks: int, most: int | None
) -> None:
    host = replace(CPU_HOST, memory_bytes=memory)
    wishes = Wishes(tensor_parallel=ranks, max_concurrent=most)
    try:
        made = size(model, host, wishes)
    except AgentError:
        return
    length = made.max_model_len or model.max_len or 2048
    assert model.sequence_bytes(length, ranks) <= made.kv_bytes
    assert made.kv_bytes * ranks + model.weights_bytes <= memory
    assert made.ceiling == most or 1 <= made.ceiling <= 64
    held = longest(model, made.kv_bytes, ranks, 1)
    assert model.sequence_bytes(min(held, 1 << 40), ranks) <= made.kv_bytes or held >= 1 << 40


@given(
    st.builds(
        ModelFacts, st.just("X"), st.integers(0, 200 * GIB), st.integers(0, 80), st.sampled_from([1, 4, 8, 64]),
        st.sampled_from([64, 128]), max_len=st.integers(0, 1 << 20), sliding_layers=st.integers(0, 60),
        window=st.integers(1, 8192), mla_width=st.sampled_from([0, 576]), state_layers=st.integers(0, 20),
        state_bytes=st.integers(0, 1 << 22),
    ),
    st.lists(st.tuples(st.integers(1, 200), st.floats(0, 1)), min_size=1, max_size=8),
    st.floats(0.05, 1.0),
    st.one_of(st.none(), st.integers(1, 1 << 20)),
)  # fmt: skip
def test_a_plan_fits_every_card_as_it_is_now(
    model: ModelFacts, sizes: list[tuple[int, float]], utilization: float, length: int | None
) -> None:
    cards = tuple(gpu(total, total * free) for total, free in sizes)
    wishes = Wishes(tensor_parallel=len(cards), utilization=utilization, devices=cards, max_model_len=length)
    try:
        made = size(model, gpu_host(*cards), wishes)
    except AgentError as error:
        assert error.code in ("model_does_not_fit", "tensor_parallel_unfit")  # noqa: PT017
        return
    assert made.utilization is not None
    shrunk = {"fp8": 0.55, None: 1.0}[made.quantization]
    rank = made.kv_bytes + model.weights_bytes * shrunk / len(cards)
    for card in cards:
        taken = card.memory_total_bytes * made.utilization
        assert made.utilization <= 0.05 or taken <= card.memory_free_bytes
        assert rank + 2 * GIB <= taken + 2
    flying = in_flight(gpu_host(*cards), wishes)
    longest_one = made.max_model_len or model.max_len or 2048
    assert model.sequence_bytes(longest_one, len(cards), 1, flying) <= made.kv_bytes
