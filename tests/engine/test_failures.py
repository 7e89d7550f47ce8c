import re
import signal
from dataclasses import fields, replace
from pathlib import Path

import pytest
from fakes.readme import readme_part

from xim_agent.config.fields import Config
from xim_agent.engine import failures
from xim_agent.engine.failures import classify
from xim_agent.engine.scrape import Gauges, parse

TAILS = Path(__file__).parent / "tails"  # what the agent keeps of vLLM's output; the GPU ones after its own messages
RETRIED = {
    "gpu_memory_taken": ["gpu_memory_taken", "gpu_memory_taken_while_profiling"],
    "gpu_out_of_memory": [
        "gpu_out_of_memory_loading",
        "gpu_out_of_memory_warming_up",
        "gpu_out_of_memory_cublas",
        "gpu_out_of_memory_hip",
    ],
    "shm_too_small": ["shm_too_small", "nccl_shm_too_small"],
    "disk_full": ["disk_full_cache"],
    "host_out_of_memory": ["kv_above_memory", "rlimit_as_start", "rlimit_as_kv_cache"],
    "limit_reached": ["rlimit_nofile"],
    "gpu_lost": ["gpu_lost_while_serving", "gpu_lost_nvml", "gpu_lost_ecc"],
    "gpu_fault": ["gpu_fault_illegal_access", "gpu_fault_assert", "gpu_fault_rocm"],
    "gpu_missing": ["gpu_none_available", "gpu_no_driver", "gpu_none_hip", "gpu_ordinal", "gpu_device_type"],
    "nccl_failed": ["nccl_torch", "nccl_unhandled_system_error"],
    "socket_in_use": ["socket_taken"],
    "no_permission": ["socket_no_permission", "config_no_permission", "cache_no_permission", "tmp_no_permission"],
    "weights_unreadable": ["weights_no_permission"],
    "launcher_broken": ["import_broken"],
    "bus_error": ["worker_bus_error"],
    "engine_crashed": ["worker_segfault", "worker_aborted"],
    "engine_killed": ["core_killed_serving", "core_killed_starting", "worker_killed_serving"],
    "engine_failed": ["unknown"],
}
NOT_RETRIED = {
    "engine_flag_unknown": ["bad_flag", "bad_value", "bad_json"],
    "engine_option_refused": ["batched_tokens_below_length", "chat_template_missing", "tool_parser_unknown"],
    "kv_cache_too_small": ["kv_blocks_too_few", "kv_cache_no_memory", "kv_cache_too_small_gpu"],
    "context_too_long": ["context_too_long"],
    "gpu_driver_too_old": ["gpu_driver_too_old", "gpu_driver_forward_compatibility", "gpu_driver_mismatch_cuda"],
    "gpu_unsupported": ["gpu_no_kernel_image", "gpu_bfloat16", "gpu_quantization_capability"],
    "weights_missing": ["weights_missing"],
    "corrupt_weights": [
        "weights_truncated",
        "weights_header_flipped",
        "weights_header_length",
        "weights_empty",
        "weights_other_shape",
    ],
    "parallel_impossible": ["tp_above_cores", "tp_cores_default", "tp_not_divisor", "tensor_parallel_above_gpus"],
    "cpu_unsupported": ["amx_eager"],
    "pipeline_not_warmed_up": ["pp_eager_on_cpu"],
    "quantization_unsupported": [
        "quantization_unknown",
        "quantization_in_config_unknown",
        "quantization_awq_missing",
        "quantization_bitsandbytes_missing",
        "quantization_fp8_on_cpu",
    ],
    "unsupported_model": ["architecture_unknown", "model_type_unknown"],
    "model_files_broken": [
        "config_truncated",
        "config_missing",
        "config_nonsense",
        "dtype_unknown_in_config",
        "model_missing",
        "tokenizer_missing",
        "tokenizer_truncated",
    ],
}
CASES = [
    (name, code, retry)
    for table, retry in ((RETRIED, True), (NOT_RETRIED, False))
    for code, names in table.items()
    for name in names
]
BEGIN, END = "<!-- failures: written by tests/engine/test_failures.py -->\n", "<!-- end of failures -->\n"
# What a remedy starts with, or offers after a comma or a colon: something a person can do.
ACTIONS = ("change", "end", "lower", "free", "raise", "make", "look", "use", "install", "set", "give", "publish",
           "repair", "check", "assign", "restart")  # fmt: skip
