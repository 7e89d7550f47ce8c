"""Configuration, assignment, hardware and model → vLLM's argv, environment and ceiling.

Later wins: the agent's own flags, then the assignment's engine_args, then the operator's VLLM_ARGS; VLLM_ENV last.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from xim_agent.config.fields import Config
from xim_agent.config.mask import masked_arguments
from xim_agent.engine import arguments
from xim_agent.engine.budget import GIB, TYPICAL_FLOOR, Wishes
from xim_agent.engine.environment import CPU_COMPILATION, LAST_WORD, PRIVATE, cpu_threads, directories, pairs
from xim_agent.engine.facts import ModelFacts
from xim_agent.engine.sizing import Sizing, ceiling, size
from xim_agent.errors import AgentError, Exit
from xim_agent.hardware.report import Device, Hardware
from xim_agent.mesh.messages import Assignment

LONGEST = 1 << 40  # tokens
MEDIA_NOWHERE = "media.invalid"  # else a request can make vLLM fetch from the operator's network
# vLLM works without these, only slower or less talkative, so a version that lacks one is still served.
OPTIONAL = frozenset(
    {
        "--enable-prefix-caching",
        "--enable-prompt-tokens-details",
        "--disable-uvicorn-access-log",
        "--shutdown-timeout",
        "--kv-offloading-size",
        "--kv-offloading-backend",
        "--speculative-config",
    }
)
_SPECULATIVE = {  # methods without a draft model, by architecture
    "DeepseekV3ForCausalLM": "deepseek_mtp",
    "Qwen3NextForCausalLM": "qwen3_next_mtp",
    "Glm4MoeForCausalLM": "mtp",
    "MiMoForCausalLM": "mimo_mtp",
}


_VLLMS_NAME = {"bitsandbytes-fp4": "bitsandbytes"}  # whose default of 4 bits is fp4


@dataclass(frozen=True)
class Places:
    """Paths of one engine: its socket, the launcher, the short directory for its own sockets, the compile caches."""

    launcher: str
    model: str
    socket: str
    scratch: str
    compile_cache: str


@dataclass(frozen=True)
class Plan:
    """How to start vLLM. `env` is what is added to the operator's environment. Two equal plans need no restart."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    ceiling: int
    max_num_seqs: int
    task: str
    model: ModelFacts
    wishes: Wishes
    sizing: Sizing | None
    warnings: tuple[str, ...] = ()

    def ceiling_for(self, kv_tokens: int) -> int:
        """The ceiling, worked out again from what vLLM itself says its cache holds."""
        if self.sizing is None:
            return self.ceiling
        w = self.wishes
        longest = self.sizing.max_model_len or w.max_model_len or self.model.max_len or TYPICAL_FLOOR
        kv_bytes = int(kv_tokens * self.model.slot_bytes(*w.split))
        return min(ceiling(self.model, kv_bytes, longest, w), self.max_num_seqs)

    def same_engine(self, other: "Plan | None") -> bool:
        return other is not None and self.argv == other.argv and dict(self.env) == dict(other.env)


def visible(devices: tuple[Device, ...], spec: str | None) -> tuple[Device, ...]:
    """The devices that CUDA_VISIBLE_DEVICES leaves, in its order. Raises AgentError for one that does not exist."""
    if spec is None:
        return devices
    chosen = []
    for word in filter(None, (w.strip() for w in spec.split(","))):
        found = [d for d in devices if str(d.index) == word or (len(word) > 4 and d.uuid.startswith(word))]
        if not found:
            names = ", ".join(f"{d.index} ({d.uuid})" for d in devices) or "none"
            raise _refused("no_such_device", f"CUDA_VISIBLE_DEVICES names {word}, but there is {names}", "")
        chosen.append(found[0])
    return tuple(chosen)


