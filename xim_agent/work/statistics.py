"""What the work side reports of itself."""

from dataclasses import dataclass

from xim_agent.work.sender import SenderStatistics


@dataclass(frozen=True)
class WorkStatistics:
    """`last_poll` in Unix seconds, of the last answered poll; `idle_reason` is the router's; `paused`: a model switch.

    `drained_by`: who asked to take nothing.
    """

    link_up: bool
    phase: str
    suspended: bool
    draining: bool
    drained_by: list[str]
    paused: bool
    polls: int
    replaced_polls: int
    failed_polls: int
    last_poll: float | None
    idle_reason: str | None
    generation: int
    sender: SenderStatistics
