"""The dispatcher: clients' jobs on one side, agents' polls and events on the other (wire-protocol §5, §7).

Every method is one synchronous step with the time given; waiting is done outside, woken by `Job.wake` and `Poll.wake`.

    job:    queued --poll answered--> leased --ending--> done
               ^                        |
               +--- lost, or an error before any data reached the client (at most twice) ---+
    lease:  put into a held poll -> offered in its reply -> confirmed by `held` or a frame -> ended | lapsed | unknown
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from xim_agent.mesh.messages import MAX_INLINE_BODY, MAX_WAIT_MS, EventsReply, Lease, PollReply, PollRequest
from xim_agent.router import settle
from xim_agent.router.board import Board
from xim_agent.router.fleet import Agent, Duty, Poll
from xim_agent.router.jobs import Grant, Job, Limits, Refused, failure
from xim_agent.router.settle import Frame


class CloneDetected(Exception):
    """Two processes use one identity. `address` and `start` are the other's, `yours` is the caller's start.

    Both in Unix seconds of the first poll, by the router's clock: the agents' own clocks may differ.
    """

    def __init__(self, address: str, start: float, yours: float) -> None:
        super().__init__(f"this identity is also used from {address}")
        self.address = address
        self.start = start
        self.yours = yours


class AgentSuspended(Exception):
    """The agent gets no work; the leases it listed are renewed."""


@dataclass(frozen=True)
class DispatchStatistics:
    queued: int
    running: int
    agents: int
    counts: dict[str, int]


class Dispatch:
    """`now` is monotonic seconds everywhere, `wall` Unix seconds."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.board = Board(limits)

    def start(self, now: float) -> None:
        """From now on agents have some seconds to come back before a request for them is refused."""
        self.board.started = now

    @property
    def agents(self) -> dict[str, Agent]:
        return self.board.agents

    # -- clients --

    def submit(self, job: Job, now: float) -> None:
        """Queues a job and leases it if an agent waits. Raises Refused."""
        if not self.board.hope(job.key, job.expected, now):
            raise Refused(failure("endpoint_inactive", f"no agent of this project serves {job.model!r} now"))
        if self.board.queues.length(job.key) >= self.limits.queue_length:
            raise Refused(failure("capacity_exceeded", "too many requests are waiting"))
        if self.board.queues.bytes + len(job.body) > self.limits.queue_bytes:
            raise Refused(failure("capacity_exceeded", "too much data is waiting"))
        job.deadline = now + self.limits.request_time
        self.board.counts["submitted"] += 1
        self.board.queues.push(job, now)
        self.board.place(job.key, now)

    def take(self, job: Job) -> bytes:
        """What arrived of the answer since the last call. From here on the job is answered by this agent or by none."""
        data = job.chunks.popleft() if len(job.chunks) == 1 else b"".join(job.chunks)
        job.chunks.clear()
        if data:
            job.committed, job.body = True, b""  # which was for another agent
        return data

    def consumed(self, job: Job, count: int, now: float) -> None:
        """`count` bytes were accepted by the client's connection: credit for the agent."""
        if (grant := job.grant) is not None:
            grant.taken += count
            if grant.credit_due(now, self.limits.repeat):
                self.board.wake(grant.agent)

    def release(self, job: Job, now: float) -> None:
        """The client is gone or has its answer; what still runs for it is cancelled. Again does nothing."""
        if job.gone:
            return
        job.gone = True
        if job.outcome is None:
            self.board.counts["cancelled"] += 1
        self.board.queues.remove(job)
        job.body = b""  # the lease, which holds the job, may go on for a while
        job.chunks.clear()
        if job.grant is not None:
            self.board.cancel(job.grant, now)

    # -- agents --

    def poll(
        self,
        agent_id: str,
        duty: Duty,
        request: PollRequest,
        *,
        serves: str | None,
        address: str,
        wake: Callable[[], None],
        now: float,
        wall: float,
    ) -> Poll:
        """Takes in a poll; `answer` or `abandon` must follow. Raises CloneDetected, AgentSuspended."""
        agent = self.agents.setdefault(agent_id, Agent(agent_id, duty))
        agent.duty = duty
        changed, clone = agent.boots.enter(request.boot, address, now, wall)
        if changed:
            self._end_boot(agent, now)
            agent.begin_boot(request.n, wall)
        if clone is not None:
            raise CloneDetected(clone.address, clone.start, agent.boots.known[request.boot].start)
        if request.n <= agent.n:  # late or repeated: whoever sent it waits for a newer one
            return Poll(agent, request.n, now, 0, frozenset(), wake, closed=True)
        if agent.poll is not None:
            self.abandon(agent.poll, now)
        agent.heard = now
        agent.describe(request, serves, now)
        self.board.diary.polled(agent, now)
        poll = Poll(agent, request.n, now, agent.room, frozenset(request.held), wake)
        self._reconcile(agent, poll, now)
        if duty.suspended:
            raise AgentSuspended
        wait = min(request.wait_ms, MAX_WAIT_MS) / 1000
        bounds = (wait, 5.0 if request.capacity <= 0 else wait, self.limits.ttl / 3 if poll.held else wait)
        poll.until = now + max(0.0, min(bounds))
        agent.poll = poll
        if agent.key is not None:
            poll.room = min(poll.room, self.board.share(agent, now))
            self.board.offer(agent)
            self.board.place(agent.key, now)
        return poll

    def answer(self, poll: Poll, now: float) -> PollReply | None:
        """The reply when there is one to give; None to keep holding. A poll that was replaced gets an empty one."""
        agent, repeat = poll.agent, self.limits.repeat
        told = (agent.duty.generation, agent.duty.drain)
        if poll.closed:
            return PollReply(generation=told[0], drain=told[1])
        grants = agent.grants.values()
        foreign = poll.foreign if now - agent.foreign_told >= repeat else []
        if not (
            poll.grants
            or foreign
            or told != agent.told
            or agent.duty.suspended  # its next poll is told so
            or now >= poll.until
            or any(g.cancel_due(now, repeat) or g.credit_due(now, repeat) for g in grants)
        ):
            return None
        offered = self._close(poll, now)
        agent.told = told
        agent.foreign_told = now if foreign else agent.foreign_told
        leases = self._leases(offered, now)
        return PollReply(
            leases=leases,
            credit={g.id: g.tell_credit(now) for g in grants if g.confirmed and not g.cancel},
            cancel=[*settle.cancels(agent, now), *foreign],
            generation=told[0],
            drain=told[1],
            idle_reason=self._idle_reason(agent) if not leases and agent.room else None,
        )

    def abandon(self, poll: Poll, now: float) -> None:
        """The poll was closed or replaced: never answered. What was put into it goes elsewhere. Again does nothing."""
        if poll.closed:
            return
        for grant in reversed(self._close(poll, now)):
            self.board.take_back(poll.agent, grant, now)
        poll.wake()
        if poll.agent.key is not None:
            self.board.place(poll.agent.key, now)

    def events(self, agent_id: str, boot: str, frames: Iterable[Frame], now: float) -> EventsReply:
        """Takes in a batch of frames: applied in order, each once."""
        agent = self.agents.get(agent_id)
        if agent is None or agent.boot != boot:
            return EventsReply(unknown=sorted({lease for lease, _, _ in frames}))
        agent.heard = now
        return settle.events(self.board, agent, frames, now)

    def assign(self, agent_id: str, duty: Duty, serves: str | None, now: float) -> None:
        """The database says something else of an agent; a held poll is answered if that concerns it."""
        agent = self.agents.get(agent_id)
        if agent is not None and (agent.duty, agent.serves) != (duty, serves):
            agent.duty, agent.serves = duty, serves
            self.board.offer(agent)
            self.board.wake(agent_id)
            if agent.key is not None:
                self.board.place(agent.key, now)

    def remove(self, agent_id: str, now: float) -> None:
        """The agent left or was removed: nothing of it runs any more."""
        if (agent := self.agents.pop(agent_id, None)) is not None:
            if agent.poll is not None:
                self.abandon(agent.poll, now)
            self._end_boot(agent, now)
        self.board.diary.left(agent_id)

    def held_job(self, agent_id: str, request: str) -> Job | None:
        """The job with this request id, if the agent holds its lease and the body is still there to be fetched."""
        agent = self.agents.get(agent_id)
        grants = agent.grants.values() if agent else ()
        return next((g.job for g in grants if g.job.request == request and g.job.body), None)

    # -- time --

    def tick(self, now: float) -> None:
        """To be called a few times a second: lapsed leases, deadlines, waits that are over, replies that got lost."""
        repeat = self.limits.repeat
        for agent in list(self.board.leased):
            if not agent.grants:
                del self.board.leased[agent]
            for grant in list(agent.grants.values()):
                if now >= grant.expires and not (agent.poll is not None and grant.id in agent.poll.held):
                    settle.lost(self.board, agent, grant, "the agent was not heard of any more", now)
                elif now >= grant.job.deadline and not grant.cancel:
                    grant.job.finish(failure("deadline", "the request took longer than its deadline"))
                    self.board.cancel(grant, now)
            if agent.poll is not None and any(
                g.cancel_due(now, repeat) or g.credit_due(now, repeat) for g in agent.grants.values()
            ):
                agent.poll.wake()
        for key in self.board.queues.waiting():
            self.board.expire(key, now)
            self.board.place(key, now)
        self.board.forget(now)

    def statistics(self) -> DispatchStatistics:
        running = sum(len(a.grants) for a in self.agents.values())
        return DispatchStatistics(len(self.board.queues.jobs()), running, len(self.agents), dict(self.board.counts))

    # -- inside --

    def _reconcile(self, agent: Agent, poll: Poll, now: float) -> None:
        """Compares what the agent holds with what it should hold."""
        for grant in list(agent.grants.values()):
            if grant.id in poll.held:
                grant.confirmed, grant.expires = True, now + self.limits.ttl
            elif grant.confirmed:
                settle.lost(self.board, agent, grant, "the agent dropped the request", now)
            elif poll.room > 0 and not grant.cancel:
                self.board.counts["offered_again"] += 1
                grant.offered, grant.expires = poll.n, now + self.limits.ttl
                self.board.put_in(poll, grant)
            else:
                self.board.take_back(agent, grant, now)
        poll.foreign = sorted(lease for lease in poll.held if lease not in agent.grants and lease not in agent.finished)

    def _end_boot(self, agent: Agent, now: float) -> None:
        if agent.poll is not None:
            self.abandon(agent.poll, now)
        for grant in list(agent.grants.values()):
            settle.lost(self.board, agent, grant, "the agent was restarted", now)

    def _close(self, poll: Poll, now: float) -> list[Grant]:
        """What was put into it. The poll forgets that: `waiting` may know it for long, which must not keep bodies."""
        poll.closed = True
        agent = poll.agent
        agent.heard = now
        if agent.poll is poll:
            agent.poll = None
        # What was to be offered again may have shown in the meantime that it was received after all.
        offered = [g for g in poll.grants if agent.grants.get(g.id) is g and not g.confirmed]
        poll.grants = []
        for lease in poll.held & agent.grants.keys():
            agent.grants[lease].expires = now + self.limits.ttl
        return offered

    def _leases(self, grants: list[Grant], now: float) -> list[Lease]:
        """Bodies travel inside while they fit; the others are fetched by the agent."""
        leases, left = [], self.limits.inline
        for grant in grants:
            size = len(grant.job.body)
            inside = size <= min(left, MAX_INLINE_BODY)
            left -= size if inside else 0
            leases.append(grant.lease(now, self.limits.ttl, inside))
        return leases

    def _idle_reason(self, agent: Agent) -> str:
        return f"no request waits for {agent.serves}" if agent.serves else "no model is assigned"
