"""The one table of options: attribute, type, default, environment variable, flag, unit, help. `Config` is the table.

Everything else (parser, `--help`, compose headers, `describe`) is made from `OPTIONS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

PREFIX = "XEROTIER_AGENT_"

LogLevel = Literal["trace", "debug", "info", "warning", "error"]
LogFormat = Literal["auto", "console", "json"]
KvBackend = Literal["native", "lmcache", "none"]
SpeculativeMethod = Literal[
    "auto", "ngram", "eagle", "medusa", "draft_model", "deepseek_mtp", "qwen3_next_mtp", "mtp", "mimo_mtp"
]


def option(
    default: Any,
    help_text: str,
    *,
    group: str,
    env: str | None = None,
    flag: str | None = None,
    low: float | None = None,
    high: float | None = None,
    secret: bool = False,
    repeat: Literal["arg", "pair"] | None = None,
    off_flag: bool = False,
    shown_default: str | None = None,
) -> Any:
    """`repeat`: the flag may be given several times and the variable is split as a shell splits words."""
    meta = {
        "help": help_text,
        "group": group,
        "env": env,
        "flag": flag,
        "low": low,
        "high": high,
        "secret": secret,
        "repeat": repeat,
        "off_flag": off_flag,
        "shown_default": shown_default,
    }
    return field(default=default, metadata=meta)


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of the agent, parsed once. Sizes named `_gb` are 10^9 bytes, times are seconds."""

    # identity
    join_key: str | None = option(None, "Join key; needed for the first start only", group="identity", secret=True)
    join_key_file: Path | None = option(None, "File that holds the join key", group="identity")
    router_url: str | None = option(
        None, "Router to use instead of those in the join key", group="identity", shown_default="from the join key"
    )
    allow_insecure: bool = option(
        False, "Allow plain http and unverified TLS to the router", group="identity", flag="--insecure"
    )
    name: str | None = option(None, "Name shown by the router", group="identity", shown_default="host name")
    config_path: Path = option(
        Path("~/.config/xerotier"), "Directory of the enrollment state, mode 0700", group="identity"
    )
    # log
    log_level: LogLevel = option("info", "How much is logged", group="log")
    log_format: LogFormat = option("auto", "Log form; auto: console on a terminal, else json", group="log")
    # engine
    max_concurrent: int | None = option(
        None, "Most requests served at once", group="engine", low=1, high=4096, shown_default="auto"
    )
    max_model_len: int | None = option(
        None, "Longest sequence, in tokens", group="engine", low=1, shown_default="the model's own"
    )
    tensor_parallel_size: int = option(
        1, "GPUs that share each layer; never chosen automatically", group="engine", low=1, high=64
    )
    pipeline_parallel_size: int = option(1, "Groups of GPUs that share the layers", group="engine", low=1, high=64)
    distributed_backend: Literal["mp", "ray"] | None = option(
        None, "How vLLM runs its workers", group="engine", shown_default="vLLM's own"
    )
    ray_address: str | None = option(None, "Existing Ray cluster for vLLM", group="engine")
    gpu_memory_utilization: float = option(
        0.95, "Fraction of each GPU's memory for the engine", group="engine", low=0.05, high=1.0
    )
    cuda_visible_devices: str | None = option(
        None, "GPUs to use, comma-separated", group="engine", shown_default="all visible"
    )
    max_num_seqs: int | None = option(
        None, "Sequences vLLM batches at once", group="engine", low=1, high=4096, shown_default="64"
    )
    auto_config: bool = option(True, "Size the engine from model and hardware", group="engine", off_flag=True)
    vllm_path: str = option("vllm", "vLLM launcher: a path, or a name on PATH", group="engine")
    allow_engine_args: tuple[str, ...] = option(
        (), "vLLM flags the router may choose beyond the safe list", group="engine", repeat="arg"
    )
    allow_unsafe_files: bool = option(False, "Accept models with Python or pickle files", group="engine")
    vllm_args: tuple[str, ...] = option(
        (), "Arguments appended to vLLM's command line", group="engine", flag="--vllm-arg", repeat="arg"
    )
    vllm_env: tuple[str, ...] = option(
        (), "KEY=VALUE pairs added to vLLM's environment", group="engine", flag="--vllm-env", repeat="pair"
    )
    vllm_socket_path: Path | None = option(
        None, "Unix socket vLLM serves on", group="engine", shown_default="in the runtime directory"
    )
    vllm_salt_secret: str | None = option(
        None, "Secret of the per-tenant prefix cache salts", group="engine", secret=True
    )
    vllm_salt_secret_file: Path | None = option(None, "File that holds the salt secret", group="engine")
    vllm_quantization: str | None = option(
        None, "Quantization method", group="engine", flag="--quantization", shown_default="auto"
    )
    kv_cache_backend: KvBackend = option("native", "Where evicted KV blocks go", group="engine")
    kv_offload_size_gb: float | None = option(
        None,
        "Host memory for evicted KV blocks, GB; 0 disables",
        group="engine",
        low=0,
        shown_default="25 % of the smaller of RAM and cgroup limit",
    )
    speculative_enabled: bool = option(False, "Speculative decoding", group="engine")
    speculative_method: SpeculativeMethod = option("auto", "Speculative method", group="engine")
    speculative_tokens: int = option(5, "Tokens proposed per step", group="engine", low=1, high=64)
    speculative_model: str | None = option(None, "Directory of a draft model", group="engine")
    engine_start_stall_seconds: float = option(
        300, "A starting engine that is silent and idle for so long has failed", group="engine", low=5
    )
    engine_hang_seconds: float = option(
        60, "A serving engine without progress for so long is restarted", group="engine", low=5
    )
    # cache
    model_cache_path: Path = option(Path("~/.cache/xerotier/models"), "Directory of the model cache", group="cache")
    model_cache_max_size_gb: float = option(100, "Bound of the model cache, GB", group="cache", low=0.001)
    model_cache_downloads: int = option(8, "Parallel transfers", group="cache", low=1, high=64)
    # metrics
    metrics_port: int = option(
        9094, "Port of /metrics, /livez, /readyz, /status; 0: any free", group="metrics", low=0, high=65535
    )
    metrics_host: str = option("127.0.0.1", "Address of the metrics server", group="metrics")
    disable_metrics_server: bool = option(False, "No metrics server", group="metrics")
    # stop
    drain_timeout_seconds: float = option(
        120, "How long running requests may go on after a stop is asked for", group="stop", low=0, high=86400
    )
    on_final_error: Literal["exit", "park"] = option(
        "exit", "After an error that trying again cannot cure; park: stay, not ready, and tell the cause", group="stop"
    )


@dataclass(frozen=True)
class Option:
    """One row of the table, worked out: `kind` is the value's type, `choices` the allowed words of a Literal."""

    attr: str
    kind: type
    optional: bool
    choices: tuple[str, ...]
    default: Any
    env: str
    flag: str
    meta: Mapping[str, Any]


def _rows() -> tuple[Option, ...]:
    hints = get_type_hints(Config)
    rows = []
    for f in fields(Config):
        hint = hints[f.name]
        parts = [a for a in get_args(hint) if a is not type(None)]
        optional = type(None) in get_args(hint)
        base = parts[0] if optional else hint
        choices = get_args(base) if getattr(base, "__origin__", None) is Literal else ()
        kind = str if choices else (tuple if getattr(base, "__origin__", None) is tuple else base)
        rows.append(
            Option(
                attr=f.name,
                kind=kind,
                optional=optional,
                choices=tuple(choices),
                default=f.default,
                env=f.metadata["env"] or PREFIX + f.name.upper(),
                flag=f.metadata["flag"] or "--" + f.name.replace("_", "-"),
                meta=f.metadata,
            )
        )
    return tuple(rows)


OPTIONS: tuple[Option, ...] = _rows()
