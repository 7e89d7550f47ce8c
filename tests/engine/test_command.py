import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xim_agent.config.fields import Config
from xim_agent.engine.arguments import canonical, known_flags, merged, value_of
from xim_agent.engine.budget import GIB
from xim_agent.engine.command import Places, Plan, plan
from xim_agent.engine.environment import child_environment
from xim_agent.engine.facts import ModelFacts
from xim_agent.errors import AgentError
from xim_agent.hardware.report import Cpu, Device, Hardware
from xim_agent.mesh.messages import Assignment, ModelRef, Serving

CPU_HOST = Hardware("cpu", (), Cpu("a CPU", 2, 2), (0, 1), 2.0, 24 * GIB, 24 * GIB, 24 * GIB, core_of=(0, 1))
CARDS = tuple(Device(i, f"GPU-{i}abcd", "L40S", 48 * GIB, 48 * GIB, "8.9") for i in range(2))
GPU_HOST = replace(CPU_HOST, accelerator="nvidia", devices=CARDS, memory_bytes=100 * GIB, shm_bytes=64 * GIB)
MODEL = ModelFacts("LlamaForCausalLM", 853_248, 2, 2, 32, max_len=16384)
PLACES = Places("/bin/vllm", "/models/m", "/run/x/engine.sock", "/run/x/t", "/cache/v")


def made(
    config: Config | None = None, hardware: Hardware = CPU_HOST, known: frozenset[str] | None = None, **serving: Any
) -> Plan:
    ref = ModelRef("m", "m", "r", "sha256:0", 1)
    task = Assignment("i", "s", 1, 1, ref, Serving(**{"served_model_name": "name", **serving}))
    return plan(config or Config(), task, hardware, MODEL, PLACES, known)


def test_the_whole_command_line_of_a_cpu_host() -> None:
    made_plan = made()
    assert list(made_plan.argv) == [
        "/bin/vllm", "serve", "/models/m", "--uds", "/run/x/engine.sock", "--served-model-name", "name",
        "--max-num-seqs", "64", "--allowed-media-domains", "media.invalid", "--shutdown-timeout", "120",
        "--disable-uvicorn-access-log", "--enable-prefix-caching", "--enable-prompt-tokens-details",
    ]  # fmt: skip
    assert made_plan.env == {
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONFAULTHANDLER": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        "VLLM_RPC_BASE_PATH": "/run/x/t", "TMPDIR": "/run/x/t", "VLLM_CACHE_ROOT": "/cache/v",
        "TRITON_CACHE_DIR": "/cache/v/triton", "TORCHINDUCTOR_CACHE_DIR": "/cache/v/inductor",
        "VLLM_HOST_IP": "127.0.0.1", "VLLM_USE_AOT_COMPILE": "0",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "1", "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_CPU_OMP_THREADS_BIND": "0,1", "OMP_NUM_THREADS": "2", "VLLM_CPU_KVCACHE_SPACE": "1",
    }  # fmt: skip
    assert made_plan.ceiling == 64