OPTION = re.compile(r"\b[A-Z][A-Z]+(?:_[A-Z]+)+\b")
THEIRS = {"NCCL_DEBUG"}  # of others, named as a value of ours


@pytest.mark.parametrize(("name", "code", "retry"), CASES)
def test_tails_of_vllm(name: str, code: str, retry: bool) -> None:
    tail = (TAILS / f"{name}.txt").read_text()
    found = classify(1, tail)
    assert (found.code, found.retry) == (code, retry)
    assert found.text.startswith("vLLM exited (1): ") or code == "engine_killed"
    assert not re.search(r"pid=|\[\w+\.py:\d+\]", found.text), "for people"
    assert len(found.text) < 520
    assert "\n" not in found.text


def test_every_tail_is_in_a_table_and_every_class_has_a_tail() -> None:
    assert sorted(path.stem for path in TAILS.iterdir()) == sorted(name for name, _, _ in CASES)
    assert {row.code for row in failures._CLASSES} | {"engine_failed"} == RETRIED.keys() | NOT_RETRIED.keys()


@pytest.mark.parametrize("code", [*RETRIED, *NOT_RETRIED])
def test_remedies_name_options_that_exist_or_something_to_do(code: str) -> None:
    name = (RETRIED | NOT_RETRIED)[code][0]
    remedy = classify(1, (TAILS / f"{name}.txt").read_text()).remedy
    known = {field.name.upper() for field in fields(Config)}
    assert set(OPTION.findall(remedy)) <= known | THEIRS
    parts = re.split(r"[,;:] (?:or |and |then )?", remedy)
    assert any(part.startswith(ACTIONS) for part in parts), remedy
    assert "\n" not in remedy


def test_readme_has_the_table() -> None:
    """To write it anew: XIM_WRITE_README=1."""
    rows = ["| class | what to do | tried again |", "| --- | --- | --- |"]
    rows += [
        f"| `{row.code}` | {row.remedy.replace('|', chr(92) + '|')} | {'yes' if row.retry else 'no'} |"
        for row in failures._CLASSES
    ]
    readme_part(BEGIN, "\n".join(dict.fromkeys(rows)) + "\n", END)


def test_its_core_may_die_and_the_server_end_with_0() -> None:
    found = classify(0, (TAILS / "core_killed_serving.txt").read_text(), served=True)
    assert (found.code, found.retry) == ("engine_killed", True)
    lost = classify(0, (TAILS / "gpu_lost_while_serving.txt").read_text(), served=True)
    assert lost.code == "gpu_lost"


def test_what_a_warning_fears_is_no_cause() -> None:
    fear = "(APIServer pid=1) WARNING 11-25 12:00:00 [x.py:1] can cause `OSError: [Errno 24] Too many open files`"
    assert classify(1, f"{fear}\nValueError: another").code == "engine_failed"


def test_an_engine_that_had_served_is_always_tried_again() -> None:
    tail = (TAILS / "weights_truncated.txt").read_text()
    assert classify(1, tail, served=True).retry


def test_an_unknown_failure_keeps_its_whole_tail() -> None:
    tail = "Traceback (most recent call last):\n  File x\nSomethingError: never seen\n"
    found = classify(1, tail)
    assert (found.code, found.tail) == ("engine_failed", tail)
    assert "log" in found.remedy
    assert found.text == "vLLM exited (1): SomethingError: never seen"


@pytest.mark.parametrize(
    ("begins", "follows"),
    [
        ("failed to start.", "RuntimeError: Engine core initialization failed. Failed core proc(s): {'EngineCore': 1}"),
        ("encountered a fatal error.", "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue."),
    ],
)
def test_of_an_unknown_failure_the_cause_is_said_not_what_follows(begins: str, follows: str) -> None:
    core = "(EngineCore pid=9) ERROR 11-23 15:54:52 [core.py:1] "
    found = classify(1, f"{core}EngineCore {begins}\n{core}KeyError: 'a bug'\n{follows}\n")
    assert (found.code, found.text) == ("engine_failed", "vLLM exited (1): KeyError: 'a bug'")


