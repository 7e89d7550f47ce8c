"""What arrives from agents, applied: frames to jobs, each once and in order; and how leases end."""

from collections.abc import Iterable

from xim_agent.mesh.codec import Payload
from xim_agent.mesh.messages import End, Error, EventsReply, Head
from xim_agent.router.board import Board
from xim_agent.router.fleet import Agent
from xim_agent.router.jobs import COMPLETE, BadFrame, Grant, failure

Frame = tuple[int, int, Payload | None]  # lease, seq, payload; None for a frame that could not be decoded

# Endings after which another agent may succeed, whatever the agent thinks: it counts what it sent, we what was seen.
RETRYABLE = frozenset({"engine_lost", "engine_overloaded", "draining"})


def events(board: Board, agent: Agent, frames: Iterable[Frame], now: float) -> EventsReply:
    """Applies a batch of the agent's current boot."""
    touched: set[int] = set()
    for lease, seq, payload in frames:
        grant = agent.grants.get(lease)
        touched.add(lease)
        if grant is None:
            continue
        grant.confirmed, grant.expires = True, now + board.limits.ttl
        try:
            _frame(board, agent, grant, seq, payload, now)
        except BadFrame as error:
            lost(board, agent, grant, f"the agent broke the protocol: {error}", now, retry=False)
    return _reply(board, agent, touched, now)


def _reply(board: Board, agent: Agent, touched: set[int], now: float) -> EventsReply:
    acked: dict[int, int] = {}
    credit: dict[int, int] = {}
    unknown = []
    for lease in sorted(touched):
        if lease in agent.finished:
            acked[lease] = agent.finished[lease]
        elif (grant := agent.grants.get(lease)) is None:
            unknown.append(lease)
        else:
            if grant.acked >= 0:
                acked[lease] = grant.acked
            if not grant.cancel:
                credit[lease] = grant.tell_credit(now)
    return EventsReply(acked=acked, credit=credit, cancel=cancels(agent, now), unknown=unknown)


def cancels(agent: Agent, now: float) -> list[int]:
    """Every lease that is to stop; repeated until its ending is there."""
    told = [grant for grant in agent.grants.values() if grant.cancel]
    for grant in told:
        grant.cancel_told = now
    return [grant.id for grant in told]


def lost(board: Board, agent: Agent, grant: Grant, why: str, now: float, retry: bool = True) -> None:
    """Ends a lease from this side; whatever comes for it later is `unknown`."""
    board.drop(agent, grant)
    job = grant.job
    agent.series.ended("engine_lost" if job.live else "", now)
    if job.live:
        outcome = failure("engine_lost", why)
        if retry:
            board.retry(job, outcome, now)
        else:
            board.finish(job, outcome.code, outcome)


def _frame(board: Board, agent: Agent, grant: Grant, seq: int, payload: Payload | None, now: float) -> None:
    if payload is None:
        raise BadFrame("a frame that cannot be read")
    for ready in grant.receive(seq, payload):
        if isinstance(ready, bytes):
            _data(board, agent, grant, ready, now)
        elif isinstance(ready, Head):
            if grant.headed or not 200 <= ready.status <= 599:
                raise BadFrame(f"a second head, or status {ready.status}")
            grant.headed = True
            grant.job.head = ready
        else:
            agent.finish(grant)
            board.offer(agent)
            _ending(board, agent, grant, ready, now)
            return


def _data(board: Board, agent: Agent, grant: Grant, data: bytes, now: float) -> None:
    if not grant.headed:
        raise BadFrame("data before the head")
    grant.add_data(data)
    job = grant.job
    buffered = job.buffered
    if not buffered:
        _timed(agent, grant, now)
    if not job.live:
        grant.taken = grant.received
        return
    job.chunks.append(data)
    if not buffered:
        job.wake()
        return
    grant.taken = grant.received
    if grant.received > board.limits.buffered:
        outcome = failure("response_too_large", f"the answer is larger than {board.limits.buffered} bytes")
        board.finish(job, outcome.code, outcome)
        board.cancel(grant, now)


def _timed(agent: Agent, grant: Grant, now: float) -> None:
    """Frames of one call arrive together, for the client too: only the first of them came after a time."""
    if grant.data_at is None:
        agent.series.data(now - (grant.job.granted_at or now), now, first=True)
    elif now > grant.data_at:
        agent.series.data(now - grant.data_at, now, first=False)
    grant.data_at = now


def _ending(board: Board, agent: Agent, grant: Grant, ending: End | Error, now: float) -> None:
    job = grant.job
    if not job.live:
        agent.series.ended("", now)  # nobody waited any more: it was asked to stop, and no failure of the agent's
        return
    if isinstance(ending, End):
        outcome = grant.checked(ending)
        again = outcome.code == "engine_lost"
    else:
        outcome = failure(ending.code, ending.message[:1000])
        again = ending.retryable or ending.code in RETRYABLE
    agent.series.ended(outcome.code, now)
    if outcome is COMPLETE:
        board.finish(job, "completed", outcome)
    elif again:
        board.retry(job, outcome, now)
    else:
        board.finish(job, outcome.code, outcome)
