"""What a lease asks for, whether it is taken, and how long it holds. Times are seconds of one monotonic clock."""

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter, itemgetter

from xim_agent.mesh.messages import MAX_BODY, SERVED_PATHS, Error, Lease, OddLease
from xim_agent.mesh.trace import traced

_REQUEST_HEADERS = frozenset({"content-type", "accept", "traceparent", "tracestate"})
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}")
# Without what ends a line: nobody adds a header, or a request, to those of the engine's connection.
_VALUE = re.compile(r"(?:[!-~](?:[\t -~]{0,8190}[!-~])?)?")
_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding"}
    | {"upgrade", "date", "server", "content-length"}
)


def refusal(lease: Lease, *, room: int, ready: bool, draining: bool) -> Error | None:
    """None when the lease is taken. `room`: how many more the poll that brought it offered to take."""
    if isinstance(lease, OddLease):
        return Error("invalid_request", f"the lease cannot be read: {lease.flaw:.200}", retryable=False)
    if lease.method != "POST" or lease.path not in SERVED_PATHS:
        return Error("invalid_request", f"{lease.method:.16} {lease.path:.200} is not served", retryable=False)
    if lease.body is not None and len(lease.body) > MAX_BODY:
        return Error("invalid_request", f"the body has {len(lease.body)} bytes, over {MAX_BODY}", retryable=False)
    for name, value in lease.headers.items():
        if passes(name.lower()) and not (_NAME.fullmatch(name) and _VALUE.fullmatch(value)):
            what = f"the header {name!r:.100} has a name or a value that cannot be sent on"
            return Error("invalid_request", what, retryable=False)
    if draining:
        return Error("draining", "the agent is stopping", retryable=True)
    if not ready:
        return Error("engine_overloaded", "the engine is not ready", retryable=True)
    if room <= 0:
        return Error("engine_overloaded", "more leases than capacity", retryable=True)
    return None


def request_headers(headers: Mapping[str, str], request: str) -> dict[str, str]:
    """Of a lease's headers those that reach the engine, always with a `traceparent`."""
    lower = {name.lower(): value for name, value in headers.items()}
    return traced({n: v for n, v in lower.items() if passes(n)}, request)


def passes(name: str) -> bool:
    return name in _REQUEST_HEADERS or name.startswith("x-slo-")


def reply_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Of the engine's headers those that reach the client; also without what its `connection` header names."""
    lower = {name.lower(): value for name, value in headers.items()}
    named = {n.strip().lower() for n in lower.get("connection", "").split(",")}
    return {n: v for n, v in lower.items() if n not in _HOP_BY_HOP and n not in named}


@dataclass
class _Held:
    ttl: float
    renewed: float


_TTL = attrgetter("ttl")


class Leases:
    """Every lease from its receipt until its ending is acknowledged, and the ids of all that ever were."""

    def __init__(self) -> None:
        self._held: dict[int, _Held] = {}
        # Since `lapsed` was asked last, once a second: 60 calls a second name hundreds of leases each.
        self._renewals: list[tuple[float, Iterable[int]]] = []
        self._seen = IdSet()

    def __len__(self) -> int:
        return len(self._held)

    def receive(self, lease: Lease, sent_at: float) -> bool:
        """False for an id that was here before, which is ignored. `sent_at`: when the poll that brought it left."""
        if lease.id in self._seen:
            return False
        self._seen.add(lease.id)
        self._held[lease.id] = _Held(max(1, lease.ttl_ms) / 1000, sent_at)
        return True

    def settle(self, lease: int) -> None:
        """Its ending is acknowledged, or the router does not know it."""
        self._held.pop(lease, None)

    def held(self) -> list[int]:
        return list(self._held)

    def renew(self, leases: Iterable[int], sent_at: float) -> None:
        """`sent_at`: when a call that names them left, known once it was answered. `leases` is kept, not copied."""
        self._renewals.append((sent_at, leases))

    def lapsed(self, now: float) -> list[int]:
        self._apply_renewals()
        return [lease for lease, held in self._held.items() if now > held.renewed + held.ttl]

    def shortest_ttl(self) -> float | None:
        """Seconds; None when nothing is held."""
        return min(map(_TTL, self._held.values()), default=None)

    def _apply_renewals(self) -> None:
        newest: dict[int, float] = {}
        for sent_at, leases in sorted(self._renewals, key=itemgetter(0)):
            newest |= dict.fromkeys(leases, sent_at)
        self._renewals.clear()
        for lease, sent_at in newest.items():
            if (held := self._held.get(lease)) is not None and sent_at > held.renewed:
                held.renewed = sent_at


class IdSet:
    """Ids ever added, as ranges: ids given out in turn cost nothing, whatever the number they start at."""

    def __init__(self) -> None:
        # Sorted, disjoint, not touching: range k is starts[k] <= id < ends[k].
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __contains__(self, lease: int) -> bool:
        k = bisect_right(self._starts, lease) - 1
        return k >= 0 and lease < self._ends[k]

    def add(self, lease: int) -> None:
        if lease in self:
            return
        k = bisect_right(self._starts, lease)
        joins_left = k > 0 and self._ends[k - 1] == lease
        joins_right = k < len(self._starts) and self._starts[k] == lease + 1
        if joins_left and joins_right:
            self._ends[k - 1] = self._ends.pop(k)
            del self._starts[k]
        elif joins_left:
            self._ends[k - 1] = lease + 1
        elif joins_right:
            self._starts[k] = lease
        else:
            self._starts.insert(k, lease)
            self._ends.insert(k, lease + 1)
