"""Heartbeat and intake: one poll at a time, for as long as the agent runs, draining included."""

import logging
from collections.abc import Callable
from typing import Protocol

import trio

from xim_agent.clock import Clock
from xim_agent.errors import AgentError, Exit
from xim_agent.health import Health
from xim_agent.mesh.messages import Load, ModelState, Phase, PollReply, PollRequest, Progress
from xim_agent.outcome import Action, RouterError
from xim_agent.work import capacity
from xim_agent.work.clone import clone
from xim_agent.work.lease import refusal
from xim_agent.work.link import Link
from xim_agent.work.request import Bodies, Engine, serve
from xim_agent.work.sender import FATAL, SUSPENDED_SECONDS, Sender
from xim_agent.work.statistics import WorkStatistics

log = logging.getLogger("xim_agent.work")

# A poll is replaced for the eyes of people (progress, health) at most so often: each time costs a connection.
SOFT_REPLACE_SECONDS = 1.0
# A router that answers at once and brings nothing is asked less and less often, down to once a second.
EMPTY_SECONDS = 0.02
EMPTY_MAX_SECONDS = 1.0
RETRY_MAX_SECONDS = 30.0
# Twice as long as the router takes to tell of a clone again.
CLONE_SECONDS = 150.0
# Who asks to drain, beside operators.
STOP, ROUTER = "a stop", "the router"
CLONE_REFUSALS = 4  # refused so often in a row, we are the later one whatever the clocks say


class PollTransport(Bodies, Protocol):
    async def poll(self, request: PollRequest) -> PollReply: ...


class EngineView(Engine, Protocol):
    @property
    def degraded(self) -> bool: ...
    @property
    def ceiling(self) -> int: ...
    def load(self) -> Load: ...


