"""vLLM's command line as data: what the operator and the router add, and what the installed vLLM understands."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from xim_agent.engine.budget import CPU_RANK_OVERHEAD, GIB, Wishes
from xim_agent.engine.facts import DTYPE_BYTES, ModelFacts
from xim_agent.errors import AgentError, Exit
from xim_agent.hardware.report import Hardware

_SHORT = {
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-q": "--quantization",
    "-sc": "--speculative-config",
    "--device-memory-utilization": "--gpu-memory-utilization",
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_NUMBER = re.compile(r"-?[0-9.]+")
# What the router may choose by itself. vLLM's other flags can load code, open ports and read files.
_ALLOWED = {
    "--dtype": _NAME,
    "--tool-call-parser": _NAME,
    "--reasoning-parser": _NAME,
    "--enable-auto-tool-choice": None,
    "--chat-template": re.compile(r".{1,256}"),
    "--chat-template-content-format": _NAME,
    "--max-num-batched-tokens": re.compile(r"[0-9]{1,9}"),
    "--limit-mm-per-prompt": re.compile(r'\{["a-z0-9:, ]{0,256}\}'),
    "--enforce-eager": None,
}


def canonical(flag: str) -> str:
    """One name for all ways to write a flag: `--no-x`, `--x_y` and short forms included."""
    name = _SHORT.get(flag.partition("=")[0], flag.partition("=")[0])
    name = "--" + name.lstrip("-").replace("_", "-")
    return "--" + name.removeprefix("--no-") if name.startswith("--no-") else name


def group(words: Sequence[str], source: str) -> list[list[str]]:
    """Splits words into flags with their values. Raises AgentError when the first word is no flag."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("-") and not _NUMBER.fullmatch(word):
            groups.append([word])
        elif groups:
            groups[-1].append(word)
        else:
            raise AgentError(
                "engine_args_invalid",
                f"{source}: {word!r} is not a flag of vLLM",
                hint="flags begin with -- and are followed by their values",
                exit_code=Exit.CONFIG,
            )
    return groups


def chosen_by_router(words: Sequence[str], allowed_too: Iterable[str]) -> list[list[str]]:
    """The assignment's engine_args, checked. `allowed_too`: flags that the operator permits besides the safe ones.

    Raises AgentError `engine_args_refused`. A chat template is a path inside the model directory.
    """
    permitted = {canonical(name if name.startswith("-") else f"--{name}") for name in allowed_too}
    checked = []
    for flag, *values in group(words, "assignment"):
        name, _, inline = flag.partition("=")
        given = [inline, *values] if inline else values
        if canonical(flag) in permitted:
            checked.append([flag, *values])
            continue
        pattern = _ALLOWED.get(name, ...)
        safe = pattern is not ... and (
            not given if pattern is None else len(given) == 1 and pattern.fullmatch(given[0]) is not None
        )
        if name == "--chat-template" and safe:
            path = PurePosixPath(given[0])
            safe = not path.is_absolute() and ".." not in path.parts and "{" not in given[0]
        if not safe:
            raise AgentError(
                "engine_args_refused",
                f"the router wants vLLM to run with {' '.join([flag, *values])}, which this agent does not permit",
                hint=f"if you trust the router with it, set XEROTIER_AGENT_ALLOW_ENGINE_ARGS={_SHORT.get(name, name)}",
                exit_code=Exit.CONFIG,
            )
        checked.append([name, *given])
    return checked


def merged(own: Mapping[str, Sequence[str]], *later: Iterable[Sequence[str]]) -> list[str]:
    """The words of a command line. Own flags that a later group names again are dropped, in whatever form it does."""
    flags: dict[str, Sequence[str]] = {name: [name, *values] for name, values in own.items()}
    for groups in later:
        named = list(groups)
        for words in named:
            flags.pop(canonical(words[0]), None)
        for number, words in enumerate(named):
            flags[f"{canonical(words[0])} {number}"] = words  # one flag may come several times in a group
    return [word for words in flags.values() for word in words]


