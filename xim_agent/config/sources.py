"""Where settings come from: flag over environment over file; an empty variable counts as unset."""

import logging
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from xim_agent.config.config import Raw, parse, unknown_variables
from xim_agent.config.fields import OPTIONS, Config
from xim_agent.errors import AgentError, Exit

log = logging.getLogger("xim_agent.config")


def load(
    flags: Mapping[str, str | tuple[str, ...] | bool | None],
    environ: MutableMapping[str, str],
    defaults: Mapping[str, str] | None = None,
) -> Config:
    """Reads everything once and takes secrets out of `environ`, so that no child inherits them.

    `defaults` replace the table's (used by `local`). Raises AgentError (exit 78), also for an unreadable secret file.
    """
    raw: dict[str, Raw] = {attr: Raw(word, "built-in default") for attr, word in (defaults or {}).items()}
    for option in OPTIONS:
        given = flags.get(option.attr)
        word = environ.get(option.env, "")
        if option.meta["secret"]:
            environ.pop(option.env, None)
        if given is not None and given != () and given is not False:
            if option.meta["secret"]:
                log.warning(f"{option.flag} shows the secret in the process list; use {option.env}_FILE")
            value = ("0" if option.meta["off_flag"] else "1") if given is True else given
            raw[option.attr] = Raw(value, option.flag)
        elif word.strip():
            raw[option.attr] = Raw(word, option.env)
    for warning in unknown_variables(list(environ)):
        log.warning(warning)
    for attr in ("join_key", "vllm_salt_secret"):
        _read_secret(raw, attr, environ)
    return parse(raw, Path(environ.get("HOME") or Path.home()))


def _read_secret(raw: dict[str, Raw], attr: str, environ: Mapping[str, str]) -> None:
    """A secret named by `…_FILE`, else a systemd credential of the option's name, becomes the secret itself."""
    credential = Path(environ.get("CREDENTIALS_DIRECTORY") or "/nonexistent") / attr.replace("_", "-")
    named = raw.get(f"{attr}_file")
    if attr in raw:
        return
    path = Path(str(named.value)) if named else credential
    if not named and not credential.is_file():
        return
    try:
        text = path.expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        origin = named.origin if named else "$CREDENTIALS_DIRECTORY"
        reason = error.strerror if isinstance(error, OSError) else "is not text"
        raise AgentError(
            "secret_unreadable",
            f"{origin}: cannot read {path}: {reason}",
            hint=f"make it readable for uid {os.getuid()}, or unset {origin}",
            exit_code=Exit.CONFIG,
        ) from error
    if text:
        raw.pop(f"{attr}_file", None)
        raw[attr] = Raw(text, str(path))
