"""What a poll says about us, and whether a held one must be replaced because that has changed."""

from dataclasses import dataclass

from xim_agent.mesh.messages import MAX_WAIT_MS, Condition, Phase, Progress

# A lease of next to no life must not make us poll without a pause.
SHORTEST_MS = 100


@dataclass(frozen=True)
class View:
    """What the router is told. `running`: leases not ended yet; `closed`: takes nothing for now (a model switch)."""

    ready: bool
    degraded: bool
    draining: bool
    closed: bool
    ceiling: int
    running: int
    health: tuple[Condition, ...]
    progress: Progress | None

    @property
    def phase(self) -> Phase:
        if self.draining:
            return "draining"
        if self.degraded:
            return "degraded"
        return "ready" if self.ready else "starting"

    @property
    def capacity(self) -> int:
        """Leases it will take now."""
        return 0 if self.phase != "ready" or self.closed else max(0, self.ceiling - self.running)


def wait_ms(view: View, *, sure: bool, shortest_ttl: float | None) -> int:
    """How long the router may hold the poll. `shortest_ttl` in seconds.

    Unless we are `sure` that it answers and lets us work, not at all: the answer is the proof that all is well again.
    """
    if not sure:
        return 0
    longest = MAX_WAIT_MS if view.capacity else 5_000
    return longest if shortest_ttl is None else min(longest, max(SHORTEST_MS, int(shortest_ttl * 1000 / 3)))


def must_replace(told: View, now: View) -> bool:
    """At once: the router would give us work that we refuse, or none although we could take some."""
    return told.phase != now.phase or (told.capacity == 0) != (now.capacity == 0)


def may_replace(told: View, now: View) -> bool:
    """When it has not been done a moment ago: only what people look at has changed."""
    return told.progress != now.progress or told.health != now.health
