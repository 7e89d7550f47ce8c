"""A client's request as the dispatcher sees it, the lease that carries it to an agent, and how both end."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from xim_agent.mesh.codec import Payload
from xim_agent.mesh.messages import End, Head, Lease

KIB, MIB = 1024, 1024 * 1024


@dataclass(frozen=True)
class Limits:
    """Times in seconds, sizes in bytes. The source of what has no comment is wire-protocol §5 and §7."""

    ttl: float = 75.0
    queue_wait: float = 60.0
    queue_length: int = 1024  # of one queue
    queue_bytes: int = 1024 * MIB  # of the bodies in all queues: one may have 32 MiB
    request_time: float = 1800.0  # the longest request of any tier (xerotier-facts §2.7)
    retries: int = 2
    window: int = 512 * KIB  # unread data per stream, two of the largest frames: some seconds of the fastest stream
    buffered: int = 64 * MIB  # the largest answer that is not a stream
    disconnected: float = 75.0
    dead: float = 600.0
    forgotten: float = 86_400.0  # an agent silent for so long is a new one when it comes back
    repeat: float = 1.0  # an unanswered cancel, or a credit that had no effect, is told again after this
    grace: float = 10.0  # after a start: agents need up to 2 s to come back, their clients wait so long
    inline: int = 48 * MIB  # bodies in one poll reply; the reply may have 64 MiB


class Ended(Enum):
    COMPLETE = "complete"
    ERROR = "error"


@dataclass(frozen=True)
class Outcome:
    """How a job ended. `code`, `message` and the HTTP `status` are for the client; empty when complete."""

    kind: Ended
    code: str = ""
    message: str = ""
    status: int = 200


COMPLETE = Outcome(Ended.COMPLETE)

STATUS = {
    "capacity_exceeded": 429,
    "deadline": 504,
    "draining": 503,
    "endpoint_inactive": 503,
    "engine_lost": 503,
    "engine_overloaded": 503,
    "invalid_request": 400,
    "response_too_large": 502,
    "bad_answer": 502,
}


def failure(code: str, message: str) -> Outcome:
    return Outcome(Ended.ERROR, code, message, STATUS.get(code, 500))


class Refused(Exception):
    """A request that is not even queued."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.message)
        self.outcome = outcome


@dataclass(eq=False)
class Job:
    """One request of a client. The dispatcher fills in what follows `expected`, and calls `wake` after a change.

    `expected`: an agent ought to serve it, though none may have come back since the router started.
    `committed`: something of the answer has reached the client, so no other agent may answer. `body`: empty once no
    agent can need it any more.
    """

    request: str
    project: str
    model: str
    path: str
    headers: dict[str, str]
    body: bytes
    stream: bool
    tenant: str
    wake: Callable[[], None]
    expected: bool = False
    deadline: float = 0.0
    queued: bool = False
    queued_since: float = 0.0
    granted_at: float | None = None
    grant: "Grant | None" = None
    tried: set[str] = field(default_factory=set)
    retries: int = 0
    committed: bool = False
    head: Head | None = None
    chunks: deque[bytes] = field(default_factory=deque)
    outcome: Outcome | None = None
    gone: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """What an agent must serve to take it."""
        return self.project, self.model

    @property
    def buffered(self) -> bool:
        """Whether the answer is kept until its end: whatever is no event stream."""
        return self.head is None or not self.head.headers.get("content-type", "").startswith("text/event-stream")

    def finish(self, outcome: Outcome) -> None:
        """The first outcome holds."""
        if self.outcome is None:
            self.outcome = outcome
            self.wake()

    @property
    def live(self) -> bool:
        """Whether somebody still waits for the answer."""
        return self.outcome is None and not self.gone

    def start_over(self) -> None:
        self.head = None
        self.chunks.clear()
        self.grant = None


class BadFrame(ValueError):
    """A frame that breaks the protocol; its lease becomes `unknown`."""


