"""Real models x real hardware, against numbers worked out here by hand from the architectures.

The oracle knows only this page: sizes of the published files, elements of the cache, vLLM's documented behaviour.
"""

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
from fakes.architectures import MODELS, Decoder, header

from xim_agent.engine.budget import Wishes, in_flight
from xim_agent.engine.facts import ModelFacts, facts, weigh
from xim_agent.engine.model import read_model
from xim_agent.engine.sizing import Sizing, longest, size
from xim_agent.errors import AgentError
from xim_agent.hardware.report import Cpu, Device, Hardware

GB, GIB, MIB = 10**9, 1 << 30, 1 << 20
NEAR = 0.03


@dataclass(frozen=True)
class Known:
    """`served`, `file` in GB: weights in memory, published files. `every`, `window`: KV elements of a token in layers
    that keep all tokens, and in those that keep the last `keeps` (with what vLLM fills up its groups of layers to)."""

    served: float
    file: float
    length: int
    every: int
    window: int = 0
    keeps: int = 0
    quantized: bool = False
    kv_heads: int = 8


KNOWN = {
    "Llama-3.1-8B": Known(16.06, 16.06, 131072, 2 * 32 * 8 * 128),
    "Llama-3.1-70B": Known(141.1, 141.1, 131072, 2 * 80 * 8 * 128),
    "Qwen3-0.6B": Known(1.192, 1.503, 40960, 2 * 28 * 8 * 128),  # 0.31 GB are the embeddings once more
    "Qwen3-32B": Known(65.52, 65.52, 40960, 2 * 64 * 8 * 128),
    "Qwen3-30B-A3B": Known(61.06, 61.06, 40960, 2 * 48 * 4 * 128, kv_heads=4),
    "Mistral-7B-v0.1": Known(14.48, 14.48, 32768, 0, 2 * 32 * 8 * 128, 4096),
    # 10 layers see all; the other 52 are six groups of ten, the last filled up.
    "Gemma-3-27B": Known(54.86, 54.86, 131072, 2 * 10 * 16 * 128, 2 * 60 * 16 * 128, 1024, kv_heads=16),
    # 512 + 64 elements a layer, the same on every rank; the MTP layer stays on the disk.
    "DeepSeek-V3": Known(673.1, 688.6, 163840, 61 * 576, quantized=True, kv_heads=1),
    "gpt-oss-20b": Known(13.76, 13.76, 131072, 2 * 12 * 8 * 64, 2 * 12 * 8 * 64, 128, quantized=True),
    "gpt-oss-120b": Known(65.25, 65.25, 131072, 2 * 18 * 8 * 64, 2 * 18 * 8 * 64, 128, quantized=True),
    "phi-4": Known(29.32, 29.32, 16384, 2 * 40 * 10 * 128, kv_heads=10),
    "Qwen2.5-7B-AWQ": Known(5.57, 5.57, 32768, 2 * 28 * 4 * 128, quantized=True, kv_heads=4),
    "Llama-2-13B-GPTQ": Known(7.26, 7.26, 4096, 2 * 40 * 40 * 128, quantized=True, kv_heads=40),
    "bge-large-en-v1.5": Known(0.67, 1.34, 512, 0, kv_heads=16),  # an encoder keeps nothing; float32 becomes 16 bits
    "Qwen3-Embedding-8B": Known(15.13, 15.13, 40960, 2 * 36 * 8 * 128),
}


@dataclass(frozen=True)
class Box:
    """`mib`: what NVML says of each card in all. `tokens`: of the steps in flight, two at once, by vLLM's defaults."""

    mib: int
    cards: int = 1
    quantizers: tuple[str, ...] = ("fp8",)
    tokens: int = 2 * 2048
    capability: str = "8.6"
    kind: str = "nvidia"
    name: str = "a GPU"


