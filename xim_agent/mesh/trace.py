"""W3C Trace Context, level 1: which `traceparent` goes on to the engine."""

import hashlib
import re
from collections.abc import Mapping

_PARENT = re.compile(
    r"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-[0-9a-f]{2}(?P<more>-.*)?"
)
MAX_PARENT = 256  # characters; version 00 has 55, later ones may have more


def trace_id(parent: str) -> str | None:
    """None when `parent` is no valid `traceparent`. Of a later version than 00 what may follow is not judged."""
    found = _PARENT.fullmatch(parent) if len(parent) <= MAX_PARENT else None
    if found is None or found["version"] == "ff" or not found["trace"].strip("0") or not found["span"].strip("0"):
        return None
    return None if found["version"] == "00" and found["more"] is not None else found["trace"]


def traced(headers: Mapping[str, str], request: str) -> dict[str, str]:
    """`headers` (lower-case names) with a valid `traceparent`: the caller's, or else one made of the request's id.

    The made one needs no chance, so that router and agent, and whoever reads their logs, come to the same. It is not
    sampled: who wants to see requests sends its own. A `tracestate` without a valid parent means nothing and goes.
    """
    if trace_id(headers.get("traceparent", "")) is not None:
        return dict(headers)
    digest = hashlib.sha256(b"trace|" + request.encode()).hexdigest()
    rest = {name: value for name, value in headers.items() if name not in ("traceparent", "tracestate")}
    return {**rest, "traceparent": f"00-{digest[:32]}-{digest[32:48]}-00"}
