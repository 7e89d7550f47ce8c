"""What transfers and evictions did: the lines of the log and the figures of metrics and `status`."""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from xim_agent.cache.inventory import Evict, Inventory
from xim_agent.cache.plan import STALE, Limits
from xim_agent.cache.transfer import Counters
from xim_agent.clock import Clock
from xim_agent.mesh.messages import ModelRef, Progress

log = logging.getLogger("xim_agent.cache")

Reason = Literal["damaged", "unused", "other_vllm", "stale", "bound", "disk", "operator"]


@dataclass(frozen=True)
class Cause:
    """`age`: seconds since the last use of what goes; None where nothing used it."""

    reason: Reason
    age: float | None = None


def cause(step: Evict, inventory: Inventory, limits: Limits) -> Cause:
    """Why a plan made of these evicts: `bound` or `disk`, whichever leaves less, unless it goes for its own sake."""
    if step.what == "quarantine":
        return Cause("damaged")
    if step.what == "orphans":
        return Cause("unused")
    if step.what == "compile":
        return Cause("other_vllm")
    age = age_of(step, inventory, limits.now)
    if step.what == "partial" and age is not None and age > STALE:
        return Cause("stale", age)
    left = limits.bound - inventory.total
    return Cause("bound" if left <= limits.disk_free - limits.reserve else "disk", age)


def age_of(step: Evict, inventory: Inventory, now: float) -> float | None:
    used = inventory.partials if step.what == "partial" else inventory.models
    return max(0.0, now - used[step.key].used) if step.key in used else None


@dataclass
class Ledger:
    """Since the start of the process. Synchronous; may be told from any thread."""

    counters: Counters
    clock: Clock
    evictions: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    evicted_bytes: Counter[str] = field(default_factory=Counter)
    last_age: float | None = None
    progress: Progress | None = None

    def evicted(self, step: Evict, why: Cause, name: str) -> None:
        """`name`: of the model, for the line in the log."""
        self.evictions[step.what][why.reason] += 1
        self.evicted_bytes[step.what] += step.bytes
        extra: dict[str, object] = {"what": step.what, "reason": why.reason, "bytes": step.bytes}
        if step.key:
            extra |= {"model": name} if name else {"key": step.key}
        if why.age is not None:
            self.last_age = why.age
            extra["unused_seconds"] = round(why.age)
        log.info("evicted", extra=extra)

    @property
    def seconds_left(self) -> float | None:
        p = self.progress
        return (p.total - p.done) / p.rate if p is not None and p.rate > 0 else None

    @contextmanager
    def transfer(self, model: ModelRef) -> Iterator[None]:
        """The first and the last line of a transfer, the last one also when it fails or is cancelled."""
        start, network, hits = self.clock.now(), self.counters.network_bytes, self.counters.hit_bytes
        extra = {"model": model.name, "revision": model.revision, "bytes": model.size_bytes}
        log.info("transfer begins", extra=extra)
        ready = False
        try:
            yield
            ready = True
        finally:
            seconds = max(self.clock.now() - start, 0.001)
            figures = {
                "network_bytes": self.counters.network_bytes - network,
                "hit_bytes": self.counters.hit_bytes - hits,
                "seconds": round(seconds, 1),
            }
            if ready:
                speed = {"mb_per_s": round(model.size_bytes / seconds / 1e6, 1)}
                log.info("model is ready in the cache", extra=extra | figures | speed)
            else:
                log.info("transfer stopped before its end", extra=extra | figures)
