import pytest

from xim_agent.engine.failures import classify
from xim_agent.engine.scrape import Gauges, parse

ENGINE_CORE = "(EngineCore pid=9) ERROR 11-23 15:54:52 [core.py:1] "


@pytest.mark.parametrize(
    ("line", "code", "retry"),
    [
        ("vllm: error: unrecognized arguments: --nonsense", "engine_flag_unknown", False),
        ("vllm: error: argument --dtype: invalid choice: 'x'", "engine_flag_unknown", False),
        (
            ENGINE_CORE + "torch.OutOfMemoryError: CUDA out of memory. Tried 1 GiB",
            "gpu_out_of_memory",
            True,
        ),
        (
            ENGINE_CORE + "ValueError: Free memory on device cuda:0 (16.9/79.2 GiB) is less than desired GPU",
            "gpu_out_of_memory",
            True,
        ),
        (
            "ValueError: To serve a request with the models's max seq len (131072), 16.0 GiB KV cache is needed",
            "kv_cache_too_small",
            False,
        ),
        ("OSError: [Errno 28] No space left on device: '/dev/shm/psm_1'", "shm_too_small", True),
        ("OSError: [Errno 28] No space left on device: '/cache/x'", "disk_full", True),
        (
            "ValueError: Available memory on node 0 (1.0/9.9 GiB) on kv cache allocation is less than requested",
            "host_out_of_memory",
            True,
        ),
        ("RuntimeError: NCCL error: unhandled system error", "nccl_failed", True),
        ("OSError: [Errno 98] Address already in use", "socket_in_use", True),
        ("PermissionError: [Errno 13] Permission denied: '/models/x'", "no_permission", True),
        (
            "safetensors_rust.SafetensorError: Error: HeaderTooLarge",
            "corrupt_weights",
            False,
        ),
        ("ValueError: Model architectures ['Foo'] are not supported for now.", "unsupported_model", False),
        ("ModuleNotFoundError: No module named 'torchvision'", "launcher_broken", True),
    ],
)
def test_known_failures(line: str, code: str, retry: bool) -> None:
    found = classify(1, f"INFO noise\n{line}\nERROR RuntimeError: Engine core initialization failed.")
    assert (found.code, found.retry) == (code, retry)
    assert line in found.text
    assert found.remedy


def test_an_unknown_failure_keeps_its_whole_tail() -> None:
    tail = "Traceback (most recent call last):\n  File x\nSomethingError: never seen\n"
    found = classify(1, tail)
    assert (found.code, found.tail) == ("engine_failed", tail)
    assert found.text == "vLLM exited (1): SomethingError: never seen"


def test_signals_and_our_own_reasons_are_named() -> None:
    assert classify(-9, "").code == "engine_killed"
    assert "SIGKILL" in classify(-9, "").text
    assert classify(-11, "").text == "vLLM was ended by SIGSEGV"
    assert classify(None, "INFO up", "vLLM has made no step for 60 s").text == "vLLM has made no step for 60 s"


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
