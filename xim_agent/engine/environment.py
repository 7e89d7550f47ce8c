"""vLLM's environment: the operator's, nothing of ours, and what the engine needs. Pure."""

import sys
from collections.abc import Iterable, Mapping

from xim_agent.config.fields import PREFIX, Config
from xim_agent.errors import AgentError, Exit
from xim_agent.hardware.report import Hardware
from xim_agent.hardware.visible import names_none

PRIVATE = {  # no word to anybody, and no fetching for a request
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
}

# A process that a fault ends says which and where: else only its parent tells the signal, and not always.
LAST_WORD = {"PYTHONFAULTHANDLER": "1"}

# vLLM 0.32 on CPU keeps the models it compiled ahead of time, cannot load them, and compiles again at every start.
# Without them it finds what Inductor has kept: a second start takes half the CPU time (tests/bench/engine_start.py).
CPU_COMPILATION = {"VLLM_USE_AOT_COMPILE": "0"}


def directories(scratch: str, compile_cache: str) -> dict[str, str]:
    return {
        "VLLM_RPC_BASE_PATH": scratch,
        "TMPDIR": scratch,
        "VLLM_CACHE_ROOT": compile_cache,
        "TRITON_CACHE_DIR": f"{compile_cache}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{compile_cache}/inductor",
    }


def pairs(words: Iterable[str]) -> dict[str, str]:
    """VLLM_ENV. Raises AgentError for a word that is not KEY=VALUE."""
    env = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise AgentError(
                "engine_env_invalid",
                f"VLLM_ENV holds {word!r}, which is not KEY=VALUE",
                hint="write VLLM_ENV as a shell would: A=1 B='two words'",
                exit_code=Exit.CONFIG,
            )
        env[name] = value
    return env


def cpu_threads(hardware: Hardware, ranks: int) -> dict[str, str]:
    """Threads: one per physical core this process may use, shared out among the ranks, each with its own list.

    OMP_PROC_BIND stays unset: TRUE pins each process's first thread, children inherit that, and all of vLLM ends up on
    one core (seen). vLLM sets it itself for its workers, with the lists given here.
    Where a cgroup gives less CPU time than cores, nothing is pinned: neighbours with the same limit would all pin
    themselves to the same first cores.
    """
    cpus = list(hardware.cpus)
    if len(hardware.core_of) == len(cpus):
        cpus = sorted({core: cpu for cpu, core in reversed(list(zip(cpus, hardware.core_of, strict=True)))}.values())
    if len(cpus) < ranks:
        cpus = list(hardware.cpus)
    if len(cpus) < ranks:
        raise AgentError(
            "too_few_devices",
            f"{ranks} ranks need as many CPUs, {len(cpus)} are usable",
            hint="lower TENSOR_PARALLEL_SIZE or PIPELINE_PARALLEL_SIZE",
            exit_code=Exit.CONFIG,
        )
    each = len(cpus) // ranks
    lists = [cpus[i * each : (i + 1) * each if i + 1 < ranks else None] for i in range(ranks)]
    env = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    if hardware.cpu_limit < len(cpus) - 0.5:
        return env | {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(max(1, int(hardware.cpu_limit) // ranks)),
        }
    return env | {
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, part)) for part in lists),
        "OMP_NUM_THREADS": str(each),
    }


def child_environment(environ: Mapping[str, str], added: Mapping[str, str], bundle: str | None) -> dict[str, str]:
    """The operator's environment without our settings (secrets among them) and loader variables, plus `added`.

    CUDA numbers the GPUs as NVML and nvidia-smi do, not the fastest first.
    Proxies are for our calls to the router and may hold a password; vLLM is kept off the network.
    `bundle`: the directory a frozen program was unpacked to, None when not frozen.
    """
    env = {
        name: value
        for name, value in environ.items()
        if not name.startswith((PREFIX, "_MEI", "_PYI"))
        and name not in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "CREDENTIALS_DIRECTORY")
        and not name.lower().endswith("_proxy")
    }
    if bundle is not None:
        for name in [n for n in env if n.startswith("PYTHON") and (n == "PYTHONHOME" or bundle in env[n])]:
            del env[name]
        env.pop("LD_LIBRARY_PATH", None)
        if (original := env.pop("LD_LIBRARY_PATH_ORIG", None)) is not None:
            env["LD_LIBRARY_PATH"] = original
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **env, **added}


def gpu_environment(config: Config, environ: Mapping[str, str]) -> dict[str, str]:
    """The engine's environment as far as it hides GPUs; our own CUDA_VISIBLE_DEVICES chooses among all the others,
    unless it is one that names none: then the CPU is asked for.

    Raises AgentError as `pairs` does.
    """
    env = child_environment(environ, pairs(config.vllm_env), getattr(sys, "_MEIPASS", None))
    if config.cuda_visible_devices is not None:
        env.pop("CUDA_VISIBLE_DEVICES", None)
        if names_none(config.cuda_visible_devices):
            env["CUDA_VISIBLE_DEVICES"] = config.cuda_visible_devices
    return env
