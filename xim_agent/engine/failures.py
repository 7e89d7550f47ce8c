"""Why an engine ended, from its exit status and the end of what it wrote: a class, a remedy, whether to try again."""

import re
import signal
from dataclasses import dataclass, replace

from xim_agent.engine.oom import Where


@dataclass(frozen=True)
class Failure:
    """`text` is one line for people; `tail` the end of stderr, shown whole where the class is one of `UNEXPLAINED`."""

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


def _ended_by(*signals: signal.Signals) -> str:
    """As vLLM tells of its processes, and `_by_words` of vLLM itself."""
    return rf"(exit code: |'EngineCore\w*': )-({'|'.join(str(int(signum)) for signum in signals)})\b"


# Where the remedy does not say all that can be known: the rest is in what vLLM wrote.
UNEXPLAINED = ("engine_failed", "engine_crashed", "cpu_unsupported")
_KILLED = "when the kernel did it, memory ran out (dmesg | grep -i oom): lower MAX_NUM_SEQS or MAX_MODEL_LEN"
_RESTART = "; then restart the agent"
# The first that matches wins: causes before the errors that follow from them. Without retry are those where the same
# start fails the same way, until the assignment or something on this machine has been changed by a person.
_CLASSES = (
    _row("engine_flag_unknown", r"error: (unrecognized arguments|argument .*(invalid|expected|cannot be converted))",
         "the installed vLLM does not take this argument: change VLLM_ARGS or vLLM's version" + _RESTART, retry=False),
    _row("gpu_memory_taken", r"Free memory on device .* is less than|Error in memory profiling",
         "end the other programs on the GPU (nvidia-smi shows them), or lower GPU_MEMORY_UTILIZATION"),
    _row("gpu_out_of_memory", r"(CUDA|HIP)( error:)? out of memory|torch\.(cuda\.)?OutOfMemoryError|"
         r"STATUS_ALLOC_FAILED", "lower MAX_NUM_SEQS, MAX_MODEL_LEN or GPU_MEMORY_UTILIZATION, or use more GPUs "
         "(TENSOR_PARALLEL_SIZE)"),
    _row("kv_cache_too_small", r"larger than the (available|maximum number of tokens).*KV cache|KV cache is needed|"
         r"No available memory for the cache blocks",
         "lower MAX_MODEL_LEN, or raise GPU_MEMORY_UTILIZATION (on a CPU: give the engine more memory)" + _RESTART,
         retry=False),
    _row("context_too_long", r"is greater than the derived max_model_len",
         "lower MAX_MODEL_LEN, or the assignment's, to what the model was made for", retry=False),
    _row("shm_too_small", r"No space left on device.*/dev/shm|/dev/shm.*No space left|unable to (mmap|write).*shm|"
         r"Insufficient space in /dev/shm|creating shared memory segment",
         "make /dev/shm larger (docker: --shm-size=16g)"),
    _row("disk_full", r"No space left on device|Disk quota exceeded",
         "free space on the disks of MODEL_CACHE_PATH and of the runtime directory"),
    _row("host_out_of_memory", r"Available memory on node .* is less than|MemoryError|DefaultCPUAllocator: .*memory|"
         r"Cannot allocate memory|std::bad_alloc|failed to map segment|C10 Out of Memory",
         "lower MAX_NUM_SEQS, MAX_MODEL_LEN or KV_OFFLOAD_SIZE_GB, or give the host or the container more memory"),
    _row("limit_reached", r"Too many open files|can't start new thread|Resource temporarily unavailable",
         "raise the service's limits on open files and processes (systemd: LimitNOFILE=, TasksMax=)"),
    _row("gpu_lost", r"GPU is lost|fallen off the bus|Xid|uncorrectable ECC|CUDA error: unspecified launch failure|"
         r"HSA_STATUS_ERROR_(HARDWARE|OUT_OF_RESOURCES)",
         "look at the kernel log (dmesg | grep -i xid); the GPU may need a reset"),
    _row("gpu_fault", r"illegal memory access|device-side assert|misaligned address|illegal instruction was enc|"
         r"Memory access fault by GPU",
         "use another version of vLLM when it comes again; --enforce-eager in VLLM_ARGS avoids many of these"),
    _row("gpu_driver_too_old", r"driver on your system is too old|driver version is insufficient|"
         r"forward compatibility was attempted|unsupported display driver / cuda driver combination",
         "install an NVIDIA driver for the CUDA of this vLLM, or a vLLM for this driver" + _RESTART, retry=False),
    _row("gpu_unsupported", r"no kernel image is available|invalid device function|hipErrorNoBinaryForGpu|"
         r"Bfloat16 is only supported on GPUs|is not supported for the current GPU",
         "use a vLLM built for this GPU, another VLLM_QUANTIZATION, or --dtype half in VLLM_ARGS" + _RESTART,
         retry=False),
    _row("gpu_missing", r"No (CUDA|HIP) GPUs are available|no (CUDA|ROCm)-capable device|Found no NVIDIA driver|"
         r"invalid device ordinal|Failed to infer device type|libcuda\.so\.1: cannot open",
         "look whether nvidia-smi or rocm-smi works for the agent's user and container, and at CUDA_VISIBLE_DEVICES"),
    _row("nccl_failed", r"NCCL (error|WARN)|ncclSystemError|ncclUnhandledCudaError|RCCL error",
         "check /dev/shm's size and that the GPUs reach each other (nvidia-smi topo -m); NCCL_DEBUG=INFO in VLLM_ENV "
         "tells more"),
    _row("socket_in_use", r"[Aa]ddress already in use",
         "end the program that holds the engine's socket or port, or set VLLM_SOCKET_PATH"),
    _row("no_permission", r"PermissionError|Permission denied|"
         r"^(?!.*(mempolicy|mbind|migrate_pages)).*Operation not permitted",  # they do no harm
         "give the agent's user access to the path named above"),
    _row("weights_unreadable", r"No such file or directory: .*\.safetensors",
         "make the file readable for the agent's user, or publish the model again (safetensors says this of both)"),
    _row("weights_missing", r"Cannot find any model weights|weights were not initialized from checkpoint",
         "publish the model again, with its weights", retry=False),
    _row("corrupt_weights", r"SafetensorError|HeaderTooLarge|MetadataIncompleteBuffer|InvalidHeader|size mismatch for|"
         r"shape mismatch|exceeds dimension size|Attempted to load weight",
         "publish the model again: its weights are damaged, or not those of its config.json", retry=False),
    _row("parallel_impossible", r"must be divisible by tensor parallel size|World size \(?\d+\)? is larger than|"
         r"Not enough allowed NUMA nodes",
         "lower TENSOR_PARALLEL_SIZE and PIPELINE_PARALLEL_SIZE to what this machine has and what divides the model's "
         "attention heads" + _RESTART, retry=False),
    # On a CPU; healthy until its first request.
    _row("pipeline_not_warmed_up", r"assert self\.intermediate_tensors is not None",
         "leave --enforce-eager out of VLLM_ARGS and the assignment, or lower PIPELINE_PARALLEL_SIZE to 1" + _RESTART,
         retry=False),
    _row("quantization_unsupported", r"Unknown quantization method|Cannot find the config file for|"
         r"[Qq]uantization .*not (currently )?supported|does not match the quantization method|"
         r"static_scaled_fp8_quant|[Pp]lease install bitsandbytes|No module named 'bitsandbytes'",
         "set VLLM_QUANTIZATION to a method that the model and this machine have, or assign another model" + _RESTART,
         retry=False),
    _row("unsupported_model", r"are not supported for now|Model architectures .* (failed|not supported)|"
         r"does not recognize this architecture|has no vLLM implementation",
         "use a newer vLLM and restart the agent, or assign another model", retry=False),
    _row("model_files_broken", r"is not a valid JSON file|Error parsing config for|JSONDecodeError|Repo id must be in|"
         r"Invalid repository ID or local directory|instantiate the backend tokenizer|Unable to load vocabulary",
         "publish the model again: its config.json or its tokenizer's files are missing or damaged", retry=False),
    _row("engine_option_refused", r"^Value error, |VLLMValidationError|invalid (tool call|reasoning) parser",
         "change the assignment's engine_args, or VLLM_ARGS" + _RESTART, retry=False),
    _row("launcher_broken", r"ModuleNotFoundError|ImportError|PackageNotFoundError|cannot open shared object file",
         "repair the installation that VLLM_PATH names"),
    # Last, for what dies so may have said why; whom the kernel killed first, for the others may fall over that.
    _row("engine_killed", _ended_by(signal.SIGKILL), _KILLED),
    # On a CPU vLLM's own kernels use AMX, which is for who asked the kernel for it: oneDNN asks, which compiled models
    # use, and all with a matrix above 1 MiB. The others are healthy until their first request.
    _row("cpu_unsupported", r"Fatal Python error: Illegal instruction|" + _ended_by(signal.SIGILL),
         "use a vLLM built for this processor (lscpu tells what it can do); if it has AMX, leave --enforce-eager out "
         "of VLLM_ARGS and the assignment (vLLM then needs g++ and Python's headers)" + _RESTART, retry=False),
    _row("bus_error", r"Fatal Python error: Bus error|" + _ended_by(signal.SIGBUS),
         "make /dev/shm larger when it is full (df /dev/shm; docker: --shm-size=16g), else look at the disk under "
         "MODEL_CACHE_PATH (dmesg)"),
    _row("engine_crashed", r"Fatal Python error: (Segmentation fault|Aborted|Floating point exception)|Segfault enc|"
         + _ended_by(signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGTRAP, signal.SIGSYS),
         "use another version of vLLM when it comes again; where it crashed is in the agent's log"),
    _row("engine_killed", r"died unexpectedly", _KILLED),
)  # fmt: skip
_MEMORY = next(row for row in _CLASSES if row.code == "host_out_of_memory")
_OOM = {"cgroup": "in the agent's own container or unit", "machine": "on this machine"}
# What vLLM writes as a warning may name errors that it only fears; a dump of Python's names all that was loaded.
_QUIET = re.compile(r"^(?:\([^)]*\) )?(?:DEBUG|INFO|WARNING)\b|^File \".*\", line \d+ in |^Extension modules: ")
_UNKNOWN = "look at the end of what vLLM wrote: the agent's log has it whole, up to 64 KiB"
# Of processes that say what happens to another one: cause (ends without these are without a word) and consequence.
_DYING = re.compile(r"EngineCore (failed to start|encountered a fatal error)")
_FOLLOWS = re.compile(r"EngineDeadError|(Engine core|WorkerProc) initialization failed|Executor failed")
_PREFIX = re.compile(r"^(?:\([^)]*\) )?(?:(?:ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^\]]*\] )?")
_ERROR_LINE = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*|.*\berror: .*")


