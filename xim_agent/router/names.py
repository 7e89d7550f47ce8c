"""Names that an operator chooses. Pure."""

import re

from xim_agent.errors import AgentError, Exit

_KEY_NAME = 60  # characters


def project_name(name: str) -> str:
    """Raises AgentError `project_invalid`, exit 2."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
        raise AgentError(
            "project_invalid",
            f"{name[:100]!r} is no project name",
            hint="letters, digits, `.`, `_` and `-`, at most 63, the first one a letter or digit",
            exit_code=Exit.USAGE,
        )
    return name


def key_name(name: str) -> str:
    """Of an API key; may be empty. Raises AgentError `key_name_invalid`, exit 2."""
    if len(name) > _KEY_NAME or not name.isprintable() or name != name.strip():
        raise AgentError(
            "key_name_invalid",
            f"{name[:_KEY_NAME]!r} is no name for a key",
            hint=f"at most {_KEY_NAME} printable characters, no space at either end",
            exit_code=Exit.USAGE,
        )
    return name