class Poller:
    """`changed` is called by whoever changes what a poll tells. `model` and `progress` are asked before every poll."""

    def __init__(
        self,
        *,
        router: PollTransport,
        sender: Sender,
        engine: EngineView,
        link: Link,
        health: Health,
        clock: Clock,
        boot: str,
        generation_seen: Callable[[int], None],
        model: Callable[[], ModelState | None],
        progress: Callable[[], Progress | None],
        versions: Callable[[], dict[str, str]] = dict,
    ) -> None:
        self._router = router
        self._sender = sender
        self._engine = engine
        self._link = link
        self._health = health
        self._clock = clock
        self._started = clock.now()
        self._boot = boot
        self._generation_seen = generation_seen
        self._model, self._progress, self._versions = model, progress, versions
        self._closed = self._suspended = False
        self._drained_by: set[str] = set()
        self._announced: Phase | None = None
        self._heard: Phase | None = None  # the last one that the router has answered to
        self._n = self._replaced = self._failed = self._generation = self._clone_refusals = 0
        self._last_poll: float | None = None
        self._clone_seen = float("-inf")
        self._idle_reason: str | None = None
        self._told: capacity.View | None = None
        self._scope: trio.CancelScope | None = None
        self._soft_at = float("-inf")
        self._empty = 0
        self.beats = 0  # grows when a poll, or a wait between two, has ended
        sender.freed = self.changed

    # what others ask for

    @property
    def draining(self) -> bool:
        return bool(self._drained_by)

    def drain(self, who: str = STOP) -> None:
        """Takes nothing more until all who asked have taken it back; polls go on as heartbeats."""
        self._drained_by.add(who)
        self.changed()

    def undrain(self, who: str) -> None:
        self._drained_by.discard(who)
        self.changed()

    async def told_draining(self) -> None:
        """Returns when the router has answered a poll that says so, or does not answer at all."""
        while self._link.up and not self._suspended and self._heard != "draining":
            await self._link.next_call()

    async def pause(self) -> None:
        """Takes nothing more until `resume`; returns when no request runs. Cancelled, it stays paused."""
        self._closed = True
        self.changed()
        await self._sender.wait_idle()

    def resume(self) -> None:
        self._closed = False
        self.changed()

    def changed(self) -> None:
        """Replaces the held poll if it tells something else than what is true now."""
        if self._told is None or self._scope is None:
            return
        view = self._view()
        if capacity.must_replace(self._told, view):
            self._replace()
        elif capacity.may_replace(self._told, view):
            self._scope.deadline = min(self._scope.deadline, self._soft_at + SOFT_REPLACE_SECONDS)

    def _replace(self) -> None:
        if self._scope is not None:
            self._scope.cancel()

    # the loop

    async def run(self, work: trio.Nursery) -> None:
        """Polls until cancelled; starts requests in `work`. Raises AgentError when the router says that we must end."""
        await self._sender.send_spooled()
        self.beats = 1
        while True:
            await self._link.turn()
            try:
                await self._turn(work)
            except RouterError as error:
                self._failed += 1
                await self._refused(error)
            self.beats += 1

    async def _turn(self, work: trio.Nursery) -> None:
        view = self._view()
        request = self._request(view)
        sent_at = trio.current_time()
        reply: PollReply | None = None
        self._told = view
        self._announce(view.phase, request.model)
        try:
            with trio.CancelScope() as self._scope, self._link.call("poll"):
                reply = await self._router.poll(request)
        finally:
            self._scope = None
            self.beats += 1
        if reply is None:
            self._replaced += 1
            self._soft_at = trio.current_time()
            return
        if self._suspended:
            self._suspended = False
            self._health.clear("agent_suspended")
        self._last_poll = self._clock.now()
        self._heard = view.phase
        self._clone_refusals = 0
        if self._last_poll > self._clone_seen + CLONE_SECONDS:
            self._health.clear("identity_in_use")
        self._sender.leases.renew(request.held, sent_at)
        self._apply(reply, work, view.capacity, sent_at)
        await self._pace(reply, request.wait_ms, trio.current_time() - sent_at)

    @property
    def waits(self) -> bool:
        """It has no poll under way and may not begin one."""
        return self.beats == 0 or (self._scope is None and self._link.closed)

    def _view(self) -> capacity.View:
        return capacity.View(
            ready=self._engine.ready,
            degraded=self._engine.degraded,
            draining=self.draining,
            closed=self._closed,
            ceiling=self._engine.ceiling,
            running=self._sender.running,
            health=tuple(self._health.conditions()),
            progress=self._progress(),
        )

    def _request(self, view: capacity.View) -> PollRequest:
        self._n += 1
        ttl = self._sender.leases.shortest_ttl()
        news = view.draining and self._heard != "draining"
        return PollRequest(
            boot=self._boot,
            n=self._n,
            phase=view.phase,
            capacity=view.capacity,
            wait_ms=capacity.wait_ms(view, sure=self._link.up and not self._suspended and not news, shortest_ttl=ttl),
            held=self._sender.leases.held(),
            model=self._model(),
            ceiling=view.ceiling,
            load=self._engine.load(),
            progress=view.progress,
            health=list(view.health),
            versions=self._versions(),
        )

    def _apply(self, reply: PollReply, work: trio.Nursery, room: int, sent_at: float) -> None:
        if reply.drain != (ROUTER in self._drained_by):
            self._drained_by ^= {ROUTER}
            log.info("router asks to drain" if reply.drain else "router ends the drain")
        self._idle_reason = reply.idle_reason
        self._generation = reply.generation
        self._generation_seen(reply.generation)
        self._sender.apply(reply.credit, reply.cancel)
        for lease in reply.leases:
            refused = refusal(lease, room=room, ready=self._engine.ready and not self._closed, draining=self.draining)
            out = self._sender.accept(lease, sent_at, refused)
            if out is not None:
                room -= 1
                work.start_soon(serve, lease, out, self._engine, self._router, name=f"lease {lease.id}")

    def _announce(self, phase: Phase, model: ModelState | None) -> None:
        """`ready` is what operators wait for: from this poll on the router may give work."""
        if phase == "ready" != self._announced:
            log.info("ready", extra={"model": model.id if model else None, "ceiling": self._engine.ceiling})
        self._announced = phase

    async def _pace(self, reply: PollReply, wait_ms: int, took: float) -> None:
        """Waits before the next poll where the router asks for it, or answers faster than makes sense."""
        if wait_ms and took < EMPTY_SECONDS and not reply.leases:
            delay = min(EMPTY_MAX_SECONDS, EMPTY_SECONDS * 2 ** min(self._empty, 16))
            self._empty += 1
        else:
            delay = 0.0
            self._empty = 0
        delay = max(delay, min(reply.retry_ms / 1000, RETRY_MAX_SECONDS))
        if delay:
            # As with a held poll, what must be told at once is.
            with trio.CancelScope() as self._scope:
                await trio.sleep(delay)
            self._scope = None

    async def _refused(self, error: RouterError) -> None:
        if error.action in FATAL:
            raise error
        if error.action is Action.CLONE:
            self._check_clone(error)
        elif error.action is Action.WAIT:
            if not self._suspended:
                self._suspended = True
                log.warning("agent suspended by the router: no work is taken", extra={"reason": error.message})
                self._health.set("agent_suspended", "suspended by the router", "ask the router's operator")
            await trio.sleep(SUSPENDED_SECONDS)
        elif error.action is Action.FINAL:
            log.error("poll refused", extra={"code": error.code, "reason": error.message})

    def _check_clone(self, error: RouterError) -> None:
        """Raises exit 14 when we are the later one, else warns. Where the reply does not say for sure who is, time
        tells: the router refuses the earlier one once in a while, the later one every time.
        """
        other = clone(error.problem, self._started)
        self._clone_refusals += 1
        if other.later is not False and (other.sure or self._clone_refusals < CLONE_REFUSALS):
            self._clone_seen = self._clock.now()
            log.warning(other.message)
            self._health.set("identity_in_use", other.message, "stop the copy, or give it a join key of its own")
            return
        raise AgentError(
            "identity_in_use",
            other.message,
            hint="every agent needs a config directory and an enrollment of its own",
            exit_code=Exit.ALREADY_RUNNING,
        ) from error

    def statistics(self) -> WorkStatistics:
        return WorkStatistics(
            link_up=self._link.up,
            phase=self._view().phase,
            suspended=self._suspended,
            draining=self.draining,
            drained_by=sorted(self._drained_by),
            paused=self._closed,
            polls=self._n,
            replaced_polls=self._replaced,
            failed_polls=self._failed,
            last_poll=self._last_poll,
            idle_reason=self._idle_reason,
            generation=self._generation,
            sender=self._sender.statistics(),
        )
