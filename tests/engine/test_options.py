"""Every option of the table → what vLLM gets. Each is set by its variable, as an operator does, and compared with the
command line without it."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fakes.engine import CPU_HOST, GIB, assignment
from fakes.real_options import NOT_ON_A_CPU, STARTS, STAYS

from xim_agent.config.fields import OPTIONS
from xim_agent.config.sources import load
from xim_agent.engine import arguments, launcher
from xim_agent.engine.arguments import group
from xim_agent.engine.budget import Wishes
from xim_agent.engine.command import Places, Plan, plan
from xim_agent.engine.facts import ModelFacts
from xim_agent.engine.planner import places
from xim_agent.errors import AgentError
from xim_agent.hardware.report import Device, Hardware
from xim_agent.mesh.messages import Serving

CARDS = tuple(Device(i, f"GPU-{i}abcd", "L40S", 48 * GIB, 47 * GIB, "8.9") for i in range(4))
GPU_HOST = Hardware(
    "nvidia", CARDS, CPU_HOST.cpu, (0, 1), 2.0, 100 * GIB, 100 * GIB, 64 * GIB, core_of=(0, 1)
)  # fmt: skip
MODEL = ModelFacts("LlamaForCausalLM", 853_248, 2, 4, 32, max_len=16384, heads=4, layers=2)
BIG = ModelFacts("LlamaForCausalLM", 60 * GIB, 32, 8, 128, max_len=16384, heads=32, layers=32)
Changes = tuple[dict[str, list[str] | None], dict[str, str | None]]  # of flags and of the environment; None: gone


def made(words: dict[str, str], model: ModelFacts = MODEL, known: frozenset[str] | None = None, **serving: Any) -> Plan:
    config = load({}, {f"XEROTIER_AGENT_{name}": value for name, value in words.items()} | {"HOME": "/home/x"})
    there = places(config, Path("/run/x"), config.vllm_path, Path("/models/m"), config.model_cache_path / "compile/1")
    return plan(config, assignment(**serving), GPU_HOST, model, there, known)


def flags(made: Plan) -> dict[str, list[str] | None]:
    return {words[0]: words[1:] for words in group(made.argv[3:], "test")}


def changes(after: Plan, before: Plan) -> Changes:
    def between(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
        return {name: new.get(name) for name in {**new, **old} if new.get(name) != old.get(name)}

    return between(flags(after), flags(before)), between(dict(after.env), dict(before.env))


NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
SPECULATIVE = "--speculative-config"
OFFLOAD, BACKEND = "--kv-offloading-size", "--kv-offloading-backend"
ON = {"SPECULATIVE_ENABLED": "1"}


@pytest.mark.parametrize(
    ("words", "flags_changed", "env_changed"),
    [
        ({"MAX_CONCURRENT": "100"}, {"--max-num-seqs": ["100"]}, {}),
        ({"MAX_CONCURRENT": "8"}, {}, {}),
        ({"MAX_CONCURRENT": "100", "MAX_NUM_SEQS": "32"}, {"--max-num-seqs": ["32"]}, {}),
        ({"MAX_MODEL_LEN": "4096"}, {"--max-model-len": ["4096"]}, {}),
        ({"TENSOR_PARALLEL_SIZE": "2"}, {"--tensor-parallel-size": ["2"]}, {}),
        ({"PIPELINE_PARALLEL_SIZE": "2"}, {"--pipeline-parallel-size": ["2"]}, {}),
        ({"DISTRIBUTED_BACKEND": "mp"}, {"--distributed-executor-backend": ["mp"]}, {}),
        ({"DISTRIBUTED_BACKEND": "ray"}, {"--distributed-executor-backend": ["ray"]}, {"VLLM_HOST_IP": None}),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, {}, {"RAY_ADDRESS": "10.0.0.1:6379"}),
        ({"GPU_MEMORY_UTILIZATION": "0.925"}, {"--gpu-memory-utilization": ["0.925"]}, {}),
        ({"CUDA_VISIBLE_DEVICES": "1,0"}, {}, {"CUDA_VISIBLE_DEVICES": "1,0"}),
        ({"MAX_NUM_SEQS": "8"}, {"--max-num-seqs": ["8"]}, {}),
        ({"AUTO_CONFIG": "off"}, {OFFLOAD: None, BACKEND: None}, {}),
        ({"VLLM_PATH": "/opt/vllm"}, {}, {}),
        ({"ALLOW_ENGINE_ARGS": "trust-remote-code"}, {}, {}),
        ({"VLLM_ARGS": "--max-num-seqs=7 --seed 1 --no-enable-prefix-caching"},
         {"--max-num-seqs": None, "--max-num-seqs=7": [], "--seed": ["1"], "--enable-prefix-caching": None,
          "--no-enable-prefix-caching": []}, {}),
        ({"VLLM_ENV": "VLLM_HOST_IP=10.0.0.2 A='b c'"}, {}, {"VLLM_HOST_IP": "10.0.0.2", "A": "b c"}),
        ({"VLLM_SOCKET_PATH": "/tmp/s"}, {"--uds": ["/tmp/s"]}, {}),
        ({"VLLM_QUANTIZATION": "awq"}, {"--quantization": ["awq"]}, {}),
        ({"VLLM_QUANTIZATION": "bitsandbytes-fp4"}, {"--quantization": ["bitsandbytes"]}, {}),
        ({"VLLM_QUANTIZATION": "auto"}, {}, {}),
        ({"KV_CACHE_BACKEND": "lmcache"}, {BACKEND: ["lmcache"]}, {}),
        ({"KV_CACHE_BACKEND": "none"}, {OFFLOAD: None, BACKEND: None}, {}),
        ({"KV_OFFLOAD_SIZE_GB": "10"}, {OFFLOAD: ["9.31"]}, {}),
        ({"KV_OFFLOAD_SIZE_GB": "0"}, {OFFLOAD: None, BACKEND: None}, {}),
        (ON, {SPECULATIVE: [json.dumps(NGRAM)]}, {}),
        ({**ON, "SPECULATIVE_TOKENS": "3"}, {SPECULATIVE: [json.dumps({**NGRAM, "num_speculative_tokens": 3})]}, {}),
        ({**ON, "SPECULATIVE_METHOD": "medusa", "SPECULATIVE_MODEL": "/d"},
         {SPECULATIVE: [json.dumps({"method": "medusa", "num_speculative_tokens": 5, "model": "/d"})]}, {}),
        ({**ON, "SPECULATIVE_MODEL": "/d"},
         {SPECULATIVE: [json.dumps({"method": "draft_model", "num_speculative_tokens": 5, "model": "/d"})]}, {}),
        ({"SPECULATIVE_METHOD": "ngram", "SPECULATIVE_TOKENS": "3"}, {}, {}),
        ({"DRAIN_TIMEOUT_SECONDS": "30"}, {"--shutdown-timeout": ["30"]}, {}),
        ({"MODEL_CACHE_PATH": "/c"}, {},
         {"VLLM_CACHE_ROOT": "/c/compile/1", "TRITON_CACHE_DIR": "/c/compile/1/triton",
          "TORCHINDUCTOR_CACHE_DIR": "/c/compile/1/inductor"}),
    ],
)  # fmt: skip
def test_an_option_changes_this_and_nothing_else(
    words: dict[str, str], flags_changed: dict[str, list[str] | None], env_changed: dict[str, str | None]
) -> None:
    assert changes(made(words), made({})) == (flags_changed, env_changed)


def test_every_option_of_the_engine_is_in_the_table() -> None:
    """The rest never reaches vLLM: what the agent does with it is tested elsewhere."""
    table = test_an_option_changes_this_and_nothing_else.pytestmark[0].args[1]
    tested = {f"XEROTIER_AGENT_{name}" for words, *_ in table for name in words}
    engine = {o.env for o in OPTIONS if o.meta["group"] == "engine"}
    assert engine - tested == {
        "XEROTIER_AGENT_ALLOW_UNSAFE_FILES", "XEROTIER_AGENT_VLLM_SALT_SECRET", "XEROTIER_AGENT_VLLM_SALT_SECRET_FILE",
        "XEROTIER_AGENT_ENGINE_START_STALL_SECONDS", "XEROTIER_AGENT_ENGINE_HANG_SECONDS",
    }  # fmt: skip


def test_every_option_is_given_to_real_vllm_or_it_is_said_why_not() -> None:
    """Also each word that a router may choose, and each field of what it assigns."""
    table = test_an_option_changes_this_and_nothing_else.pytestmark[0].args[1]
    given = {option for rows in STARTS.values() for option, _, _ in rows}
    evident = {option for rows in STARTS.values() for option, _, seen in rows if seen} | {"ALLOW_ENGINE_ARGS"}
    assert given == evident, "of each option something is seen"
    options = {o.env.removeprefix("XEROTIER_AGENT_") for o in OPTIONS if o.meta["group"] in ("engine", "cache", "stop")}
    assert {option for option in given if option.isupper()} == options - STAYS.keys()
    assert options >= STAYS.keys()
    golden = {f"{name}={word}" for words, *_ in table for name, word in words.items()}
    assert golden >= NOT_ON_A_CPU.keys()
    assert arguments._ALLOWED.keys() <= given
    assert {field.name for field in msgspec.structs.fields(Serving)} - {"engine_args"} <= given


def test_the_salt_is_kept_from_vllm() -> None:
    assert changes(made({"VLLM_SALT_SECRET": "grains"}), made({})) == ({}, {})


def test_the_launcher_is_that_of_the_path() -> None:
    assert made({"VLLM_PATH": "/opt/vllm"}).argv[:3] == ("/opt/vllm", "serve", "/models/m")


@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        ("DeepseekV3ForCausalLM", "deepseek_mtp"),
        ("Qwen3NextForCausalLM", "qwen3_next_mtp"),
        ("Glm4MoeForCausalLM", "mtp"),
        ("MiMoForCausalLM", "mimo_mtp"),
        ("LlamaForCausalLM", "ngram"),
    ],
)
def test_speculative_method_follows_the_architecture(architecture: str, method: str) -> None:
    model = ModelFacts(architecture, GIB, 2, 4, 32, max_len=2048, draft_bytes=GIB)
    made_plan = made(ON, model=model)
    assert json.loads((flags(made_plan)[SPECULATIVE] or [""])[0])["method"] == method
    assert made_plan.sizing
    plain = made({}, model=model)
    assert plain.sizing
    layers = plain.sizing.kv_bytes - made_plan.sizing.kv_bytes
    assert layers == (0 if method == "ngram" else GIB), "the model's own MTP layers are loaded then, too"


@pytest.mark.parametrize(
    ("serving", "flags_changed"),
    [
        ({"max_model_len": 4096}, {"--max-model-len": ["4096"]}),
        ({"quantization": "fp8"}, {"--quantization": ["fp8"]}),
        ({"served_model_name": "other"}, {"--served-model-name": ["other"]}),
        ({"task": "embed"},
         {"--runner": ["pooling"], "--enable-prefix-caching": None, "--enable-prompt-tokens-details": None}),
        ({"engine_args": ("--dtype", "half")}, {"--dtype": ["half"]}),
        ({"engine_args": ("--tool-call-parser=hermes", "--enable-auto-tool-choice")},
         {"--tool-call-parser": ["hermes"], "--enable-auto-tool-choice": []}),
        ({"engine_args": ("--reasoning-parser", "qwen3")}, {"--reasoning-parser": ["qwen3"]}),
        ({"engine_args": ("--chat-template", "t.jinja")}, {"--chat-template": ["/models/m/t.jinja"]}),
        ({"engine_args": ("--chat-template-content-format", "string")}, {"--chat-template-content-format": ["string"]}),
        ({"engine_args": ("--max-num-batched-tokens", "4096")}, {"--max-num-batched-tokens": ["4096"]}),
        ({"engine_args": ("--limit-mm-per-prompt", '{"image": 2}')}, {"--limit-mm-per-prompt": ['{"image": 2}']}),
        ({"engine_args": ("--enforce-eager",)}, {"--enforce-eager": []}),
    ],
)  # fmt: skip
def test_what_an_assignment_changes(serving: dict[str, Any], flags_changed: dict[str, list[str] | None]) -> None:
    assert changes(made({}, **serving), made({})) == (flags_changed, {})


def test_the_operator_beats_the_assignment() -> None:
    words = {"MAX_MODEL_LEN": "1000", "VLLM_QUANTIZATION": "awq", "VLLM_ARGS": "--dtype float32"}
    found = flags(made(words, max_model_len=4096, quantization="fp8", engine_args=("--dtype", "half")))
    assert [found[name] for name in ("--max-model-len", "--quantization", "--dtype")] == [
        ["1000"],
        ["awq"],
        ["float32"],
    ]


# Each can load code, open a port, read a file or write one; most are real flags of vllm 0.32.
_REFUSED = (
    "--trust-remote-code", "--port=1", "--host=0.0.0.0", "--uds=/x", "--middleware=os.system",
    "--load-format=tensorizer",
    "--tool-parser-plugin=x.py", "--reasoning-parser-plugin=x.py", "--allowed-local-media-path=/",
    "--allowed-media-domains=127.0.0.1", "--tokenizer=/etc", "--hf-config-path=/etc", "--hf-overrides={}",
    "--speculative-config={}", "--kv-transfer-config={}", "--compilation-config={}", "--additional-config={}",
    "--lora-modules=a=/etc", "--download-dir=/etc", "--worker-cls=os.x", "--worker-extension-cls=os.x",
    "--logits-processors=os.x", "--scheduler-cls=os.x", "--ssl-keyfile=/etc/x", "--api-key=x", "--root-path=/x",
    "--otlp-traces-endpoint=http://x", "--ec-transfer-config={}", "--enable-server-load-tracking", "--config=/etc/x",
    "--gpu-memory-utilization=1", "--max-num-seqs=1000000", "--tensor-parallel-size=2", "--master-addr=x",
    "--allow-credentials", "--profiler-config={}", "-O3", "-tp=2",
)  # fmt: skip


@pytest.mark.parametrize("flag", _REFUSED)
def test_a_flag_outside_the_list_is_refused_by_name_unless_the_operator_allows_it(flag: str) -> None:
    with pytest.raises(AgentError) as refused:
        made({}, engine_args=("--enforce-eager", flag))
    assert refused.value.code == "engine_args_refused"
    assert flag in refused.value.message
    for harmless in ((), ("x",), ("1",)):
        with pytest.raises(AgentError, match=flag.partition("=")[0]):
            made({}, engine_args=(flag.partition("=")[0], *harmless))
    name = "--tensor-parallel-size" if flag == "-tp=2" else flag.partition("=")[0]
    assert refused.value.hint.endswith(f"XEROTIER_AGENT_ALLOW_ENGINE_ARGS={name}")
    for form in (name, name.removeprefix("--"), flag.partition("=")[0]):
        assert flag in made({"ALLOW_ENGINE_ARGS": form}, engine_args=(flag,)).argv


@pytest.mark.parametrize(
    ("words", "serving", "check"),
    [
        ({"VLLM_ARGS": "--max-model-len 4k"}, {}, lambda w, s: (w.max_model_len, s.max_model_len) == (4000, 4000)),
        ({"VLLM_ARGS": "--max-model-len=4K"}, {}, lambda w, s: w.max_model_len == 4096),
        ({"VLLM_ARGS": "--max-model-len auto"}, {}, lambda w, s: w.max_model_len is None),
        ({"VLLM_ARGS": "-tp 2"}, {}, lambda w, s: w.split == (2, 1) and s.kv_bytes > 13 * GIB),
        ({"VLLM_ARGS": "--pipeline_parallel_size=2"}, {}, lambda w, s: w.split == (1, 2)),
        ({"VLLM_ARGS": "--gpu-memory-utilization .5 -tp 4"}, {}, lambda w, s: s.utilization == 0.5),
        ({"VLLM_ARGS": "-q fp8"}, {}, lambda w, s: s.quantization == "fp8" and s.kv_bytes > 10 * GIB),
        ({"VLLM_ARGS": "--cpu-offload-gb 30"}, {}, lambda w, s: s.quantization is None and s.kv_bytes > 13 * GIB),
        ({"VLLM_ARGS": "-tp 2 --kv-cache-dtype fp8"}, {}, lambda w, s: term(s, "kv_slot") == 2 * 32 * 4 * 128),
        ({"VLLM_ARGS": "-tp 2 --kv-cache-dtype bfloat16 --dtype float32"}, {},
         lambda w, s: term(s, "kv_slot") == 2 * 2 * 32 * 4 * 128),
        ({"VLLM_ARGS": "-tp 2 --kv-cache-memory-bytes 1.5g"}, {}, lambda w, s: s.kv_bytes == 1_500_000_000),
        ({"VLLM_ARGS": "-tp 2 --kv-cache-memory-bytes=5G"}, {}, lambda w, s: s.kv_bytes == 5 * GIB),
        ({"VLLM_ARGS": "-tp 2 --kv-cache-memory-bytes 1.5G"}, {}, lambda w, s: s.kv_bytes > 13 * GIB),
        ({"VLLM_ARGS": "-tp 4 --dtype float32"}, {}, lambda w, s: term(s, "weights") == -30 * GIB),
        ({"VLLM_ARGS": "-tp 4"}, {"engine_args": ("--dtype=float32",)}, lambda w, s: term(s, "weights") == -30 * GIB),
        ({}, {"engine_args": ("--max-num-batched-tokens", "512")}, lambda w, s: w.batched_tokens == 512),
        ({"VLLM_ARGS": "--max-num-seqs 3 -tp 2"}, {}, lambda w, s: s.ceiling == 3),
        ({"VLLM_ARGS": "--gpu-memory-utilization lots"}, {}, lambda w, s: s.utilization == 0.95),
    ],
)  # fmt: skip
def test_what_later_words_change_is_sized(words: dict[str, str], serving: dict[str, Any], check: Any) -> None:
    found = made(words, model=BIG, **serving)
    assert check(found.wishes, found.sizing)


def term(sizing: Any, item: str) -> int:
    return next(t.value for t in sizing.terms if t.item == item)


@pytest.mark.parametrize(
    "flag",
    [
        "--enable-prefix-caching", "--enable-prompt-tokens-details", "--disable-uvicorn-access-log",
        "--shutdown-timeout", "--kv-offloading-size", "--kv-offloading-backend", "--speculative-config",
    ],
)  # fmt: skip
def test_an_optimisation_that_this_vllm_lacks_is_left_out_aloud(flag: str) -> None:
    full = made(ON)
    known = frozenset(name for name in flags(full) if name.startswith("--"))
    assert changes(made(ON, known=known), full) == ({}, {})
    reduced = made(ON, known=known - {flag})
    assert changes(reduced, full) == ({flag: None}, {})
    assert reduced.warnings == (f"the installed vLLM does not know {flag}, left out",)


def test_prompts_in_the_log_are_warned_of() -> None:
    assert "logs prompts" in made({"VLLM_ARGS": "--enable-log-requests"}).warnings[0]
    assert made({"VLLM_ARGS": "--no-enable-log-requests"}).warnings == ()


@pytest.mark.parametrize(
    ("flag", "words", "serving"),
    [
        ("--uds", {}, {}), ("--served-model-name", {}, {}), ("--max-num-seqs", {}, {}),
        ("--allowed-media-domains", {}, {}), ("--gpu-memory-utilization", {}, {}),
        ("--max-model-len", {"MAX_MODEL_LEN": "9"}, {}), ("--quantization", {"VLLM_QUANTIZATION": "awq"}, {}),
        ("--tensor-parallel-size", {"TENSOR_PARALLEL_SIZE": "2"}, {}),
        ("--pipeline-parallel-size", {"PIPELINE_PARALLEL_SIZE": "2"}, {}),
        ("--distributed-executor-backend", {"DISTRIBUTED_BACKEND": "mp"}, {}), ("--runner", {}, {"task": "embed"}),
    ],
)  # fmt: skip
def test_what_is_needed_and_this_vllm_lacks_stops_the_start_by_name(
    flag: str, words: dict[str, str], serving: dict[str, Any]
) -> None:
    known = frozenset(name for name in flags(made(words, **serving)) if name.startswith("--"))
    assert made(words, known=known, **serving).warnings == ()
    with pytest.raises(AgentError) as refused:
        made(words, known=known - {flag}, **serving)
    assert refused.value.code == "engine_flag_missing"
    assert flag in refused.value.message


def test_bitsandbytes_is_looked_for_in_the_files_of_this_vllm(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/vllm"
    program.touch()
    assert not launcher.has_bitsandbytes(program)
    there = tmp_path / "lib/python3.12/site-packages/vllm/model_executor/layers/quantization/bitsandbytes.py"
    there.parent.mkdir(parents=True)
    there.touch()
    assert launcher.has_bitsandbytes(program)
    card = (Device(0, "GPU-0", "T4", 16 * GIB, 16 * GIB, "7.5"),)
    host = Hardware("nvidia", card, CPU_HOST.cpu, (0,), 1.0, GIB, GIB, GIB)
    model = ModelFacts("LlamaForCausalLM", 16 * GIB, 32, 8, 128, max_len=4096)
    where = Places("/bin/vllm", "/m", "/s", "/t", "/c")
    config = load({}, {"HOME": "/home/x"})
    assert flags(plan(config, assignment(), host, model, where, None, True))["--quantization"] == ["bitsandbytes"]
    with pytest.raises(AgentError, match="does not fit"):
        plan(config, assignment(), host, model, where, None, False)
    assert not Wishes().bitsandbytes
