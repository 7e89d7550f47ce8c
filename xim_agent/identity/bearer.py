"""What the identity hands to the other parts: a token to call with, and numbers to look at."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import trio

from xim_agent.identity.claims import Claims
from xim_agent.watch import Watch


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


class Tokens:
    """The token in use and when it ends: in trio's time, because a wall clock may be off or step."""

    def __init__(self) -> None:
        self.current: Bearer | None = None
        self.claims: Claims | None = None
        self._ends = 0.0
        self._changed = Watch()

    async def wait(self) -> Bearer:
        """Until there is one that has not ended."""
        while self.current is None or trio.current_time() >= self._ends:
            await self._changed.wait_beyond(self._changed.version)
        return self.current

    def publish(self, token: str, claims: Claims, router: str, seconds: float) -> None:
        """`seconds`: what is left of its life."""
        self.current, self.claims = Bearer(router, token, claims.agent_id), claims
        self._ends = trio.current_time() + seconds
        self._changed.bump()

    def drop(self) -> None:
        self.current = None

    def next_router(self, routers: Sequence[str]) -> None:
        """The one in use gives no answer."""
        if (now := self.current) is not None and now.router in routers:
            self.current = replace(now, router=routers[(routers.index(now.router) + 1) % len(routers)])
