"""What the work side reports of itself."""

from dataclasses import dataclass

from xim_agent.work.outbox import OutboxStatistics
from xim_agent.work.outgoing import RequestPhase


@dataclass(frozen=True)
class Running:
    """A request; `bytes` of its answer so far."""

    request: str
    path: str
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Request:
    """A lease that is held. `seconds` since it came, `bytes` of the answer and the `chunks` they came in."""

    request: str
    lease: int
    path: str
    seconds: float
    phase: RequestPhase
    bytes: int
    chunks: int


@dataclass(frozen=True)
class SenderStatistics:
    """`ended` by reason or error code; `running`: leases whose request is not over; `held`: not acknowledged yet."""

    accepted: int
    refused: int
    ended: dict[str, int]
    running: int
    held: int
    calls: int
    failed_calls: int
    oldest_running_seconds: float
    longest: Running | None
    outbox: OutboxStatistics


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
