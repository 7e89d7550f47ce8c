"""Where settings come from: flag over environment over file; an empty one counts as unset."""

import logging
import os
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from xim_agent.config.config import Raw, parse, unknown_variables
from xim_agent.config.fields import OPTIONS, PREFIX, Config, Option
from xim_agent.errors import AgentError, Exit

log = logging.getLogger("xim_agent.config")

Flags = Mapping[str, str | tuple[str, ...] | bool | None]


def load(
    flags: Flags,
    environ: MutableMapping[str, str],
    defaults: Mapping[str, str] | None = None,
) -> Config:
    """Reads everything once and takes secrets out of `environ`, so that no child inherits them.

    `defaults` replace the table's (used by `local`). Raises AgentError (exit 78), also for an unreadable secret file;
    the join key's is left to `join_key`, because an enrolled agent needs none.
    """
    raw: dict[str, Raw] = {attr: Raw(word, "built-in default") for attr, word in (defaults or {}).items()}
    for option in OPTIONS:
        given = _given(option, flags, environ)
        if option.meta["secret"]:
            environ.pop(option.env, None)
            if given is not None and given.origin == option.flag:
                log.warning(f"{option.flag} shows the secret in the process list; use {option.env}_FILE")
        if given is not None:
            raw[option.attr] = given
    for warning in unknown_variables(list(environ)):
        log.warning(warning)
    _take_secret(raw, "vllm_salt_secret", environ)
    try:
        _take_secret(raw, "join_key", environ)
    except AgentError as error:
        log.debug(f"join key not read yet: {error.message}")
    cwd = None
    with suppress(OSError):  # it may have been removed
        cwd = Path.cwd()
    return parse(raw, Path(environ.get("HOME") or Path.home()), cwd)


def alone(attr: str, flags: Flags, environ: Mapping[str, str]) -> Any:
    """One setting by itself, whatever is wrong with the others; of a wrong word of its own the default."""
    option = next(option for option in OPTIONS if option.attr == attr)
    given = _given(option, flags, environ)
    try:
        return getattr(parse({attr: given} if given else {}, Path("/"), Path("/")), attr)
    except AgentError:
        return option.default


def _given(option: Option, flags: Flags, environ: Mapping[str, str]) -> Raw | None:
    given, word = flags.get(option.attr), environ.get(option.env, "")
    if isinstance(given, str) and not given.strip():  # `--model-cache-path "$UNSET"` would be the current directory
        given = None
    if given is not None and given != () and given is not False:
        value = ("0" if option.meta["off_flag"] else "1") if given is True else given
        return Raw(value, option.flag)
    return Raw(word, option.env) if word.strip() else None


def join_key(config: Config) -> str | None:
    """The key's text. Raises AgentError (exit 78) when its file still cannot be read."""
    if config.join_key is None and config.join_key_file is not None:
        return _read(config.join_key_file, PREFIX + "JOIN_KEY_FILE") or None
    return config.join_key


def _take_secret(raw: dict[str, Raw], attr: str, environ: Mapping[str, str]) -> None:
    """A secret named by `…_FILE`, else a systemd credential of the option's name, becomes the secret itself."""
    file = f"{attr}_file"
    credential = Path(environ.get("CREDENTIALS_DIRECTORY") or "/nonexistent") / attr.replace("_", "-")
    if attr in raw:
        return
    if file not in raw:
        if not credential.is_file():
            return
        raw[file] = Raw(str(credential), "$CREDENTIALS_DIRECTORY")
    path = Path(str(raw[file].value))
    if text := _read(path, raw[file].origin):
        del raw[file]
        raw[attr] = Raw(text, str(path))


def _read(path: Path, origin: str) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        # A RuntimeError is what Path raises for ~nobody.
        reason = error.strerror if isinstance(error, OSError) else "is not text"
        reason = str(error) if isinstance(error, RuntimeError) else reason
        raise AgentError(
            "secret_unreadable",
            f"{origin}: cannot read {path}: {reason}",
            hint=f"make it readable for uid {os.getuid()}, or unset {origin}",
            exit_code=Exit.CONFIG,
        ) from error