def classify(status: int | None, tail: str, what: str = "", *, served: bool = False, oom: Where = "") -> Failure:
    """`status`: exit status, negative for a signal, None when we ended it ourselves because of `what`.

    `served`: it had been ready. What it wrote then may be old, or a client's words: it is always tried again.
    `oom`: where the kernel's OOM killer was at work lately; what it kills has no last word.
    """
    found = _by_words(status, tail, what, served=served)
    if (oom and found.code == "engine_killed") or (oom == "cgroup" and found.code == "engine_failed"):
        text = f"{found.text}; the kernel has killed for want of memory ({_OOM[oom]})"
        return replace(found, code=_MEMORY.code, text=text, remedy=_MEMORY.remedy, retry=_MEMORY.retry)
    return found


def _by_words(status: int | None, tail: str, what: str, *, served: bool) -> Failure:
    lines = [line for each in tail.splitlines() if (line := each.strip()) and not _QUIET.match(line)]
    named = [line for line in lines if _ERROR_LINE.search(line)]
    causes = [line for line in named if not _FOLLOWS.search(line)]
    last = (causes or named or ([] if what else lines) or [""])[-1]
    if not what:
        what = (
            f"vLLM was ended by {_signal(-status)}" if status is not None and status < 0 else f"vLLM exited ({status})"
        )
    ending = f"exit code: {status}"
    for row in _CLASSES:  # also with status 0: with it vLLM ends when its EngineCore has died
        telling = [line for line in lines if row.pattern.search(line)]
        if telling or row.pattern.search(ending):
            cause = (telling or [last])[-1]
            return Failure(
                row.code, f"{what}: {_said(cause)}" if cause else what, row.remedy, row.retry or served, tail
            )
    if _FOLLOWS.search(tail) and not _DYING.search(tail):
        return Failure("engine_killed", f"{what}: {_said(last)}" if last else what, _KILLED, tail=tail)
    return Failure("engine_failed", f"{what}: {_said(last)}" if last else what, _UNKNOWN if tail else "", tail=tail)


def _said(line: str) -> str:
    """For people: without process, level, time and place of the log line, and not endless."""
    return _PREFIX.sub("", line)[:500]


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
