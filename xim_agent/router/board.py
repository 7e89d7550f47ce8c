"""Who works on what: the jobs, the agents, and every move of a job between a queue and an agent."""

import math
from collections import Counter

from xim_agent.mesh.trace import trace_id
from xim_agent.router.diary import Diary
from xim_agent.router.fleet import Agent, Poll
from xim_agent.router.jobs import Grant, Job, Limits, Outcome, failure
from xim_agent.router.queues import Key, Queues
from xim_agent.router.times import Times
from xim_agent.router.waiting import Waiting

ELSEWHERE = 5.0  # seconds a job that failed on one agent waits for another one
SOON = 1.0  # an agent heard so recently is about to poll again
FORGET = 60.0  # seconds from one look at who has been silent for long to the next


class Board:
    """Shared by the dispatcher and by what settles leases. `now` is monotonic seconds.

    `leased`: every agent that has leases, and some that had. What is done often looks at these or at `waiting`, not at
    all agents.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.started = float("-inf")
        self._forgot = 0.0
        self.agents: dict[str, Agent] = {}
        self.leased: dict[Agent, None] = {}
        self.waiting = Waiting()
        self.queues = Queues()
        self.counts: Counter[str] = Counter()
        self.times = Times()
        self.diary = Diary()

    def hope(self, key: Key, expected: bool, now: float) -> bool:
        """Whether an agent may serve it, now or soon."""
        if expected and now - self.started < self.limits.grace:
            return True
        return any(a.may_serve(key, now, self.limits) for a in self.agents.values())

    def ready(self, key: Key, now: float) -> bool:
        """Whether an agent serves it now, busy or not."""
        return any(a.key == key and a.may_serve(key, now, self.limits) for a in self.agents.values())

    def expire(self, key: Key, now: float) -> None:
        """Ends the waiting jobs whose time is over, or for which there is no hope."""
        jobs = self.queues.jobs(key)
        hope = {e: self.hope(key, e, now) for e in {job.expected for job in jobs}}
        ready: bool | None = None
        for job in jobs:
            over = now - job.queued_since >= self.limits.queue_wait or now >= job.deadline
            if over or not hope[job.expected]:
                ready = self.ready(key, now) if ready is None else ready
                self._give_up(job, ready, now)

    def _give_up(self, job: Job, ready: bool, now: float) -> None:
        """Takes a job out of its queue with the reason why nobody took it. `ready`: of its key."""
        self.queues.remove(job)
        if now >= job.deadline:
            outcome = failure("deadline", "the request took longer than its deadline")
        elif ready:
            outcome = failure("capacity_exceeded", f"no slot came free within {self.limits.queue_wait:g} s")
        else:
            outcome = failure("endpoint_inactive", f"no agent that serves {job.model!r} is ready")
        self.finish(job, outcome.code, outcome)

    def finish(self, job: Job, count: str, outcome: Outcome) -> None:
        if job.outcome is None:
            self.counts[count] += 1
            job.finish(outcome)

    def share(self, agent: Agent, now: float) -> int:
        """How many of the waiting jobs it may take: those who will poll in a moment get theirs, too."""
        waiting = self.queues.length(agent.key) if agent.key else 0
        if not waiting:
            return agent.room
        most = waiting * agent.room  # with so much room in all, nobody gets more than one
        rooms = 0
        for other in self.agents.values():
            if other.room and other.key == agent.key and other.silent(now) < SOON:
                rooms += other.room
                if rooms >= most:
                    break
        return min(agent.room, math.ceil(most / max(1, rooms)))

    def place(self, key: Key, now: float) -> None:
        """Leases waiting jobs to the least loaded of the agents whose held polls have room."""
        if not self.queues.length(key) or self.waiting.first(key) is None:
            return
        for job in self.queues.jobs(key):
            if (poll := self._choose(job, now)) is not None:
                self._grant(poll, job, now)
            elif self.waiting.first(key) is None:
                return

    def _choose(self, job: Job, now: float) -> Poll | None:
        poll = self.waiting.first(job.key, job.tried)
        if poll is None and now - job.queued_since < ELSEWHERE:
            others = (a for a in self.agents.values() if a.id not in job.tried)
            if any(a.may_serve(job.key, now, self.limits) for a in others):
                return None
        return poll or self.waiting.first(job.key)

    def _grant(self, poll: Poll, job: Job, now: float) -> None:
        self.queues.remove(job)
        agent = poll.agent
        grant = Grant(agent.next_lease, agent.id, job, poll.n, now + self.limits.ttl, self.limits.window)
        agent.next_lease += 1
        agent.grants[grant.id] = job.grant = grant
        self.leased[agent] = None
        job.granted_at = now
        self.times.dispatch.observe(now - job.queued_since, trace_id(job.headers.get("traceparent", "")) or "")
        job.tried.add(agent.id)
        self.put_in(poll, grant)
        self.counts["leases"] += 1
        poll.wake()

    def put_in(self, poll: Poll, grant: Grant) -> None:
        poll.grants.append(grant)
        poll.room -= 1
        poll.agent.room -= 1
        self.waiting.offer(poll)

    def drop(self, agent: Agent, grant: Grant) -> None:
        """The agent has this lease no more, and is less busy."""
        agent.grants.pop(grant.id, None)
        self.offer(agent)

    def offer(self, agent: Agent) -> None:
        """To be called when an agent has become less busy, or takes other work."""
        if agent.poll is not None:
            self.waiting.offer(agent.poll)

    def take_back(self, agent: Agent, grant: Grant, now: float) -> None:
        """A lease that was never received: its job is first in the queue again, as if nothing had been."""
        self.drop(agent, grant)
        if grant.job.live and not grant.cancel:
            grant.job.tried.discard(agent.id)
            grant.job.start_over()
            self.queues.push_first(grant.job, now)

    def retry(self, job: Job, outcome: Outcome, now: float) -> None:
        """Another agent, or the same one again, unless the client has seen something or it was tried often enough."""
        if job.committed or job.retries >= self.limits.retries:
            self.finish(job, outcome.code, outcome)
            return
        job.retries += 1
        self.counts["retries"] += 1
        job.start_over()
        self.queues.push_first(job, now)
        self.place(job.key, now)

    def cancel(self, grant: Grant, now: float) -> None:
        """Asks the agent to stop; a lease that it was not even offered is gone at once."""
        grant.cancel = True
        agent = self.agents.get(grant.agent)
        if agent is None or agent.grants.get(grant.id) is not grant:
            return
        if agent.poll is None or grant not in agent.poll.grants:
            self.wake(agent.id)
            return
        agent.poll.grants.remove(grant)
        agent.poll.room += 1
        agent.room += 1
        self.drop(agent, grant)
        if agent.key is not None:
            self.place(agent.key, now)

    def forget(self, now: float) -> None:
        """To be called as often as one likes: what is of no use any more of agents that have been silent for long.

        Endings that a dead one sends again are `unknown`, which settles them as well. One forgotten altogether begins
        as after a restart of the router; who looks for it meanwhile finds it in the database.
        """
        if now - self._forgot < FORGET:
            return
        self._forgot = now
        for agent in list(self.agents.values()):
            silent = agent.silent(now)
            if silent >= self.limits.dead:
                agent.finished.clear()
            if silent >= self.limits.forgotten and not agent.grants:
                del self.agents[agent.id]
                self.diary.left(agent.id)

    def wake(self, agent_id: str) -> None:
        """Has a held poll looked at again."""
        agent = self.agents.get(agent_id)
        if agent is not None and agent.poll is not None:
            agent.poll.wake()
