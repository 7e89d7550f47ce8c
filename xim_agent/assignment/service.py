"""Keeps the engine on the assigned model: assignment → cache → engine."""

import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

from xim_agent.assignment.plan import Agenda, Change, EngineTarget, change
from xim_agent.backoff import Backoff
from xim_agent.errors import AgentError
from xim_agent.health import Health
from xim_agent.mesh.messages import Assignment, ModelRef, ModelState, Progress
from xim_agent.outcome import Action, RouterError
from xim_agent.watch import Watch

log = logging.getLogger("xim_agent.assignment")

_SUSPENDED = 30.0
_TEMPORARY = {Action.RETRY, Action.REFRESH, Action.CLOCK, Action.WAIT}


class Verifier(Protocol):
    async def verify_assignment(self, jws: str) -> Assignment: ...
    def remembered_assignment(self) -> Assignment | None: ...
    async def forget_assignment(self) -> None: ...


class AssignmentSource(Protocol):
    async def assignment(self) -> str | None: ...


class ModelCache(Protocol):
    async def ensure(
        self,
        model: ModelRef,
        report: Callable[[Progress], None],
        release: Callable[[], Awaitable[None]] | None = None,
    ) -> Path: ...
    def pin(self, model: ModelRef) -> None: ...
    def unpin(self, model: ModelRef) -> None: ...


class Switchable(Protocol):
    async def switch(self, target: EngineTarget | None) -> None: ...


class Intake(Protocol):
    async def pause(self) -> None:
        """No new leases; returns when none is held."""

    def resume(self) -> None: ...


@dataclass(frozen=True)
class AssignmentStatistics:
    """`generation`: what runs, 0 = nothing; `wanted`: what the router speaks of, None = not heard yet."""

    generation: int
    wanted: int | None
    model: ModelRef | None
    refused: str | None
    progress: Progress | None


