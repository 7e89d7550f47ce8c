"""What operator, router and disk may give the engine: always a named refusal or a failed start, never a crash."""

import errno
import json
import shutil
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from fakes.engine import CPU_HOST, Bench, assignment, until, write_model
from hypothesis import given
from hypothesis import strategies as st

from xim_agent.config.fields import Config
from xim_agent.engine import launcher, planner
from xim_agent.engine.command import Places, plan, shown
from xim_agent.engine.facts import ModelFacts
from xim_agent.engine.failures import classify
from xim_agent.engine.leftovers import Leftovers
from xim_agent.engine.model import read_model
from xim_agent.engine.service import EngineService
from xim_agent.errors import AgentError, Exit
from xim_agent.hardware.report import Device

MODEL = ModelFacts("LlamaForCausalLM", 853_248, 2, 2, 32, max_len=16384)
PLACES = Places("/bin/vllm", "/models/m", "/run/x/engine.sock", "/run/x/t", "/cache/v")


def refused(config: Config, **serving: Any) -> AgentError:
    with pytest.raises(AgentError) as caught:
        plan(config, assignment(**serving), CPU_HOST, MODEL, PLACES)
    return caught.value


@pytest.mark.parametrize("words", [("auto",), ("-1",), ("0",), ("1.5",), (), ("1" * 5000,)])
def test_a_number_of_sequences_that_is_none(words: tuple[str, ...]) -> None:
    error = refused(Config(vllm_args=("--max-num-seqs", *words)))
    assert (error.code, error.exit_code) == ("engine_args_invalid", Exit.CONFIG)


def test_a_chat_template_without_a_file() -> None:
    allowed = Config(allow_engine_args=("chat-template",))
    assert refused(allowed, engine_args=("--chat-template",)).code == "engine_args_invalid"
    assert refused(Config(), engine_args=("--chat-template",)).code == "engine_args_refused"


def test_a_length_that_no_sum_can_hold() -> None:
    assert refused(Config(), max_model_len=10**400).code == "engine_args_invalid"


@pytest.mark.parametrize(
    "text",
    [
        '{"num_hidden_layers": 1e999}',
        '{"num_hidden_layers": 1e30, "hidden_size": 64}',
        '{"num_hidden_layers": %s}' % ("9" * 400),
        '{"num_hidden_layers": -1}',
        '{"architectures": [["x"]]}',
        '{"architectures": {"a": 1}}',
        '{"quantization_config": {"quant_method": ["x"]}}',
        '{"num_attention_heads": 0, "hidden_size": NaN}',
        '{"sliding_window": 4, "sliding_window_pattern": 1e999}',
        "[" * 200_000,
        '{"a":' + "[" * 200_000 + "]" * 200_000 + "}",
        "[]",
        "",
    ],
    ids=lambda text: text[:40],
)
def test_a_config_of_nonsense(tmp_path: Path, text: str) -> None:
    (write_model(tmp_path) / "config.json").write_text(text)
    with pytest.raises(AgentError) as caught:
        read_model(tmp_path)
    assert caught.value.code == "model_unreadable"


