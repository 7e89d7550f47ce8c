"""What the page's forms send, judged member by member: an error names the member, and the page shows it there."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from xim_agent.errors import AgentError, Exit
from xim_agent.router.replies import ApiError

_STATUS: Mapping[int, int] = {Exit.MISSING: 404, Exit.BUSY: 409, Exit.DAMAGED: 409, Exit.STATE: 503}


@contextmanager
def told(param: str | None = None) -> Iterator[None]:
    """An AgentError inside becomes what the page shows. Raises ApiError."""
    try:
        yield
    except AgentError as error:
        text = f"{error.message}; {error.hint}" if error.hint else error.message
        raise ApiError(_STATUS.get(error.exit_code, 400), error.code, text, param=param) from None


def _wrong(name: str, what: str) -> ApiError:
    return ApiError(400, "invalid_request", f"{name}: {what}", param=name)


def text(asked: Mapping[str, Any], name: str, default: str | None = None, most: int = 200) -> str:
    """Printable, of `most` characters at most; without a default it must be there. Raises ApiError 400."""
    value = asked.get(name, default)
    if value is None:
        raise _wrong(name, "it is missing")
    if not isinstance(value, str) or len(value) > most or not value.isprintable():
        raise _wrong(name, f"it must be text of at most {most} printable characters")
    return value


def optional(asked: Mapping[str, Any], name: str) -> str | None:
    """The same; None where it is absent, null or empty."""
    return None if asked.get(name) is None else text(asked, name) or None


def checked(asked: Mapping[str, Any], name: str, check: Callable[[str], str], default: str | None = None) -> str:
    """The same, as `check` wants it, which raises AgentError."""
    value = text(asked, name, default)
    with told(name):
        return check(value)


def whole(asked: Mapping[str, Any], name: str, least: int, most: int, default: int | None = None) -> int:
    """A whole number. Raises ApiError 400."""
    value = asked.get(name, default)
    if value is None:
        raise _wrong(name, "it is missing")
    if type(value) is not int or not least <= value <= most:
        raise _wrong(name, f"it must be a whole number from {least} to {most}")
    return value


def number(path: Mapping[str, Any], name: str) -> int:
    """The number of a row, from a path. Raises ApiError 404."""
    given = str(path[name])
    if not (given.isascii() and given.isdigit() and len(given) <= 18):
        raise ApiError(404, "not_found", f"{given[:60]!r} is no number")
    return int(given)
