"""A dispatcher with its agents and clients as plain values: no task, no socket, the time as a number."""

from typing import Any

from xim_agent.mesh.messages import End, Error, Head, Load, ModelState, PollReply, PollRequest
from xim_agent.router.dispatch import Dispatch
from xim_agent.router.fleet import Duty, Poll
from xim_agent.router.jobs import Job, Limits

PROJECT, MODEL = "p", "m"
SSE = {"content-type": "text/event-stream"}
DUTY = Duty(PROJECT, 1, MODEL)
LIMITS = Limits(window=1024)


class World:
    """`now` in seconds; nothing moves it but the test."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.now = 0.0
        self.limits = limits
        self.dispatch = Dispatch(limits)
        self.numbers: dict[tuple[str, str], int] = {}
        self.woken = 0
        self.jobs = 0

    def wake(self) -> None:
        self.woken += 1

    def poll(
        self, agent: str = "a", *, boot: str = "b1", duty: Duty = DUTY, serves: str | None = MODEL, **more: Any
    ) -> Poll:
        """A poll, not answered yet. `n` counts up by itself."""
        n = self.numbers[agent, boot] = more.pop("n", self.numbers.get((agent, boot), 0) + 1)
        fields: dict[str, Any] = {
            "phase": "ready",
            "capacity": 1,
            "wait_ms": 20_000,
            "held": [],
            "model": ModelState(MODEL, "r", 1),
            "ceiling": 4,
            "load": Load(),
            "progress": None,
            "health": [],
        }
        request = PollRequest(boot=boot, n=n, **(fields | more))
        return self.dispatch.poll(
            agent, duty, request, serves=serves, address=f"{agent}:1", wake=self.wake, now=self.now, wall=1e9 + self.now
        )

    def ready(self, *agents: str, **more: Any) -> list[Poll]:
        """Agents that wait for work: their first poll, answered at once, is behind them."""
        polls = []
        for agent in agents or ("a",):
            self.answer(self.poll(agent, capacity=0))
            polls.append(self.poll(agent, **more))
        return polls

    def answer(self, poll: Poll) -> PollReply:
        reply = self.dispatch.answer(poll, self.now)
        assert reply is not None, "the poll is held"
        return reply

    def job(self, **more: Any) -> Job:
        self.jobs += 1
        fields: dict[str, Any] = {
            "project": PROJECT,
            "model": MODEL,
            "path": "/v1/completions",
            "headers": {},
            "body": b"{}",
            "stream": True,
            "tenant": "t",
            "wake": self.wake,
        }
        return Job(request=f"req-{self.jobs}", **(fields | more))

    def submit(self, **more: Any) -> Job:
        job = self.job(**more)
        self.dispatch.submit(job, self.now)
        return job

    def leased(self, **more: Any) -> tuple[Job, int]:
        """A job that agent `a` has received, and its lease."""
        (poll,) = self.ready()
        job = self.submit(**more)
        (lease,) = self.answer(poll).leases
        return job, lease.id

    def events(self, *frames: Any, agent: str = "a", boot: str = "b1") -> Any:
        return self.dispatch.events(agent, boot, frames, self.now)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.dispatch.tick(self.now)


def head(status: int = 200, headers: dict[str, str] | None = None) -> Head:
    return Head(status, SSE if headers is None else headers)


def end(pieces: list[bytes], reason: Any = "complete") -> End:
    return End(reason, sum(map(len, pieces)), len(pieces), 1, 2)


def fail(code: Any = "engine_lost", retryable: bool = False) -> Error:
    return Error(code, "why", retryable)


def stream(lease: int, pieces: list[bytes]) -> list[tuple[int, int, Any]]:
    """All frames of a complete answer."""
    payloads = [head(), *pieces, end(pieces)]
    return [(lease, seq, payload) for seq, payload in enumerate(payloads)]
