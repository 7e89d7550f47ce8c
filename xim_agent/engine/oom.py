"""Whether the kernel has killed for want of memory around the time an engine ended. Pure."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

# Of this cgroup (container, unit) and of the whole machine: processes that the OOM killer has ended so far.
Counts = tuple[int, int]
Where = Literal["", "cgroup", "machine"]
# An API server may outlive its killed core: then the end is seen only when the engine counts as hung.
LATELY_SECONDS = 30.0


@dataclass
class OomKills:
    """`read`: blocking, microseconds. `within`: seconds that an end may come after its cause."""

    read: Callable[[], Counts]
    within: float = LATELY_SECONDS
    _seen: Counts | None = None
    _at: dict[Where, float] = field(default_factory=dict)

    def look(self, now: float) -> None:
        """Once at the start, then as often as is wanted to date a kill."""
        counts = self.read()
        before, self._seen = self._seen or counts, counts
        if counts[0] > before[0]:
            self._at["cgroup"] = now
        if counts[1] > before[1]:
            self._at["machine"] = now

    def lately(self, now: float) -> Where:
        """ "machine": it may have been another program; ours, when one of ours was killed."""
        self.look(now)
        for where in ("cgroup", "machine"):
            if now - self._at.get(where, float("-inf")) <= self.within:
                return where
        return ""