def test_the_whole_command_line_of_a_gpu_host() -> None:
    config = Config(
        max_model_len=8192, tensor_parallel_size=2, gpu_memory_utilization=0.9, cuda_visible_devices="1,0",
        speculative_enabled=True, drain_timeout_seconds=30, max_concurrent=100,
    )  # fmt: skip
    made_plan = made(config, GPU_HOST, quantization="fp8")
    flags = list(made_plan.argv[3:])
    assert flags == [
        "--uds", "/run/x/engine.sock", "--served-model-name", "name", "--max-num-seqs", "100",
        "--allowed-media-domains", "media.invalid", "--shutdown-timeout", "30", "--disable-uvicorn-access-log",
        "--enable-prefix-caching", "--enable-prompt-tokens-details", "--max-model-len", "8192",
        "--tensor-parallel-size", "2", "--quantization", "fp8", "--speculative-config",
        json.dumps({"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2}),
        "--gpu-memory-utilization", "0.9", "--kv-offloading-size", "25.00", "--kv-offloading-backend", "native",
    ]  # fmt: skip
    assert made_plan.env["CUDA_VISIBLE_DEVICES"] == "1,0"
    assert "VLLM_CPU_KVCACHE_SPACE" not in made_plan.env
    assert made_plan.ceiling == 100


def test_ceiling_is_max_concurrent_but_never_above_what_vllm_batches() -> None:
    assert made(Config(max_concurrent=16)).ceiling == 16
    assert made(Config(max_concurrent=90, max_num_seqs=32)).ceiling == 32
    assert made(Config(vllm_args=("--max-num-seqs=7",))).ceiling == 7


def test_the_operators_quantization_beats_the_assignments() -> None:
    argv = made(Config(vllm_quantization="awq"), GPU_HOST, quantization="fp8").argv
    assert value_of(argv, "--quantization") == "awq"


def test_embedding_models_run_as_pooling() -> None:
    argv = made(task="embed").argv
    assert value_of(argv, "--runner") == "pooling"
    assert "--enable-prefix-caching" not in argv


def test_ranks_on_a_cpu_get_a_core_each() -> None:
    env = made(Config(tensor_parallel_size=2)).env
    assert (env["VLLM_CPU_OMP_THREADS_BIND"], env["OMP_NUM_THREADS"]) == ("0|1", "1")
    with pytest.raises(AgentError, match="3 ranks need as many CPUs") as refused:
        made(Config(tensor_parallel_size=3))
    assert "TENSOR_PARALLEL_SIZE" in refused.value.hint


def test_hyperthreads_and_quotas() -> None:
    threads = replace(CPU_HOST, cpus=(0, 1, 2, 3), core_of=(0, 1, 0, 1), cpu_limit=4.0)
    assert made(hardware=threads).env["VLLM_CPU_OMP_THREADS_BIND"] == "0,1"
    quota = replace(CPU_HOST, cpus=tuple(range(8)), core_of=tuple(range(8)), cpu_limit=2.0)
    env = made(hardware=quota).env
    assert (env["VLLM_CPU_OMP_THREADS_BIND"], env["OMP_NUM_THREADS"]) == ("nobind", "2")


@pytest.mark.parametrize(
    "words",
    [
        ("--trust-remote-code",), ("--load-format", "runai"), ("--port", "80"), ("--chat-template", "/etc/passwd"),
        ("--chat-template", "../x.jinja"), ("--chat-template", "{{ x }}"), ("--dtype", "half", "--middleware", "os.x"),
        ("--tool-call-parser", "../../evil.py"), ("--dtype=half;", "x"), ("--max-num-batched-tokens", "lots"),
        ("--Dtype", "half"), ("--enforce-eager", "x"), ("--tool_parser_plugin", "x.py"), ("dtype", "half"),
    ],
)  # fmt: skip
def test_what_the_router_may_not_choose(words: tuple[str, ...]) -> None:
    with pytest.raises(AgentError) as refused:
        made(engine_args=words)
    assert refused.value.code in ("engine_args_refused", "engine_args_invalid")


def test_what_the_router_may_choose() -> None:
    argv = made(engine_args=("--dtype=half", "--chat-template", "t.jinja", "--enforce-eager")).argv
    assert argv[-5:] == ("--dtype", "half", "--chat-template", "/models/m/t.jinja", "--enforce-eager")
    permitted = Config(allow_engine_args=("trust-remote-code",))
    assert made(permitted, engine_args=("--trust-remote-code",)).argv[-1] == "--trust-remote-code"


@pytest.mark.parametrize("form", [("--max-num-seqs", "9"), ("--max-num-seqs=9",), ("--max_num_seqs", "9")])
def test_vllm_args_override_in_every_form(form: tuple[str, ...]) -> None:
    argv = made(Config(vllm_args=(*form, "--enforce-eager", "--no-enable-prefix-caching"))).argv
    assert "64" not in argv
    assert argv[-2:] == ("--enforce-eager", "--no-enable-prefix-caching")
    assert "--enable-prefix-caching" not in argv


SPACE = "VLLM_CPU_KVCACHE_SPACE"


@pytest.mark.parametrize(
    ("words", "env", "space", "kv_bytes"),
    [
        ((), (), "1", GIB),
        (("--kv-cache-memory-bytes", "1500M"), (), None, 1500 << 20),
        (("--gpu-memory-utilization=0.25",), (), None, 6 * GIB - 853_248 - GIB),
        (("--gpu-memory-utilization=0.25", "--kv-cache-memory-bytes=2G"), (), None, 2 * GIB),
        ((), (f"{SPACE}=3",), "3", 3 * GIB),
        (("--kv-cache-memory-bytes=2G",), (f"{SPACE}=3",), "3", 3 * GIB),
    ],
)
def test_the_operator_says_how_large_a_cpus_cache_is(
    words: tuple[str, ...], env: tuple[str, ...], space: str | None, kv_bytes: int
) -> None:
    """The variable beats the flags in vLLM, so ours is not there when one of them is."""
    found = made(Config(vllm_args=words, vllm_env=env))
    assert found.env.get(SPACE) == space
    assert found.sizing
    assert found.sizing.kv_bytes == kv_bytes


def test_vllm_args_cannot_move_the_socket_and_vllm_env_wins() -> None:
    with pytest.raises(AgentError, match="--uds"):
        made(Config(vllm_args=("--uds=/tmp/x",)))
    assert made(Config(vllm_env=("OMP_NUM_THREADS=1", "A=b=c"))).env["OMP_NUM_THREADS"] == "1"
    assert made(Config(vllm_env=("A=b=c",))).env["A"] == "b=c"
    with pytest.raises(AgentError, match="KEY=VALUE"):
        made(Config(vllm_env=("nonsense",)))


def test_too_few_devices_and_unknown_devices_are_refused() -> None:
    with pytest.raises(AgentError, match="needs 4 GPUs, 2 are visible"):
        made(Config(tensor_parallel_size=4), GPU_HOST)
    with pytest.raises(AgentError, match="needs 2 GPUs, 1 are visible"):
        made(Config(tensor_parallel_size=2, cuda_visible_devices="GPU-1ab"), GPU_HOST)
    with pytest.raises(AgentError, match="names 7"):
        made(Config(cuda_visible_devices="7"), GPU_HOST)


def test_help_of_the_scripted_launcher_and_forms_of_the_real_one() -> None:
    text = Path(__file__).parent.parent.joinpath("fakes", "fake_vllm.py").read_text()
    assert {"--uds", "--enforce-eager", "--no-enforce-eager"} <= known_flags(text)
    real = (
        "  --gpu-memory-utilization GPU_MEMORY_UTILIZATION, --device-memory-utilization GPU_MEMORY_UTILIZATION\n"
        "                        See --cpu-offload-gb for more.\n"
        "  --api-server-count API_SERVER_COUNT, -asc API_SERVER_COUNT\n"
    )
    assert known_flags(real) == {"--gpu-memory-utilization", "--device-memory-utilization", "--api-server-count"}


@given(st.sampled_from(["--a-b", "--a_b", "--no-a-b", "--a-b=1", "--no_a_b"]))
def test_all_forms_of_a_flag_are_one(form: str) -> None:
    assert canonical(form) == "--a-b"
    assert merged({"--a-b": ["1"], "--c": []}, [[form]]) == ["--c", form]


CUDA_ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def test_child_environment_is_the_operators() -> None:
    ours = {
        "PATH": "/bin", "LD_LIBRARY_PATH": "/tmp/_MEI1", "LD_LIBRARY_PATH_ORIG": "/opt/cuda", "_MEIPASS2": "x",
        "_PYI_ARCHIVE_FILE": "x", "PYTHONHOME": "/tmp/_MEI1", "PYTHONPATH": "/tmp/_MEI1/lib", "PYTHONHASHSEED": "0",
        "XEROTIER_AGENT_JOIN_KEY": "xjk_secret", "NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "1",
        "WATCHDOG_PID": "1", "CREDENTIALS_DIRECTORY": "/run/credentials/x",
    }  # fmt: skip
    assert child_environment(ours, {"A": "1"}, "/tmp/_MEI1") == {
        "PATH": "/bin", "LD_LIBRARY_PATH": "/opt/cuda", "PYTHONHASHSEED": "0", "A": "1", **CUDA_ORDER
    }  # fmt: skip
    del ours["LD_LIBRARY_PATH_ORIG"]
    assert "LD_LIBRARY_PATH" not in child_environment(ours, {}, "/tmp/_MEI1")
    unfrozen = child_environment({"LD_LIBRARY_PATH": "/opt", "PYTHONPATH": "/x"}, {}, None)
    assert unfrozen == {"LD_LIBRARY_PATH": "/opt", "PYTHONPATH": "/x", **CUDA_ORDER}