@dataclass(eq=False)
class Grant:
    """A job in the hands of an agent: the router's end of a lease. Frames are put in order and applied to the job.

    `offered`: n of the poll whose reply carries it. `confirmed`: the agent has shown that it holds it. `told`: the
    credit total the agent was told last; the telling may have got lost. `data_at`: when data of a stream came last.
    """

    id: int
    agent: str
    job: Job
    offered: int
    expires: float
    window: int
    confirmed: bool = False
    cancel: bool = False
    cancel_told: float = float("-inf")
    told: int = 0
    told_at: float = float("-inf")
    headed: bool = False
    received: int = 0
    chunks: int = 0
    taken: int = 0
    data_at: float | None = None
    next_seq: int = 0
    waiting: dict[int, Payload] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.told = self.window

    @property
    def acked(self) -> int:
        """The highest gap-free sequence number, -1 while there is none."""
        return self.next_seq - 1

    def receive(self, seq: int, payload: Payload) -> list[Payload]:
        """The payloads that are in order now; what came before is dropped. Raises BadFrame beyond any credit."""
        if seq < self.next_seq or seq in self.waiting:
            return []
        self.waiting[seq] = payload
        if seq != self.next_seq:
            early = sum(len(p) for p in self.waiting.values() if isinstance(p, bytes))
            if self.received + early > self.told or len(self.waiting) > MAX_EARLY:
                raise BadFrame("more data than credit")
        ready = []
        while (payload_now := self.waiting.pop(self.next_seq, None)) is not None:
            ready.append(payload_now)
            self.next_seq += 1
        return ready

    def add_data(self, data: bytes) -> None:
        self.received += len(data)
        self.chunks += 1
        if self.received > self.told:
            raise BadFrame("more data than credit")

    def checked(self, end: End) -> Outcome:
        """An ending that says how much there was; anything missing is no complete answer."""
        if end.reason == "deadline":
            return failure("deadline", "the request took longer than its deadline")
        if end.reason == "cancelled":
            return failure("cancelled", "the agent cancelled the request")
        if not self.headed or (end.bytes, end.chunks) != (self.received, self.chunks):
            return failure("engine_lost", "the answer arrived incomplete")
        return COMPLETE

    @property
    def total(self) -> int:
        """Bytes of data allowed since the lease began."""
        return self.taken + self.window

    def credit_due(self, now: float, repeat: float) -> bool:
        """Whether the agent must be told at once: it may have stopped, or have stopped and not heard of more."""
        if self.cancel or not self.confirmed:
            return False
        if self.thirsty and self.total - self.told >= self.window // 4:
            return True
        # The lease itself gave it one window. With the half of that gone it may be waiting for credit that got lost;
        # while its frames arrive, each reply tells it again.
        may_wait = self.received > self.window // 2
        return may_wait and now - self.told_at >= repeat

    @property
    def thirsty(self) -> bool:
        """Half of the window or less is left. The largest frame is half a window, so it may be waiting for credit."""
        return self.told - self.received <= self.window // 2

    def tell_credit(self, now: float) -> int:
        """The total, which may be told as often as one likes."""
        self.told, self.told_at = max(self.told, self.total), now
        return self.told

    def cancel_due(self, now: float, repeat: float) -> bool:
        return self.cancel and now - self.cancel_told >= repeat

    def lease(self, now: float, ttl: float, inline: bool) -> Lease:
        job = self.job
        return Lease(
            id=self.id,
            request=job.request,
            method="POST",
            path=job.path,
            headers=job.headers,
            body=job.body if inline else None,
            stream=job.stream,
            tenant=job.tenant,
            deadline_ms=max(1, int((job.deadline - now) * 1000)),
            credit=self.told,
            ttl_ms=int(ttl * 1000),
        )


MAX_EARLY = 65536  # frames kept out of order; two calls of 1 MiB hold fewer
