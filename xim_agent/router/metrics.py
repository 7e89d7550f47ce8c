"""What the router's metrics port tells of the fleet and of clients' requests."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

from xim_agent import PROTOCOL, __version__
from xim_agent.clock import Clock
from xim_agent.router.dashboard.view import agent_view
from xim_agent.router.dispatch import Dispatch
from xim_agent.router.sql import rows
from xim_agent.router.store import Store

STATES = ("pending", "online", "draining", "suspended", "disconnected", "dead")


@dataclass(frozen=True)
class Report:
    """`queued` by project and model; `agents` by state, `tokens_per_second` by model, as the agents say it."""

    version: str
    protocol: int
    started: float
    agents: dict[str, int]
    queued: dict[str, dict[str, int]]
    queued_bytes: int
    oldest_queued_seconds: float
    running: int
    tokens_per_second: dict[str, float]
    counts: Counter[str]

    @property
    def leases(self) -> int:
        return self.counts["leases"]

    @property
    def retries(self) -> int:
        return self.counts["retries"]

    @property
    def offered_again(self) -> int:
        return self.counts["offered_again"]


def parts(store: Store, dispatch: Dispatch, clock: Clock) -> dict[str, Callable[[], Any]]:
    """For `metrics.registry.Collector`, with the router's table. Asked, they raise sqlite3.Error."""
    started = clock.now()
    return {"router": lambda: report(store, dispatch, clock, started), "times": lambda: dispatch.board.times}


def report(store: Store, dispatch: Dispatch, clock: Clock, started: float) -> Report:
    """Raises sqlite3.Error."""
    now, wall, board = trio.current_time(), clock.now(), dispatch.board
    agents, tokens = dict.fromkeys(STATES, 0), Counter[str]()
    for row in rows(store.db, "SELECT * FROM agents WHERE state != 'removed'"):
        known = dispatch.agents.get(row["agent_id"])
        seen = agent_view(row, known, None, now=now, wall=wall, limits=dispatch.limits)
        agents[seen["status"]] = agents.get(seen["status"], 0) + 1
        if seen["status"] in ("online", "draining") and seen["model"]:
            tokens[seen["model"]] += seen["tokens_per_s"] or 0
    queued: dict[str, dict[str, int]] = {}
    for project, model in board.queues.waiting():
        queued.setdefault(project, {})[model] = board.queues.length((project, model))
    return Report(
        version=__version__,
        protocol=PROTOCOL,
        started=started,
        agents=agents,
        queued=queued,
        queued_bytes=board.queues.bytes,
        oldest_queued_seconds=max((now - job.queued_since for job in board.queues.jobs()), default=0.0),
        running=sum(len(agent.grants) for agent in dispatch.agents.values()),
        tokens_per_second=dict(tokens),
        counts=board.counts,
    )