def test_signals_and_our_own_reasons_are_named() -> None:
    assert classify(-9, "").code == "engine_killed"
    assert "SIGKILL" in classify(-9, "").text
    assert classify(-11, "").text == "vLLM was ended by SIGSEGV"
    assert classify(None, "INFO up", "vLLM has made no step for 60 s").text == "vLLM has made no step for 60 s"


FAULTS = {
    signal.SIGILL: ("Illegal instruction", "cpu_unsupported"),
    signal.SIGBUS: ("Bus error", "bus_error"),
    signal.SIGSEGV: ("Segmentation fault", "engine_crashed"),
    signal.SIGABRT: ("Aborted", "engine_crashed"),
    signal.SIGFPE: ("Floating point exception", "engine_crashed"),
    signal.SIGKILL: (None, "engine_killed"),
}
DUMP = """Fatal Python error: {}

Current thread 0x00007fceeffd76c0 (most recent call first):
  File "/opt/vllm/pynvml.py", line 395 in nvmlDeviceGetMemoryErrorCounter
  File "/opt/vllm/x.py", line 1 in <module>

Extension modules: numpy.MemoryError, torch._C (total: 2)
"""
PROCESS = "Worker proc VllmWorker-0 died unexpectedly (exit code: {}), shutting down executor."


@pytest.mark.parametrize("signum", FAULTS)
def test_a_fault_has_one_class_wherever_it_is_told(signum: signal.Signals) -> None:
    words, code = FAULTS[signum]
    assert classify(-signum, "").code == code
    assert classify(1, PROCESS.format(-signum)).code == code
    assert classify(1, f"RuntimeError: See root cause. Failed core proc(s): {{'EngineCore': {-signum}}}").code == code
    if words:
        assert classify(0, DUMP.format(words) + PROCESS.format(None)).code == code
        assert classify(1, DUMP.format(words) + PROCESS.format(-9), oom="cgroup").code == "host_out_of_memory"
        assert classify(-9, DUMP.format(words)).code == "engine_killed"
        assert classify(1, "set_mempolicy: Operation not permitted\n" + DUMP.format(words)).code == code


@pytest.mark.parametrize("name", ["gpu_lost_ecc", "gpu_fault_illegal_access", "disk_full_cache", "weights_truncated"])
def test_what_was_said_before_a_fault_is_the_cause(name: str) -> None:
    said = (TAILS / f"{name}.txt").read_text()
    for words, _ in FAULTS.values():
        assert classify(1, said + DUMP.format(words)) == replace(classify(1, said), tail=said + DUMP.format(words))


def test_metrics_as_vllm_writes_them() -> None:
    text = (
        '# HELP vllm:num_requests_running x\nvllm:num_requests_running{engine="0",model_name="m"} 3.0\n'
        'vllm:num_requests_running{engine="1",model_name="m"} 2.0\nvllm:num_requests_waiting{engine="0"} 1.0\n'
        'vllm:kv_cache_usage_perc{engine="0"} 0.25\nvllm:kv_cache_usage_perc{engine="1"} 0.5\n'
        'vllm:generation_tokens_total{engine="0"} 100.0\nvllm:iteration_tokens_total_count{engine="0"} 7.0\n'
        'vllm:cache_config_info{block_size="128",engine="0",num_gpu_blocks="16384"} 1.0\nprocess_cpu_seconds_total 3\n'
        "vllm:num_requests_waiting nonsense\n"
    )
    found = parse(text)
    assert (found.running, found.waiting, found.requests, found.steps) == (5.0, 1.0, 6, 7.0)
    assert (found.kv_usage, found.kv_tokens) == (0.5, 2097152)
    gauges = Gauges()
    gauges.note(text, found, 10.0)
    assert gauges.load.tokens_per_s is None
    gauges.note(text, parse(text.replace("100.0", "160.0")), 12.0)
    assert (gauges.load.running, gauges.load.waiting, gauges.load.tokens_per_s) == (5, 1, 30.0)


def test_metrics_that_are_not_there_are_unknown_not_zero() -> None:
    assert parse("").load(None, 1.0).running is None
    assert parse("").steps is None
