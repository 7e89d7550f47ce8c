"""What the identity hands to the other parts: a token to call with, and numbers to look at."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Bearer:
    """Where to call, and what to say there."""

    router: str
    token: str = field(repr=False)
    agent_id: str


@dataclass(frozen=True)
class IdentityStatistics:
    """Times are Unix seconds; texts are empty before the first enrollment; `failures` by code."""

    agent_id: str
    worker_id: str
    project: str
    region: str
    router: str
    enrolled: bool
    token_expires: float | None
    last_refresh: float | None
    enrollments: int
    refreshes: int
    failures: dict[str, int]