def plan(
    config: Config,
    assignment: Assignment,
    hardware: Hardware,
    model: ModelFacts,
    places: Places,
    known: frozenset[str] | None = None,
    bitsandbytes: bool = False,
) -> Plan:
    """`known`: flags of the installed vLLM, None while unknown (then all are given, and vLLM says what it lacks).
    `bitsandbytes`: it can quantize so.

    Raises AgentError: model_does_not_fit, no_such_device, too_few_devices, engine_args_refused, engine_args_invalid,
    engine_flag_missing, tensor_parallel_unfit.
    """
    serving = assignment.serving
    from_router = arguments.chosen_by_router(serving.engine_args, config.allow_engine_args)
    for words in from_router:
        if words[0] == "--chat-template":
            if len(words) != 2:
                raise _refused("engine_args_invalid", "the assignment's --chat-template does not name one file", "")
            words[1] = f"{places.model}/{words[1]}"
    from_operator = arguments.group(config.vllm_args, "VLLM_ARGS")
    for words in from_operator:
        if arguments.canonical(words[0]) in ("--uds", "--host", "--port"):
            raise _refused(
                "engine_args_invalid",
                f"VLLM_ARGS may not hold {words[0]}: the agent alone reaches the engine",
                "use XEROTIER_AGENT_VLLM_SOCKET_PATH to place the socket",
            )
    later = [word for words in (*from_router, *from_operator) for word in words]
    wishes, model = arguments.overridden(_wishes(config, assignment, model), model, later)
    wishes = _with_devices(
        config, hardware, replace(wishes, max_num_seqs=_max_num_seqs(later, wishes), bitsandbytes=bitsandbytes)
    )
    operators_env = pairs(config.vllm_env)
    if hardware.accelerator == "cpu":
        wishes = arguments.told_on_cpu(wishes, model, hardware, later, operators_env)
    sizing = size(model, hardware, wishes) if config.auto_config else None
    own = _flags(config, assignment, hardware, model, places, wishes, sizing)
    warnings = list(sizing.warnings if sizing else ())
    own = _only_known(own, known, warnings)
    if any(word.startswith("--enable-log-requests") for word in later):
        warnings.append("--enable-log-requests: vLLM then logs prompts, and the agent's log holds what vLLM says")
    argv = (places.launcher, "serve", places.model, *arguments.merged(own, from_router, from_operator))
    env = {**PRIVATE, **LAST_WORD, **directories(places.scratch, places.compile_cache), **_options(config)}
    if hardware.accelerator == "cpu":
        env |= CPU_COMPILATION | cpu_threads(hardware, wishes.ranks)
        if sizing and wishes.kv_bytes is None:  # it would beat the operator's flags
            env["VLLM_CPU_KVCACHE_SPACE"] = str(sizing.kv_bytes // GIB)
    env |= operators_env
    seqs = wishes.max_num_seqs
    most = sizing.ceiling if sizing else wishes.max_concurrent or seqs
    return Plan(argv, env, min(most, seqs), seqs, serving.task, model, wishes, sizing, tuple(warnings))


def _options(config: Config) -> dict[str, str]:
    env = {}
    if config.distributed_backend != "ray":
        env["VLLM_HOST_IP"] = "127.0.0.1"  # its processes talk to each other on this host only
    if config.ray_address:
        env["RAY_ADDRESS"] = config.ray_address
    if config.cuda_visible_devices is not None:
        env["CUDA_VISIBLE_DEVICES"] = config.cuda_visible_devices
    return env


def _refused(code: str, message: str, hint: str) -> AgentError:
    return AgentError(code, message, hint=hint, exit_code=Exit.CONFIG)


def _wishes(config: Config, assignment: Assignment, model: ModelFacts) -> Wishes:
    seqs = config.max_num_seqs or max(64, config.max_concurrent or 0)
    offload = None if config.kv_offload_size_gb is None else int(config.kv_offload_size_gb * 10**9)
    quantization = config.vllm_quantization or assignment.serving.quantization
    if (assignment.serving.max_model_len or 0) > LONGEST:
        raise _refused("engine_args_invalid", f"the assignment's max_model_len is above {LONGEST} tokens", "")
    return Wishes(
        max_model_len=config.max_model_len or assignment.serving.max_model_len,
        max_num_seqs=seqs,
        max_concurrent=config.max_concurrent,
        tensor_parallel=config.tensor_parallel_size,
        pipeline_parallel=config.pipeline_parallel_size,
        utilization=config.gpu_memory_utilization,
        quantization=None if quantization == "auto" else _VLLMS_NAME.get(quantization or "", quantization),
        offload_bytes=0 if config.kv_cache_backend == "none" else offload,
        draft=config.speculative_enabled and "mtp" in str(_speculative(config, model)["method"]),
    )


def _with_devices(config: Config, hardware: Hardware, wishes: Wishes) -> Wishes:
    if hardware.accelerator == "cpu":
        return wishes
    devices = visible(hardware.devices, config.cuda_visible_devices)
    needed = wishes.ranks
    if not devices or (needed > len(devices) and config.distributed_backend != "ray"):
        raise _refused(
            "too_few_devices",
            f"TENSOR_PARALLEL_SIZE {wishes.tensor_parallel} x PIPELINE_PARALLEL_SIZE {wishes.pipeline_parallel} "
            f"needs {needed} GPUs, {len(devices)} are visible",
            "lower them, or run on an existing Ray cluster with DISTRIBUTED_BACKEND=ray",
        )
    return replace(wishes, devices=devices)


def _max_num_seqs(later: Sequence[str], wishes: Wishes) -> int:
    word = arguments.value_of(later, "--max-num-seqs")
    if word is None:
        return wishes.max_num_seqs
    if not re.fullmatch(r"[0-9]{1,9}", word) or int(word) < 1:
        raise _refused("engine_args_invalid", f"--max-num-seqs {word} is no number of sequences", "give one above 0")
    return int(word)


def _flags(
    config: Config,
    assignment: Assignment,
    hardware: Hardware,
    model: ModelFacts,
    places: Places,
    wishes: Wishes,
    sizing: Sizing | None,
) -> dict[str, list[str]]:
    flags: dict[str, list[str]] = {
        "--uds": [places.socket],
        "--served-model-name": [assignment.serving.served_model_name],
        "--max-num-seqs": [str(wishes.max_num_seqs)],
        "--allowed-media-domains": [MEDIA_NOWHERE],
        "--shutdown-timeout": [str(int(config.drain_timeout_seconds))],
        "--disable-uvicorn-access-log": [],
    }
    if assignment.serving.task == "generate":
        flags |= {"--enable-prefix-caching": [], "--enable-prompt-tokens-details": []}
    else:
        flags["--runner"] = ["pooling"]
    if length := (sizing.max_model_len if sizing else wishes.max_model_len):
        flags["--max-model-len"] = [str(length)]
    if wishes.tensor_parallel > 1:
        flags["--tensor-parallel-size"] = [str(wishes.tensor_parallel)]
    if wishes.pipeline_parallel > 1:
        flags["--pipeline-parallel-size"] = [str(wishes.pipeline_parallel)]
    if config.distributed_backend:
        flags["--distributed-executor-backend"] = [config.distributed_backend]
    if quantization := (sizing.quantization if sizing else wishes.quantization):
        flags["--quantization"] = [quantization]
    if config.speculative_enabled:
        flags["--speculative-config"] = [json.dumps(_speculative(config, model))]
    if hardware.accelerator != "cpu":
        utilization = (sizing.utilization if sizing else None) or wishes.utilization
        flags["--gpu-memory-utilization"] = [f"{utilization:g}"]
        offload = sizing.offload_bytes if sizing else wishes.offload_bytes or 0
        if offload:
            flags["--kv-offloading-size"] = [f"{offload / GIB:.2f}"]
            flags["--kv-offloading-backend"] = [config.kv_cache_backend]
    elif not config.auto_config:
        flags["--gpu-memory-utilization"] = [f"{wishes.utilization:g}"]  # on a CPU, of the host's memory
    return flags


def _speculative(config: Config, model: ModelFacts) -> dict[str, object]:
    method: str = config.speculative_method
    if method == "auto":
        method = "draft_model" if config.speculative_model else _SPECULATIVE.get(model.architecture, "ngram")
    found: dict[str, object] = {"method": method, "num_speculative_tokens": config.speculative_tokens}
    if config.speculative_model:
        found["model"] = config.speculative_model
    if method == "ngram":
        found |= {"prompt_lookup_max": 4, "prompt_lookup_min": 2}  # lengths that vLLM's own examples use
    return found


def _only_known(own: dict[str, list[str]], known: frozenset[str] | None, warnings: list[str]) -> dict[str, list[str]]:
    if known is None:
        return own
    for name in [name for name in own if name not in known]:
        if name not in OPTIONAL:
            raise _refused(
                "engine_flag_missing", f"the installed vLLM does not know {name}", "install a version that does"
            )
        warnings.append(f"the installed vLLM does not know {name}, left out")
    return {name: values for name, values in own.items() if name in known}


def shown(plan: Plan) -> str:
    """The command line as one would type it, for logs: without values that are secret by their name."""
    return shlex.join(masked_arguments(plan.argv))
