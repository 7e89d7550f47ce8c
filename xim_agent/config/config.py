"""Raw words → `Config`: types, ranges and cross-field rules, each error naming option, value and what is allowed."""

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from xim_agent.config.fields import OPTIONS, PREFIX, Config, Option
from xim_agent.config.mask import HIDDEN, masked_arguments, masked_pairs
from xim_agent.errors import AgentError, Exit

MOST = 10**12  # of a number without a bound of its own: infinity and what overflows later are refused
_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}


@dataclass(frozen=True)
class Raw:
    """One setting as given: the word (or words of a repeated flag) and where it came from, for the error."""

    value: str | tuple[str, ...]
    origin: str


def _bad(option: Option, raw: Raw, why: str) -> AgentError:
    return AgentError(
        "config_invalid",
        f"{raw.origin}: {_shown(option, raw)} {why}",
        hint=f"{option.flag} / {option.env}: {option.meta['help']}",
        exit_code=Exit.CONFIG,
    )


def _shown(option: Option, raw: Raw) -> str:
    words = (raw.value,) if isinstance(raw.value, str) else raw.value
    if option.meta["secret"] or option.meta["repeat"]:  # a list of words may hold secrets, and cannot be told apart
        return HIDDEN
    return f"`{' '.join(words)}`"


def _number(option: Option, raw: Raw, word: str) -> int | float:
    try:
        value = option.kind(word)
    except ValueError:
        raise _bad(option, raw, "is no whole number" if option.kind is int else "is no number") from None
    low, high = option.meta["low"], option.meta["high"]
    low, high = (-MOST if low is None else low), (MOST if high is None else high)
    if not low <= value <= high:  # NaN too
        raise _bad(option, raw, f"is out of range: must be between {low} and {high}")
    return value  # type: ignore[no-any-return]


def _words(option: Option, raw: Raw) -> tuple[str, ...]:
    try:
        words = tuple(raw.value) if isinstance(raw.value, tuple) else tuple(shlex.split(raw.value))
    except ValueError as error:
        raise _bad(option, raw, f"cannot be split as a shell does: {error}") from None
    if option.meta["repeat"] == "pair":
        for number, word in enumerate(words, 1):
            if "=" not in word[1:]:
                raise _bad(option, raw, f"has a word (number {number}) which is not KEY=VALUE")
    return words


def _is_text(word: str) -> bool:
    """Bytes of the environment that are no UTF-8 come as surrogates; only paths may have them."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


def _value(option: Option, raw: Raw) -> Any:
    if option.kind is tuple:
        return _words(option, raw)
    word = raw.value if isinstance(raw.value, str) else raw.value[-1]
    if option.kind is str and not _is_text(word):
        raise _bad(option, Raw(word.encode(errors="replace").decode(), raw.origin), "is not UTF-8 text")
    if option.kind is bool:
        if word.lower() not in _TRUE | _FALSE:
            raise _bad(option, raw, "is neither true nor false (1, true, yes, on; 0, false, no, off)")
        return word.lower() in _TRUE
    if option.kind in (int, float):
        return _number(option, raw, word)
    if option.choices and word not in option.choices:
        raise _bad(option, raw, f"is none of {', '.join(option.choices)}")
    return Path(word) if option.kind is Path else word


def parse(raw: Mapping[str, Raw], home: Path, cwd: Path | None = None) -> Config:
    """`raw` by attribute name; paths that begin with `~` are put below `home`, relative ones below `cwd`.

    Raises AgentError (exit 78), without `cwd` for every relative path: vLLM runs in another directory than the agent.
    """
    values: dict[str, Any] = {}
    for option in OPTIONS:
        value = _value(option, raw[option.attr]) if option.attr in raw else option.default
        if isinstance(value, Path) and value.parts[:1] == ("~",):
            value = home.joinpath(*value.parts[1:])
        if isinstance(value, Path) and not value.is_absolute():
            if cwd is None:
                raise _bad(option, raw.get(option.attr, Raw(str(value), option.env)), "is no absolute path")
            value = cwd / value
        values[option.attr] = value
    for attr, file in (("join_key", "join_key_file"), ("vllm_salt_secret", "vllm_salt_secret_file")):
        if attr in raw and file in raw:
            raise AgentError(
                "config_conflict",
                f"{raw[attr].origin} and {raw[file].origin} are both set",
                hint="keep the file and remove the other",
                exit_code=Exit.CONFIG,
            )
    return Config(**values)


def unknown_variables(names: list[str]) -> list[str]:
    """One warning for each `XEROTIER_AGENT_*` variable that is none of ours, with the nearest known name."""
    known = [option.env for option in OPTIONS]
    warnings = []
    for name in sorted(n for n in names if n.startswith(PREFIX) and n not in known):
        near = get_close_matches(name, known, n=1)
        warnings.append(f"{name} is not a setting of the agent" + (f"; did you mean {near[0]}?" if near else ""))
    return warnings


def describe(config: Config) -> dict[str, Any]:
    """Settings for `status` and support: of secrets and of what the operator gives vLLM in secret only the names."""
    values = asdict(config)
    for option in OPTIONS:
        if option.meta["secret"] and values[option.attr] is not None:
            values[option.attr] = HIDDEN
        elif isinstance(values[option.attr], Path):
            values[option.attr] = str(values[option.attr])
    values["vllm_args"] = masked_arguments(config.vllm_args)
    values["vllm_env"] = masked_pairs(config.vllm_env)
    return values
