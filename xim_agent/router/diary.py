"""What changed with each agent and when, noticed from its polls. Pure; `now` is monotonic seconds.

The last `KEPT` of each agent are in memory. Those that matter a day later are also waiting to be written to the
database, where chronicle.py keeps them with what operators did.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from xim_agent.router.fleet import Agent
from xim_agent.router.jobs import Limits
from xim_agent.text import printable

KEPT = 100  # of each agent in memory, and as many that were not written yet
KEEP_TEXT = 300
LASTING = frozenset({"enrolled", "connected", "disconnected", "restarted", "assigned", "serving", "engine_failed"})


class Event(NamedTuple):
    """`kind`: stable snake case; `text`: a sentence's end for people, in part as the agent put it. `turn`: orders those
    of one moment.
    """

    at: float
    turn: int
    kind: str
    text: str


@dataclass
class _Page:
    """What an agent said last, and what it had to say before."""

    boot: str | None = None
    phase: str = ""
    health: frozenset[str] = frozenset()
    serves: str | None = None
    assigned: tuple[int, str | None] = (0, None)
    connected: bool = False
    left: bool = False
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=KEPT))
    unwritten: deque[Event] = field(default_factory=lambda: deque(maxlen=KEPT))


class Diary:
    """Pages by agent."""

    def __init__(self) -> None:
        self._pages: dict[str, _Page] = {}
        self._unwritten: set[str] = set()
        self._turns = count()

    def note(self, agent_id: str, now: float, kind: str, text: str) -> None:
        page = self._pages.setdefault(agent_id, _Page())
        event = Event(now, next(self._turns), kind, printable(text[:KEEP_TEXT]))
        if kind in LASTING:
            page.unwritten.append(event)
            self._unwritten.add(agent_id)
        else:
            page.events.append(event)

    def polled(self, agent: Agent, now: float) -> None:
        """Compares what an agent says now with what it said last."""
        page = self._pages.setdefault(agent.id, _Page())
        assigned = (agent.duty.generation, agent.duty.assigned)
        if not page.connected:
            self.note(agent.id, now, "connected", f"{agent.phase}; {assigned[1] or 'no model'} is assigned")
        else:
            if agent.boot != page.boot:
                self.note(agent.id, now, "restarted", "a new process of it polls")
            if assigned != page.assigned:
                self.note(agent.id, now, "assigned", assigned[1] or "no model any more")
            if agent.serves != page.serves:
                self.note(agent.id, now, "serving", agent.serves or f"no model any more, was {page.serves}")
            if agent.phase != page.phase:
                self.note(agent.id, now, "phase", f"{agent.phase}, was {page.phase}")
        page.connected, page.left, page.boot, page.phase = True, False, agent.boot, agent.phase
        page.assigned, page.serves = assigned, agent.serves
        if agent.health or page.health:
            self._health(agent, page, now)

    def _health(self, agent: Agent, page: _Page, now: float) -> None:
        found = {condition.code[:KEEP_TEXT]: condition.text for condition in agent.health}
        for code, text in found.items():
            if code not in page.health:
                engine = code == "engine_failed"
                self.note(agent.id, now, code if engine else "health", text if engine else f"{code}: {text}")
        for code in sorted(page.health - found.keys()):
            self.note(agent.id, now, "health_over", f"{code} is over")
        page.health = frozenset(found)

    def silent(self, agents: dict[str, Agent], now: float, limits: Limits) -> None:
        """To be called every second or oftener: who has not been heard for so long that it counts as disconnected?"""
        long = limits.disconnected
        for agent in agents.values():
            page = self._pages.get(agent.id) if agent.poll is None and now - agent.heard >= long else None
            if page is not None and page.connected:
                page.connected = False
                self.note(agent.id, agent.heard + long, "disconnected", f"not heard for {long:g} s")

    def left(self, agent_id: str) -> None:
        """It was removed, or its credential was revoked; should it come back, that is a new beginning."""
        if page := self._pages.get(agent_id):
            page.left, page.connected, page.health = True, False, frozenset()
            if not page.unwritten:
                del self._pages[agent_id]

    def of(self, agent_id: str) -> list[Event]:
        """What is in memory only, in the order of its times."""
        page = self._pages.get(agent_id)
        return sorted([*page.events, *page.unwritten]) if page else []

    def unwritten(self) -> Iterator[tuple[str, Event]]:
        for agent_id in self._unwritten:
            for event in self._pages[agent_id].unwritten:
                yield agent_id, event

    def written(self) -> None:
        """All that `unwritten` gave is in the database now."""
        for agent_id in self._unwritten:
            self._pages[agent_id].unwritten.clear()
            if self._pages[agent_id].left:
                del self._pages[agent_id]
        self._unwritten.clear()
