"""Agents as the dispatcher knows them: the held poll, what each serves, how busy it is, how it is."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from xim_agent.mesh.messages import Condition, Load, ModelState, Phase, PollRequest, Progress
from xim_agent.router.boots import Boots
from xim_agent.router.jobs import Grant, Limits
from xim_agent.router.lifecycle import lifecycle
from xim_agent.router.series import Series

KEEP_FINISHED = 4096  # ended leases whose resent endings are still acknowledged
MAX_LEASES = 65536


@dataclass(eq=False)
class Poll:
    """A poll being answered; leases put into it count once it is answered.

    `closed`: nothing is put in any more. `turn`: its place among the waiting ones.
    """

    agent: "Agent"
    n: int
    until: float
    room: int
    held: frozenset[int]
    wake: Callable[[], None]
    grants: list[Grant] = field(default_factory=list)
    foreign: list[int] = field(default_factory=list)
    closed: bool = False
    turn: int = -1


@dataclass(frozen=True)
class Duty:
    """What the router wants of an agent, from its database. `serves` is what `model` of its polls is called there."""

    project: str
    generation: int = 0
    assigned: str | None = None
    suspended: bool = False
    drain: bool = False


@dataclass(eq=False)
class Agent:
    """Everything known of an agent since the router started. `serves`: name of the model that answers now."""

    id: str
    duty: Duty
    boots: Boots = field(default_factory=Boots)
    n: int = -1
    phase: Phase = "starting"
    room: int = 0
    ceiling: int = 0
    load: Load = field(default_factory=Load)
    progress: Progress | None = None
    health: list[Condition] = field(default_factory=list)
    model: ModelState | None = None
    versions: dict[str, str] = field(default_factory=dict)
    serves: str | None = None
    heard: float = 0.0
    told: tuple[int, bool] | None = None
    poll: Poll | None = None
    grants: dict[int, Grant] = field(default_factory=dict)
    finished: OrderedDict[int, int] = field(default_factory=OrderedDict)
    foreign_told: float = float("-inf")
    next_lease: int = 1
    series: Series = field(default_factory=Series)

    @property
    def boot(self) -> str | None:
        return self.boots.current.id if self.boots.current else None

    @property
    def key(self) -> tuple[str, str] | None:
        """What it takes work for now; None while it takes none."""
        if self.serves is None or self.phase != "ready" or self.duty.suspended or self.duty.drain:
            return None
        return self.duty.project, self.serves

    @property
    def busy(self) -> float:
        return (len(self.grants) + max(0, self.load.waiting or 0)) / max(1, self.ceiling)

    def silent(self, now: float) -> float:
        """Seconds since it was heard; a held poll is being heard."""
        return 0.0 if self.poll is not None else now - self.heard

    def status(self, now: float, limits: Limits) -> str:
        """Of the lifecycle, but `draining` or `online` where that says `active`."""
        state = "suspended" if self.duty.suspended else "enrolled"
        seen = lifecycle(state, self.silent(now), limits.disconnected, limits.dead)
        if seen != "active":
            return seen
        return "draining" if self.phase == "draining" or self.duty.drain else "online"

    def may_serve(self, key: tuple[str, str], now: float, limits: Limits) -> bool:
        """Whether a request for `key` has hope here, soon if not now."""
        fits = self.duty.project == key[0] and key[1] in (self.serves, self.duty.assigned)
        return fits and self.status(now, limits) == "online"

    def describe(self, request: PollRequest, serves: str | None, now: float) -> None:
        """What a poll says, within bounds: all of it is shown to people or counted with."""
        self.n = request.n
        self.phase = request.phase
        self.ceiling = max(0, min(request.ceiling, MAX_LEASES))
        self.load = request.load
        self.progress = request.progress
        self.health = request.health[:32]
        self.model = request.model
        self.versions = {name: request.versions[name] for name in ("agent", "vllm") if name in request.versions}
        self.serves = serves
        self.room = max(0, min(request.capacity, MAX_LEASES)) if self.key is not None else 0
        self.series.polled(request.load, len(self.grants), now)

    def begin_boot(self, n: int, wall: float) -> None:
        """Lease ids are unique within a boot: one that polled another router process before may know small ones."""
        self.n, self.told, self.finished = -1, None, OrderedDict()
        self.next_lease = 1 if n <= 1 else int(wall * 1000) & 0xFFFFFFFF
        self.grants = {}

    def finish(self, grant: Grant) -> None:
        if self.grants.pop(grant.id, None) is not None:
            self.finished[grant.id] = grant.acked
            if len(self.finished) > KEEP_FINISHED:
                self.finished.popitem(last=False)