def value_of(words: Sequence[str], flag: str) -> str | None:
    """The value that a command line gives a flag at last; None when it does not name it."""
    found = None
    for number, word in enumerate(words):
        name, equals, inline = word.partition("=")
        if word.startswith("-") and canonical(name) == flag:
            found = inline if equals else (words[number + 1] if number + 1 < len(words) else "")
    return found


_AMOUNT = re.compile(r"([0-9]{1,12})([KMGT]?)|([0-9]{1,12}(?:\.[0-9]{1,6})?)([kmgt])")  # as vLLM reads them
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def overridden(wishes: Wishes, model: ModelFacts, words: Sequence[str]) -> tuple[Wishes, ModelFacts]:
    """What later words of the command line (the router's, then the operator's) change in what is sized. Values that
    are no numbers are left to vLLM to judge."""

    def number(flag: str, otherwise: int | None) -> int | None:
        found = _AMOUNT.fullmatch(value_of(words, flag) or "")
        if not found:
            return otherwise
        whole, binary, fraction, decimal = found.groups(default="")
        told = int(whole) << 10 * _POWERS[binary.lower()] if whole else int(float(fraction) * 1000 ** _POWERS[decimal])
        return told or otherwise

    def fraction(flag: str, otherwise: float) -> float:
        word = value_of(words, flag) or ""
        return float(word) if re.fullmatch(r"[0-9]{0,6}\.?[0-9]{1,6}", word) else otherwise

    wishes = replace(
        wishes,
        max_model_len=number("--max-model-len", wishes.max_model_len),
        tensor_parallel=number("--tensor-parallel-size", None) or wishes.tensor_parallel,
        pipeline_parallel=number("--pipeline-parallel-size", None) or wishes.pipeline_parallel,
        batched_tokens=number("--max-num-batched-tokens", wishes.batched_tokens),
        utilization=fraction("--gpu-memory-utilization", wishes.utilization),
        quantization=value_of(words, "--quantization") or wishes.quantization,
        elsewhere_bytes=int(fraction("--cpu-offload-gb", 0.0) * GIB),
        kv_bytes=number("--kv-cache-memory-bytes", wishes.kv_bytes),
    )
    if DTYPE_BYTES.get(value_of(words, "--dtype") or "", 2.0) == 4.0 and model.quantization is None:
        doubled = {name: getattr(model, name) * 2 for name in ("weights_bytes", "first_bytes", "last_bytes")}
        model = replace(model, dtype_bytes=4.0, draft_bytes=model.draft_bytes * 2, **doubled)
    kept = value_of(words, "--kv-cache-dtype") or ""
    if kept.startswith("fp8") or kept in DTYPE_BYTES:
        model = replace(model, dtype_bytes=DTYPE_BYTES.get(kept, 1.0))
    return wishes, model


def told_on_cpu(
    wishes: Wishes, model: ModelFacts, hardware: Hardware, words: Sequence[str], env: Mapping[str, str]
) -> Wishes:
    """The operator's say about a CPU's KV cache: VLLM_CPU_KVCACHE_SPACE, which vLLM lets win, else its size, else the
    share of the memory for a rank, of which vLLM takes off what the rank holds already."""
    if (space := env.get("VLLM_CPU_KVCACHE_SPACE", "")).isdecimal():
        return replace(wishes, kv_bytes=int(space) * GIB)
    if wishes.kv_bytes is not None or value_of(words, "--gpu-memory-utilization") is None:
        return wishes
    held = model.rank_bytes(*wishes.split) + CPU_RANK_OVERHEAD
    return replace(wishes, kv_bytes=max(0, int(hardware.memory_bytes * wishes.utilization) - held))


def known_flags(help_text: str) -> frozenset[str]:
    """Flags that `vllm serve --help=all` lists: words with two dashes at the beginning of an option's entry."""
    flags: set[str] = set()
    for line in help_text.splitlines():
        if re.match(r" {1,6}-", line):
            flags.update(re.findall(r"(?<![\w-])--[a-z0-9][a-z0-9-]*", re.split(r"  +", line.strip())[0]))
    return frozenset(flags)