_H100 = Box(81559, 1, ("fp8",), 2 * 8192, "9.0", name="NVIDIA H100 80GB HBM3")
BOXES = {
    "CPU": Box(24 * 1024, 0, (), kind="cpu"),
    "RTX 3090": Box(24576),
    "A10": Box(23028),
    "A30": Box(24576, capability="8.0"),
    "L40S": Box(46068, 1, ("fp8",), capability="8.9"),
    "H100": _H100,
    "H200": replace(_H100, mib=143771),
    "2 x H100": replace(_H100, cards=2),
    "8 x H100": replace(_H100, cards=8),
    "8 x H200": replace(_H100, mib=143771, cards=8),
    "MIG 3g.40gb": replace(_H100, mib=40448, tokens=2 * 2048, name="NVIDIA H100 80GB HBM3 MIG 3g.40gb"),
    "A100": Box(81920, capability="8.0", name="NVIDIA A100-SXM4-80GB"),  # vLLM takes smaller steps there
    "MI300X": Box(196592, 1, ("fp8",), 2 * 16384, "gfx942", "amd"),
}
SHRUNK = {"fp8": 0.55, "bitsandbytes": 0.33}
UNEVEN = {("phi-4", 8), ("Qwen2.5-7B-AWQ", 8)}  # 10 KV heads, and 28 heads


def machine(box: Box) -> Hardware:
    card = Device(0, "GPU-0", box.name, box.mib * MIB, box.mib * MIB - 500 * MIB, box.capability, "MIG" in box.name)
    cards = tuple(replace(card, index=i) for i in range(box.cards))
    memory = box.mib * MIB if box.kind == "cpu" else 200 * box.cards * GIB
    return Hardware(box.kind, cards, Cpu("x", 2, 2), (0, 1), 2.0, memory, memory, memory, core_of=(0, 1))  # type: ignore[arg-type]


@cache
def model(name: str) -> ModelFacts:
    made: Decoder = MODELS[name]
    return facts(made.config, weigh([header(made.tensors())], made.config))


def sequence(known: Known, tokens: int, in_flight: int, ranks: int) -> float:
    """Bytes of the cache on one rank: 16 bits an element; MLA's elements are not shared out."""
    shared = 1 if known.kv_heads == 1 else min(ranks, known.kv_heads)
    return 2 * (known.every * tokens + known.window * min(tokens, known.keeps + in_flight)) / shared


