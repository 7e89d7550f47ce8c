"""The engine's life, and when to start it again.

                     stopped while it starts
                   ┌───────────────────────────┐
                   │                           v
  STOPPED ───> STARTING ─────> READY ─────> DRAINING ───> STOPPED
     │          │     ^          │
     │ a GPU    │     │ after    │ it has ended by itself,
     │ is in    │     │ the      │ hangs, or is said to
     │ trouble  v     │ delay    v have died
     └───────> FAILED ┴──────────┘
                 │
                 └──────> STOPPED   nothing is wanted any more

A change of model or options goes through DRAINING and STOPPED, from FAILED straight to STARTING. How a drained engine
ends makes no difference.
"""

from dataclasses import dataclass, field
from enum import Enum


class EngineState(Enum):
    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


_NEXT = {
    EngineState.STOPPED: {EngineState.STARTING, EngineState.FAILED},
    EngineState.STARTING: {EngineState.READY, EngineState.DRAINING, EngineState.FAILED},
    EngineState.READY: {EngineState.DRAINING, EngineState.FAILED},
    EngineState.DRAINING: {EngineState.STOPPED},
    EngineState.FAILED: {EngineState.STARTING, EngineState.STOPPED},
}


def may_follow(now: EngineState, after: EngineState) -> bool:
    return after in _NEXT[now]


FIRST_DELAY, LONGEST_DELAY = 5.0, 300.0
WINDOW, MOST_FAILURES = 600.0, 5
GOOD_RUN = 60.0  # ready for so long: the crash was not the start's fault, so starting again is worth trying at once


@dataclass
class RestartBudget:
    """Times in seconds of one monotonic clock, given by the caller."""

    failures: list[float] = field(default_factory=list)
    in_a_row: int = 0

    def failed(self, now: float, ready_for: float) -> float:
        """Notes a failure after a run that was ready for so long (0: never). Returns seconds until the next start."""
        self.failures = [t for t in self.failures if now - t < WINDOW] + [now]
        good = ready_for >= GOOD_RUN
        self.in_a_row = 0 if good else self.in_a_row + 1
        if self.degraded(now):
            return LONGEST_DELAY
        return 0.0 if good else min(LONGEST_DELAY, FIRST_DELAY * 2 ** (self.in_a_row - 1))

    def degraded(self, now: float) -> bool:
        """True while five failures lie within the last ten minutes: no work is taken, a start is tried every five."""
        return sum(now - t < WINDOW for t in self.failures) >= MOST_FAILURES

    def reset(self) -> None:
        """For another model or other options: what failed before says nothing about them."""
        self.failures.clear()
        self.in_a_row = 0