class AssignmentService:
    def __init__(
        self,
        *,
        identity: Verifier,
        router: AssignmentSource,
        cache: ModelCache,
        engine: Switchable,
        intake: Intake,
        health: Health,
        changed: Callable[[], None] = lambda: None,
        rand: Callable[[], float] = random.random,
    ) -> None:
        self._identity, self._router, self._cache, self._engine = identity, router, cache, engine
        self._intake, self._health, self._changed, self._rand = intake, health, changed, rand
        self._agenda = Agenda()
        self._watch = Watch()
        self._backoff = Backoff()
        self._running: Assignment | None = None
        self._pinned: list[ModelRef] = []
        self._fetching: trio.CancelScope | None = None
        self._refused: str | None = None
        self.progress: Progress | None = None

    def generation_seen(self, generation: int) -> None:
        """The generation in a poll's reply; another one than the one in work stops its fetch."""
        self._agenda.seen = generation
        if self._agenda.news():
            self._watch.bump()
            if self._fetching is not None:
                self._fetching.cancel()

    def again(self) -> None:
        """What runs goes on, its assignment is fetched and verified anew."""
        self._agenda.again(trio.current_time())
        self._watch.bump()

    def model_state(self) -> ModelState | None:
        """What runs; None while nothing does."""
        now = self._running
        return ModelState(now.model.id, now.model.revision, now.generation) if now else None

    def statistics(self) -> AssignmentStatistics:
        now = self._running
        return AssignmentStatistics(
            now.generation if now else 0, self._agenda.seen, now.model if now else None, self._refused, self.progress
        )

    async def run(self) -> None:
        """Never returns. The remembered assignment comes first, so that the engine starts while no router answers.

        Raises RouterError of a class that ends the process (removed, protocol, clone).
        """
        remembered = self._identity.remembered_assignment()
        if remembered is not None:
            await self._handle(remembered.generation, remembered)
        while True:
            await self._wait_due()
            try:
                jws = await self._router.assignment()
                wanted = await self._wanted(jws)
            except RouterError as e:
                await self._router_failed(e)
            except AgentError as e:
                self._refuse(e)
                self._agenda.take(self._agenda.seen or 0)
                self._agenda.refuse(trio.current_time())
            else:
                generation = wanted.generation if wanted else 0
                if generation == self._agenda.handled and self._agenda.retry_at is None:
                    await self._pause()  # the router speaks of another generation than it hands out
                else:
                    self._backoff.reset()
                await self._handle(generation, wanted)

    async def _wanted(self, jws: str | None) -> Assignment | None:
        if jws is not None:
            return await self._identity.verify_assignment(jws)
        try:
            await self._identity.forget_assignment()
        except AgentError as e:  # obeyed all the same: only a start without the router would begin with the old one
            log.warning("assignment not forgotten", extra={"code": e.code, "error": e.message})
        return None

    async def _wait_due(self) -> None:
        while not self._agenda.due(trio.current_time()):
            seen = self._watch.version
            retry_at = self._agenda.retry_at
            with trio.move_on_at(retry_at if retry_at is not None else float("inf")):
                await self._watch.wait_beyond(seen)

    async def _handle(self, generation: int, wanted: Assignment | None) -> None:
        self._agenda.take(generation)
        try:
            await self._apply(wanted)
        except RouterError as e:
            if e.action is not Action.FINAL:
                raise
            self._refuse(e)
            self._agenda.refuse(trio.current_time())
        except AgentError as e:
            self._refuse(e)
            self._agenda.refuse(trio.current_time())
        else:
            if not self._agenda.news():
                self._refused = None
                self._health.clear("model_refused")
        finally:
            self._fetching = self.progress = None
            self._changed()

    async def _apply(self, wanted: Assignment | None) -> None:
        """Returns also when a newer generation interrupts the fetch."""
        todo = change(self._running, wanted)
        if todo is Change.NONE:
            return
        if wanted is None:
            await self._stop()
            log.info("no model is assigned")
            return
        log.info("model assigned", extra={"model": wanted.model.name, "generation": wanted.generation})
        path: Path | None = None
        with trio.CancelScope() as self._fetching:
            path = await self._cache.ensure(wanted.model, self._report, self._stop if self._pinned else None)
        self._fetching = None
        if path is None:
            log.info("fetch stopped for a newer assignment", extra={"model": wanted.model.name})
            return
        await self._switch(EngineTarget(wanted, path), drain=todo is Change.SWITCH)

    async def _switch(self, target: EngineTarget, drain: bool) -> None:
        model = target.assignment.model
        self._cache.pin(model)
        self._pinned.append(model)
        try:
            if drain and self._running is not None:
                await self._intake.pause()
            await self._engine.switch(target)
            self._running = target.assignment
        finally:
            self._intake.resume()
        self._unpin_others(model)
        self._changed()

    def _unpin_others(self, kept: ModelRef | None) -> None:
        for old in self._pinned:
            if kept is None or old.manifest != kept.manifest:
                self._cache.unpin(old)
        self._pinned = [kept] if kept else []

    async def _stop(self) -> None:
        """Leases finish, the engine stops, its model may be evicted. A newer generation does not cut this short."""
        scope, self._fetching = self._fetching, None
        try:
            await self._intake.pause()
            self._running = None
            await self._engine.switch(None)
        finally:
            self._intake.resume()
        self._unpin_others(None)
        self._fetching = scope
        if scope is not None and self._agenda.news():
            scope.cancel()
        self._changed()

    # -- small parts ---------------------------------------------------------------------------------------------

    def _report(self, progress: Progress) -> None:
        started = self.progress is None or self.progress.stage != progress.stage
        self.progress = progress
        if started:
            self._changed()

    def _refuse(self, error: AgentError) -> None:
        log.error("model refused", extra={"code": error.code, "error": error.message, "hint": error.hint})
        self._refused = f"{error.code}: {error.message}"
        self._health.set("model_refused", error.message, error.hint)

    async def _router_failed(self, error: RouterError) -> None:
        if error.action is Action.FINAL:
            self._refuse(error)
        elif error.action not in _TEMPORARY:
            raise error
        await self._pause(error.retry_after, _SUSPENDED if error.action in (Action.WAIT, Action.FINAL) else 0.0)

    async def _pause(self, retry_after: float | None = None, least: float = 0.0) -> None:
        await trio.sleep(max(least, self._backoff.next(self._rand(), retry_after)))
