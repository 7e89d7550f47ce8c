"""409 identity_in_use: two processes run with one identity. Both are told; the one that started later ends."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

# Unix seconds between 2001 and 5138: milliseconds are above, a clock that was never set is below.
_FIRST, _LAST = 1e9, 1e11


@dataclass(frozen=True)
class Clone:
    """`later`: the other one started after us; None when the reply does not say. `sure`: by one clock, the router's."""

    message: str
    later: bool | None
    sure: bool = False


def clone(problem: Mapping[str, Any], started: float) -> Clone:
    """The problem's `address` and `start` are the other one's, `yours` is our own start by the router's clock.

    `started`: the same by our clock, where `yours` is missing.
    """
    message = f"this identity also runs at {problem.get('address') or 'another address'}"
    start, yours = _moment(problem.get("start")), _moment(problem.get("yours"))
    if start is None:
        return Clone(message, None)
    message += f", since {datetime.fromtimestamp(start, UTC):%Y-%m-%d %H:%M:%S} UTC"
    return Clone(message, start > (started if yours is None else yours), sure=yours is not None)


def _moment(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and _FIRST < value < _LAST else None
