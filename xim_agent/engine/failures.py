"""Why an engine ended, from its exit status and the end of what it wrote: a class, a remedy, whether to try again."""

import re
import signal
from dataclasses import dataclass


@dataclass(frozen=True)
class Failure:
    """`text` is one line for people; `tail` the end of stderr, shown whole where the class is `engine_failed`."""

    code: str
    text: str
    remedy: str = ""
    retry: bool = True
    tail: str = ""


@dataclass(frozen=True)
class _Class:
    code: str
    pattern: re.Pattern[str]
    remedy: str
    retry: bool = True


def _row(code: str, pattern: str, remedy: str, *, retry: bool = True) -> _Class:
    return _Class(code, re.compile(pattern), remedy, retry)


# The first that matches wins: causes before the errors that follow from them.
_CLASSES = (
    _row("engine_flag_unknown", r"error: (unrecognized arguments|argument .*(invalid|expected))",
         "the installed vLLM does not take this argument; change VLLM_ARGS or vLLM's version", retry=False),
    _row("gpu_out_of_memory", r"CUDA out of memory|HIP out of memory|torch\.(cuda\.)?OutOfMemoryError|"
         r"Free memory on device .* is less than desired|No available memory for the cache blocks",
         "lower GPU_MEMORY_UTILIZATION or MAX_MODEL_LEN, or free the GPU of other programs"),
    _row("kv_cache_too_small", r"larger than the (available|maximum number of tokens).*KV cache|KV cache is needed",
         "lower MAX_MODEL_LEN, or give the engine more memory", retry=False),
    _row("shm_too_small", r"No space left on device.*/dev/shm|/dev/shm.*No space left|unable to (mmap|write).*shm",
         "make /dev/shm larger (docker: --shm-size=16g)"),
    _row("disk_full", r"No space left on device|Disk quota exceeded", "free disk space"),
    _row("host_out_of_memory", r"Available memory on node .* is less than|MemoryError|DefaultCPUAllocator: .*memory|"
         r"Cannot allocate memory", "lower MAX_NUM_SEQS or MAX_MODEL_LEN, or give the host more memory"),
    _row("gpu_lost", r"GPU is lost|Xid|device-side assert|uncorrectable ECC|CUDA error: unspecified launch failure",
         "look at the kernel log (dmesg | grep -i xid); the GPU may need a reset"),
    _row("nccl_failed", r"NCCL (error|WARN)|ncclSystemError|ncclUnhandledCudaError",
         "check /dev/shm's size and that the GPUs can reach each other"),
    _row("socket_in_use", r"[Aa]ddress already in use", "end the program that holds the engine's socket or port"),
    _row("no_permission", r"PermissionError|Permission denied", "give the agent's user access to the path named above"),
    _row("corrupt_weights", r"SafetensorError|HeaderTooLarge|MetadataIncompleteBuffer|InvalidHeader|"
         r"size mismatch for|shape mismatch", "publish the model again", retry=False),
    _row("unsupported_model", r"are not supported for now|Model architectures .* (failed|not supported)|"
         r"does not recognize this architecture|Unknown quantization method|has no vLLM implementation",
         "use a newer vLLM, or another model", retry=False),
    _row("launcher_broken", r"ModuleNotFoundError|ImportError|PackageNotFoundError|cannot open shared object file",
         "repair the installation that VLLM_PATH names"),
)  # fmt: skip
_ERROR_LINE = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*|.*\berror: .*")


def classify(status: int | None, tail: str, what: str = "", *, served: bool = False) -> Failure:
    """`status`: exit status, negative for a signal, None when we ended it ourselves because of `what`.

    `served`: it had been ready. What it wrote then may be old, or a client's words: it is always tried again.
    """
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    named = [line for line in lines if _ERROR_LINE.search(line)]
    last = (named or ([] if what else lines) or [""])[-1]
    if not what:
        what = (
            f"vLLM was ended by {_signal(-status)}" if status is not None and status < 0 else f"vLLM exited ({status})"
        )
    for row in _CLASSES if status != 0 else ():
        if any(row.pattern.search(line) for line in lines):
            cause = next(line for line in reversed(lines) if row.pattern.search(line))
            return Failure(row.code, f"{what}: {cause[:500]}", row.remedy, row.retry or served, tail)
    if status == -signal.SIGKILL:
        remedy = "when the kernel did it, memory ran out: dmesg | grep -i 'out of memory'"
        return Failure("engine_killed", what, remedy, tail=tail)
    return Failure("engine_failed", f"{what}: {last[:500]}" if last else what, tail=tail)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
