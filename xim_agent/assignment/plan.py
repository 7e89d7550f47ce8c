"""What a new assignment means for what runs. Pure."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from xim_agent.mesh.messages import Assignment

RETRY_REFUSED = 600.0  # wire-protocol §4, seconds


@dataclass(frozen=True)
class EngineTarget:
    """What the engine is to serve, from `directory`."""

    assignment: Assignment
    directory: Path


class Change(Enum):
    NONE = "none"
    STOP = "stop"
    RELABEL = "relabel"  # another generation of the same: no lease is disturbed
    SWITCH = "switch"


def change(running: Assignment | None, wanted: Assignment | None) -> Change:
    """`running`: what the engine was last told to serve."""
    if wanted is None:
        return Change.NONE if running is None else Change.STOP
    if running is None or (running.model, running.serving) != (wanted.model, wanted.serving):
        return Change.SWITCH
    return Change.NONE if running.generation == wanted.generation else Change.RELABEL


@dataclass
class Agenda:
    """Which generation to work on next. `handled`: applied, refused or in work; None: the router was never asked."""

    handled: int | None = None
    seen: int | None = None
    retry_at: float | None = None  # when a refused one is tried again

    def news(self) -> bool:
        """The router speaks of another generation than the one that was handled."""
        return self.handled is None or self.seen not in (None, self.handled)

    def due(self, now: float) -> bool:
        return self.news() or (self.retry_at is not None and now >= self.retry_at)

    def take(self, generation: int) -> None:
        self.handled, self.retry_at = generation, None

    def again(self, now: float) -> None:
        """The one that was handled is to be fetched once more."""
        if self.handled is not None:
            self.retry_at = now

    def refuse(self, now: float) -> None:
        self.retry_at = now + RETRY_REFUSED