@pytest.mark.parametrize("offsets", ["[0, 1e999]", "[9, 0]", "[0]", '["a", "b"]', "[" * 100_000])
def test_a_header_of_nonsense(tmp_path: Path, offsets: str) -> None:
    header = b'{"w": {"dtype": "BF16", "data_offsets": ' + offsets.encode() + b"}}"
    (write_model(tmp_path) / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(AgentError) as caught:
        read_model(tmp_path)
    assert caught.value.code == "model_unreadable"


def test_a_launcher_below_nobodys_home() -> None:
    with pytest.raises(AgentError) as caught:
        launcher.find("~nobody-of-that-name/vllm", {})
    assert caught.value.code == "launcher_missing"


@pytest.mark.parametrize("notes", ["[]", '{"shm": 1}', '{"shm": {"x": [1]}}', '{"shm": {"x": "ab"}}', "{"])
def test_notes_of_nonsense_are_none(tmp_path: Path, notes: str) -> None:
    (tmp_path / "notes").write_text(notes)
    assert Leftovers.load(str(tmp_path / "notes")) == Leftovers(str(tmp_path / "notes"))


@pytest.mark.parametrize("where", ["caches", "launcher"])
async def test_a_full_disk_or_a_lost_launcher_refuses_the_switch(
    bench: Bench, running: EngineService, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*_: object) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "launcher":
        monkeypatch.setattr(launcher, "identity", fail)
    else:
        monkeypatch.setattr(running._planner, "_compile_cache", fail)
    with pytest.raises(AgentError) as caught:
        await running.switch(bench.target(max_model_len=1024))
    assert (caught.value.code, caught.value.exit_code) == ("engine_place", Exit.STATE)
    assert "No space left" in caught.value.message
    assert running.ready, "what runs is untouched"


async def test_a_removed_runtime_directory_is_made_again(bench: Bench, running: EngineService) -> None:
    model = write_model(Path(f"{bench.runtime}.model"))
    bench.model = model
    try:
        shutil.rmtree(bench.runtime)
        with trio.fail_after(20):
            await running.switch(bench.target(max_model_len=1024))
            await running.wait_ready()
        assert (bench.runtime / "engine.lock").exists()
    finally:
        shutil.rmtree(model)


async def test_a_start_without_a_place_is_tried_again(
    bench: Bench, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, error_logs: list[Any]
) -> None:
    (bench.runtime / "t").write_text("in the way")
    service = bench.service()
    nursery.start_soon(service.run)
    await service.switch(bench.target())
    await until(lambda: bool(error_logs))
    assert "cannot hold the engine's sockets" in error_logs[0].getMessage()
    assert error_logs[0].next_start_seconds == 5.0
    assert bench.starts == []
    await service.stop()


async def test_without_a_lock_the_agent_ends_with_77(bench: Bench) -> None:
    (bench.runtime / "engine.lock").mkdir()
    with pytest.raises(AgentError) as caught:
        await bench.service().run()
    assert isinstance(caught.value, planner.NoPlace)
    assert caught.value.exit_code == Exit.STATE


def test_the_command_in_the_log_shows_no_secret() -> None:
    made = plan(Config(vllm_args=("--api-key", "hunter2")), assignment(), CPU_HOST, MODEL, PLACES)
    assert "hunter2" in made.argv
    assert "hunter2" not in shown(made)
    assert "--api-key '***'" in shown(made)


@pytest.mark.parametrize("line", ["vllm: error: unrecognized arguments: --x", "size mismatch for w", "HeaderTooLarge"])
def test_an_engine_that_had_served_is_always_started_again(line: str) -> None:
    assert not classify(1, line).retry
    assert classify(1, line, served=True).retry


async def test_words_written_while_it_starts_explain_no_later_crash(
    bench: Bench, nursery: trio.Nursery, error_logs: list[Any]
) -> None:
    bench.env["FAKE_VLLM_STDERR"] = "vllm: error: unrecognized arguments: --x"
    service = bench.service()
    nursery.start_soon(service.run)
    await service.switch(bench.target())
    with trio.fail_after(20):
        await service.wait_ready()
    bench.say("die")
    await until(lambda: bool(error_logs))
    assert error_logs[0].error_class == "engine_failed"
    assert not service.degraded
    await service.stop()


_KEYS = (
    "architectures", "model_type", "text_config", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_size", "sliding_window", "use_sliding_window", "sliding_window_pattern", "layer_types",
    "max_window_layers", "full_attention_interval", "kv_lora_rank", "qk_rope_head_dim", "rope_scaling", "dtype",
    "max_position_embeddings", "model_max_length", "quantization_config", "tie_word_embeddings", "linear_num_key_heads",
    "factor", "rope_type", "quant_method", "kv_cache_scheme",
)  # fmt: skip
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats()
    | st.sampled_from(["x", "gemma3_text", "qwen3_next", "modelopt"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
_PLAIN = {"num_hidden_layers": 8, "num_attention_heads": 8, "hidden_size": 64, "architectures": ["LlamaForCausalLM"]}


@given(st.dictionaries(st.sampled_from(_KEYS), _JSON, max_size=6), st.booleans(), st.sampled_from([1, 2, 8]))
def test_any_config_json_is_sized_or_refused(given_keys: dict[str, Any], gpu: bool, ranks: int) -> None:
    card = Device(0, "GPU-0", "a GPU", 24 << 30, 23 << 30, "9.0")
    host = replace(CPU_HOST, accelerator="nvidia", devices=(card,) * ranks) if gpu else CPU_HOST
    with tempfile.TemporaryDirectory() as place:
        directory = write_model(Path(place))
        (directory / "config.json").write_text(json.dumps({**_PLAIN, **given_keys}))
        with suppress(AgentError):
            model = read_model(directory)
            made = plan(Config(tensor_parallel_size=ranks), assignment(), host, model, PLACES)
            assert made.sizing
            assert 1 <= made.ceiling <= 64
            assert made.sizing.kv_bytes >= 0