def expected(known: Known, box: Box) -> tuple[float, str | None] | None:
    """(bytes of the KV cache of a rank, quantization); None: does not fit."""
    least = sequence(known, min(known.length, 2048), box.tokens, max(1, box.cards))
    if box.kind == "cpu":
        most = (24 * GIB - known.served * GB - 3 * GIB) * 0.8 // GIB
        typical = min(known.length, max(2048, known.length // 4))
        useful = max(64 * sequence(known, typical, 0, 1), sequence(known, known.length, box.tokens, 1), 1.0)
        space = min(-(-useful // GIB), most) * GIB
        return (space, None) if space >= least and space > 0 else None
    left = box.mib * MIB * 0.95 - 2 * GIB
    for method in (None, *(() if known.quantized else box.quantizers)):
        kv = left - known.served * GB / box.cards * (SHRUNK[method] if method else 1.0)
        if kv >= least and kv > 0:
            return kv, method
    return None


def sized(name: str, box: Box, **wishes: object) -> Sizing:
    here = machine(box)
    made = Wishes(tensor_parallel=max(1, box.cards), devices=here.devices, offload_bytes=None)
    return size(model(name), here, replace(made, **wishes))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MODELS)
def test_facts_are_those_of_the_published_files(name: str) -> None:
    known, made = KNOWN[name], model(name)
    in_file = max(tensor["data_offsets"][1] for tensor in header(MODELS[name].tensors()).values())
    assert in_file == pytest.approx(known.file * GB, rel=0.002), "the test's own tensors are those of the model"
    assert made.weights_bytes == pytest.approx(known.served * GB, rel=0.002)
    assert made.max_len == known.length
    assert made.sequence_bytes(1000) == pytest.approx(sequence(known, 1000, 0, 1), rel=1e-6)
    assert (made.quantization is not None) == known.quantized


@pytest.mark.parametrize("where", BOXES)
@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_those_worked_out_by_hand(name: str, where: str) -> None:
    known, box = KNOWN[name], BOXES[where]
    ranks = max(1, box.cards)
    if (name, ranks) in UNEVEN:
        with pytest.raises(AgentError, match="does not split evenly"):
            sized(name, box)
        return
    found = expected(known, box)
    if found is None:
        with pytest.raises(AgentError) as refused:
            sized(name, box)
        assert refused.value.code == "model_does_not_fit"
        assert box.kind == "cpu" or box.name in refused.value.message
        return
    kv, method = found
    made = sized(name, box)
    assert made.quantization == method
    assert made.kv_bytes == pytest.approx(kv, rel=NEAR, abs=0.02 * GIB)
    shorter = lowered(known, kv, box)
    assert (made.max_model_len is None) == (shorter is None)
    assert (made.max_model_len or 0) == pytest.approx(shorter or 0, rel=NEAR, abs=16)
    length = made.max_model_len or known.length
    typical = sequence(known, min(length, max(2048, length // 4)), 0, ranks)
    at_once = min(64, max(1, kv // typical)) if typical else 64
    assert made.ceiling == pytest.approx(at_once, rel=NEAR, abs=1)
    offload = 0 if box.kind == "cpu" else 50 * box.cards * GIB
    assert made.offload_bytes == pytest.approx(offload, rel=NEAR)


def lowered(known: Known, kv: float, box: Box) -> float | None:
    """The length that fits, None when the model's own does: found by trying, as one would on paper."""
    ranks = max(1, box.cards)
    if sequence(known, known.length, box.tokens, ranks) <= kv:
        return None
    return max(n for n in range(16, known.length, 16) if sequence(known, n, box.tokens, ranks) <= kv)


def test_the_matrix_has_every_outcome() -> None:
    outcomes = [expected(KNOWN[name], box) for name in MODELS for box in BOXES.values()]
    assert {None if made is None else made[1] for made in outcomes} == {None, "fp8"}
    assert outcomes.count(None) > 20
    assert any(made and lowered(KNOWN["Llama-3.1-8B"], made[0], box) for box in BOXES.values()
               for made in [expected(KNOWN["Llama-3.1-8B"], box)])  # fmt: skip


def test_stages_hold_unequal_parts() -> None:
    # 80 layers of 1.712 GB and 2.10 GB of embeddings in front, as much behind: half of all in each of two stages.
    assert model("Llama-3.1-70B").rank_bytes(1, 2) == pytest.approx(70.55 * GB, rel=NEAR)
    # 61 layers over 8 stages: one has 8. (673.1 - 3.7) / 61 x 8 + 1.85
    assert model("DeepSeek-V3").rank_bytes(1, 8) == pytest.approx(89.64 * GB, rel=NEAR)
    # The tied head is 2.82 GB on the last stage, the embeddings and the image encoder 3.66 GB on the first.
    assert model("Gemma-3-27B").rank_bytes(1, 2) == pytest.approx((54.86 - 3.66) / 2 * GB + 3.66 * GB, rel=NEAR)
    assert model("Llama-3.1-70B").rank_bytes(4, 2) == pytest.approx(70.55 * GB / 4, rel=NEAR)


def test_a_token_in_the_pool_is_that_of_a_group_of_layers() -> None:
    assert model("Gemma-3-27B").slot_bytes(1, 1) == 2 * 10 * 16 * 128 * 2, "vLLM reports blocks of ten layers"
    assert model("gpt-oss-20b").slot_bytes(1, 1) == 2 * 12 * 8 * 64 * 2
    assert model("Llama-3.1-8B").slot_bytes(2, 1) == 2 * 32 * 4 * 128 * 2
    assert model("DeepSeek-V3").slot_bytes(8, 1) == 61 * 576 * 2
    assert model("Mistral-7B-v0.1").slot_bytes(1, 1) == 2 * 32 * 8 * 128 * 2


def test_the_smallest_change_is_named() -> None:
    with pytest.raises(AgentError) as refused:
        sized("DeepSeek-V3", BOXES["8 x H100"])
    assert "NVIDIA H100 80GB HBM3 79.65 GiB" in refused.value.message
    # 83.6 GB a rank and 2 GiB, of 75.66 GiB
    assert "weights of a rank 78.3" in refused.value.message
    assert "TENSOR_PARALLEL_SIZE=16 on 16 such GPUs" in refused.value.hint
    with pytest.raises(AgentError, match="Llama") as refused:
        sized("Llama-3.1-70B", replace(_H100, cards=2), tensor_parallel=1, max_model_len=131072)
    assert "TENSOR_PARALLEL_SIZE=2" not in refused.value.hint, "70.5 GB a rank leave too little for that length"
    assert "maximum length of" in refused.value.hint
    here = machine(BOXES["A10"])
    held = (replace(here.devices[0], memory_free_bytes=12 * GIB),)
    with pytest.raises(AgentError, match="a GPU") as refused:
        size(model("Qwen3-Embedding-8B"), here, Wishes(devices=held, quantization="none"))
    assert "what other processes hold of the GPU's memory" in refused.value.hint


def test_the_tightest_of_unequal_cards_decides() -> None:
    here = machine(replace(BOXES["L40S"], cards=2))
    small = replace(here.devices[0], name="small", memory_total_bytes=24 * GIB, memory_free_bytes=23 * GIB)
    busy = replace(here.devices[1], name="busy", memory_total_bytes=48 * GIB, memory_free_bytes=24 * GIB)
    made = size(model("Llama-3.1-8B"), here, Wishes(tensor_parallel=2, devices=(small, busy)))
    assert made.utilization == 0.48, "24 GiB but the context, of 48"
    assert "busy" in made.warnings[0]
    assert made.kv_bytes == pytest.approx(24 * GIB * 0.48 - 2 * GIB - 8.03 * GB, rel=NEAR)


def test_a_model_in_several_files_and_copies(tmp_path: Path) -> None:
    """Mistral's repositories hold all weights twice."""
    made = MODELS["Qwen3-0.6B"]
    (tmp_path / "config.json").write_text(json.dumps(made.config))
    tensors = [*made.tensors()]
    for name, part in (("model-1.safetensors", tensors[:100]), ("model-2.safetensors", tensors[100:]),
                       ("other.safetensors", tensors)):  # fmt: skip
        words = json.dumps({"__metadata__": {}, **header(iter(part))}).encode()
        (tmp_path / name).write_bytes(len(words).to_bytes(8, "little") + words)
    places = {name: "model-1.safetensors" if i < 100 else "model-2.safetensors" for i, (name, *_) in enumerate(tensors)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert read_model(tmp_path) == model("Qwen3-0.6B")
    (tmp_path / "other.safetensors").rename(tmp_path / "consolidated.safetensors")
    assert read_model(tmp_path).weights_bytes == model("Qwen3-0.6B").weights_bytes, "vLLM takes these alone"
    (tmp_path / "consolidated.safetensors").unlink()
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(AgentError, match=r"names model-2.safetensors, which is not there"):
        read_model(tmp_path)


def test_what_a_config_leaves_out_is_what_vllm_takes() -> None:
    plain = {"num_hidden_layers": 12, "num_attention_heads": 8, "hidden_size": 1024, "max_position_embeddings": 4096}
    none = weigh([], {})

    def made(**more: object) -> ModelFacts:
        return facts({**plain, **more}, none)

    assert made(rope_scaling={"rope_type": "linear", "factor": 4.0}).max_len == 16384
    assert made(rope_scaling={"type": "longrope"}, original_max_position_embeddings=2048).max_len == 2048
    assert made(model_max_length=1000).max_len == 1000
    assert made(model_type="gemma2", sliding_window=64).sliding_layers == 6
    assert made(sliding_window=64, use_sliding_window=True, max_window_layers=9).sliding_layers == 3
    assert made(sliding_window=None, use_sliding_window=True).sliding_layers == 0
    assert made(num_kv_heads=1).kv_heads == 1
    modelopt = {"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}
    assert made(quantization_config=modelopt).sequence_bytes(1) == made().sequence_bytes(1) / 2
    hybrid = made(model_type="qwen3_next")
    assert (hybrid.full_layers, hybrid.state_layers) == (3, 9)
    # A state of 32 heads of 128 x 128, and 3 columns of (2 x 16 + 32) x 128 for the convolution, in 16 bits.
    state = 2 * (32 * 128 * 128 + 3 * 64 * 128)
    assert hybrid.sequence_bytes(1000) == 3 * 1000 * 2 * 8 * 128 * 2 + 9 * state
    assert longest(hybrid, 9 * state - 1, 1, 1) == 0


@pytest.mark.parametrize(
    ("where", "changed", "tokens"),
    [
        ("CPU", {"tensor_parallel": 2}, 2 * 4096),
        ("A10", {}, 2 * 2048),
        ("A100", {}, 2 * 2048),
        ("H100", {}, 2 * 8192),
        ("MI300X", {}, 2 * 16384),
        ("H100", {"pipeline_parallel": 4}, 4 * 8192),
        ("H100", {"batched_tokens": 100}, 200),
    ],
)
def test_tokens_in_flight_are_vllms_defaults(where: str, changed: dict[str, int], tokens: int) -> None:
    here = machine(BOXES[where])
    assert in_flight(here, Wishes(devices=here.devices, **changed)) == tokens  # type: ignore[arg-type]


def test_amd_cards_get_fp8_or_nothing() -> None:
    card = replace(BOXES["MI300X"], mib=98304)
    assert sized("Llama-3.1-70B", card).quantization == "fp8"
    with pytest.raises(AgentError, match="does not fit"):
        sized("Llama-3.1-70B", replace(card, capability="gfx1100"))


def test_bitsandbytes_where_this_vllm_has_it_and_fp8_is_not_enough() -> None:
    with pytest.raises(AgentError, match="does not fit"):
        sized("Qwen3-32B", BOXES["A10"])
    assert sized("Qwen3-32B", BOXES["RTX 3090"], bitsandbytes=True).max_model_len == pytest.approx(
        (0.95 * 24 * GIB - 2 * GIB - 0.33 * 65.52 * GB) / (2 * 2 * 64 * 8 * 128), rel=NEAR
    )
    assert sized("Llama-3.1-8B", Box(16384), bitsandbytes=True).quantization == "fp8"
    assert sized("Llama-3.1-8B", Box(16384, capability="7.5"), bitsandbytes=True).quantization == "bitsandbytes"
    with pytest.raises(AgentError, match="does not fit"):
        sized("Llama-3.1-8B", Box(16384, capability="7.5"))


def test_a_model_without_a_cache_must_fit_all_the_same() -> None:
    assert sized("bge-large-en-v1.5", Box(4096)).max_model_len is None
    with pytest.raises(AgentError, match="BertModel does not fit"):
        sized("bge-large-en-v1.5", Box(2048))
    with pytest.raises(AgentError, match="BertModel does not fit"):
        sized("bge-large-en-v1.5", replace(BOXES["CPU"]), max_model_len=None, tensor_parallel=16)


def test_a_card_without_memory_of_its_own_uses_the_hosts() -> None:
    here = machine(Box(0))
    assert sized("Llama-3.1-8B", Box(0)).kv_bytes == pytest.approx(
        0.95 * here.memory_bytes - 2 * GIB - 16.06 * GB, rel=NEAR
    )
