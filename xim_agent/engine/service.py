"""Keeps one vLLM running for the current target: starts, proves, watches, restarts by budget, switches, stops."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from xim_agent.assignment.plan import EngineTarget
from xim_agent.clock import Clock
from xim_agent.config.fields import Config
from xim_agent.engine.client import EngineClient
from xim_agent.engine.command import Plan
from xim_agent.engine.failures import UNEXPLAINED, Failure, classify
from xim_agent.engine.gate import Gate, ReadMemory
from xim_agent.engine.guard import Guard, GuardLost
from xim_agent.engine.oom import Counts
from xim_agent.engine.planner import Planner, Usable, always
from xim_agent.engine.probe import Probe
from xim_agent.engine.process import KILL_SECONDS, EngineRun, Hooks
from xim_agent.engine.scrape import Gauges, Scrape
from xim_agent.engine.state import EngineState, RestartBudget, may_follow
from xim_agent.engine.statistics import EngineStatistics
from xim_agent.errors import AgentError
from xim_agent.hardware.report import Hardware
from xim_agent.health import Health
from xim_agent.mesh.messages import Load, Progress
from xim_agent.watch import Watch

log = logging.getLogger("xim_agent.engine")


@dataclass(frozen=True)
class _Order:
    target: EngineTarget
    plan: Plan


class EngineService:
    """One engine at a time. `changed` is called, synchronously, when anything that a poll tells has changed.

    `runtime_dir`: 0700, of this agent alone, short. `compile_cache`: vLLM's version → a directory for its caches.
    `blocked`: true while a GPU of it is in trouble; call `recheck` when that changes.
    `gpu_memory`: blocking, what is free and who holds the rest, by the cards' uuids. `oom_kills`: see `OomKills`.
    """

    def __init__(
        self,
        *,
        config: Config,
        hardware: Hardware,
        guard: Guard,
        runtime_dir: Path,
        clock: Clock,
        health: Health,
        compile_cache: Callable[[str], Path],
        changed: Callable[[], None],
        blocked: Callable[[], bool] = lambda: False,
        gpu_memory: ReadMemory = lambda _: (),
        oom_kills: Callable[[], Counts] = lambda: (0, 0),
        usable: Usable | None = None,
    ) -> None:
        self._config, self._guard, self._clock, self._health, self._tell = config, guard, clock, health, changed
        self._blocked, self._on_cpu, self._oom_kills = blocked, hardware.accelerator == "cpu", oom_kills
        self._planner = Planner(config, usable or always(hardware), guard, runtime_dir, compile_cache)
        self._gate = Gate(guard, self._planner, gpu_memory)
        self.client = EngineClient(config.vllm_salt_secret)
        self.state = EngineState.STOPPED
        self._orders, self._changes = Watch(), Watch()
        self._order: _Order | None = None
        self._taken: _Order | None = None  # the order that `run` is or was last at work on
        self._interrupt: Callable[[], None] | None = None  # ends what `run` is at work on
        self._budget = RestartBudget()
        self._failure: Failure | None = None
        self._gauges = Gauges()
        self._ceiling, self._began, self._phase = 0, 0.0, ""
        self._seconds_to_ready: float | None = None
        self._starts = self._failures = 0
        self._calls = self._placed = 0  # of `switch` and `stop`: how many, and the latest that has come through

    # what others look at

    @property
    def ready(self) -> bool:
        return self.state is EngineState.READY and not self._blocked()

    @property
    def degraded(self) -> bool:
        """Not expected to work soon: it failed for good or too often, or a GPU is in trouble. No work is taken."""
        lasting = self._failure is not None and not self._failure.retry
        return not self.ready and (lasting or self._blocked() or self._budget.degraded(trio.current_time()))

    @property
    def ceiling(self) -> int:
        """Most leases at once; an estimate until vLLM has said what its KV cache holds, 0 without a target."""
        return self._ceiling if self._order else 0

    @property
    def progress(self) -> Progress | None:
        if self.state is not EngineState.STARTING:
            return None
        return Progress("engine", int(trio.current_time() - self._began), 0, 0.0, self._phase)

    def load(self) -> Load:
        return self._gauges.load

    def metrics_text(self) -> bytes:
        """vLLM's own exposition at the last look, empty while there is none."""
        return self._gauges.text

    def statistics(self) -> EngineStatistics:
        failure = self._failure.code if self._failure else None
        return EngineStatistics(
            self.state.value, self.degraded, self.ceiling, self.client.active, self._starts, self._failures, failure,
            self._seconds_to_ready, self.load(),
        )  # fmt: skip

    async def wait_ready(self) -> None:
        while not self.ready:
            await self._changes.wait_beyond(self._changes.version)

    # what others ask for

    async def switch(self, target: EngineTarget | None) -> None:
        """Returns when vLLM is being started for `target`, or has been stopped. Same argv and environment: no restart.

        Raises AgentError when the target cannot be served; what runs is untouched then. A later call supersedes.
        """
        if target is None:
            await self.stop()
            return
        self._calls = call = self._calls + 1
        order = _Order(target, await self._planner.plan(target))
        if self._placed > call:
            return
        self._placed = call
        for warning in order.plan.warnings:
            log.warning(warning)
        if self._order and order.plan.same_engine(self._order.plan) and self._failure is None:
            self._order = self._taken = order
            return
        self._place(order)
        while self._order is order and self._taken is not order:
            await self._changes.wait_beyond(self._changes.version)

    async def stop(self) -> None:
        """Ends vLLM: SIGTERM to its API server, 10 s, SIGKILL to all. Returns when nothing of it is left."""
        self._placed = self._calls = self._calls + 1
        self._place(None)
        while self._order is None and self.state is not EngineState.STOPPED:
            await self._changes.wait_beyond(self._changes.version)

    def _place(self, order: _Order | None) -> None:
        self._order = order
        self._ceiling = order.plan.ceiling if order else 0
        self._failure = None
        self._health.clear("engine_failed")
        self._budget.reset()
        self.client.poison.forget()
        if self._interrupt:
            self._interrupt()
            if self.state in (EngineState.STARTING, EngineState.READY):
                self._become(EngineState.DRAINING)
        self._orders.bump()

    def recheck(self) -> None:
        """After `blocked` has changed: what runs goes on, a start waits for it or is tried at once."""
        self._orders.bump()
        self._become(self.state)

    # the loop

    async def run(self) -> None:
        """Never returns. Cancelled: vLLM is killed within 5 s. Raises GuardLost and runtime_directory_in_use."""
        try:
            await self._planner.own_runtime()
            while True:
                seen, order = self._orders.version, self._order
                if order is None:
                    self._become(EngineState.STOPPED)
                    await self._orders.wait_beyond(seen)
                    continue
                if self._blocked():
                    self._taken = order
                    self._become(EngineState.FAILED)
                    await self._orders.wait_beyond(seen)
                    continue
                delay = await self._one_run(order)
                with trio.move_on_after(delay):
                    await self._orders.wait_beyond(seen)
        except* GuardLost:
            with trio.move_on_after(KILL_SECONDS, shield=True):
                await self._guard.end_orphans(self._planner.notes)
            raise

    async def _one_run(self, order: _Order) -> float:
        """Returns seconds to wait before the next."""
        hooks = Hooks(self._on_phase, self._on_ready, self._on_over, self._on_scrape)
        run = EngineRun(
            self._guard,
            Probe(self._planner.socket, order.target.assignment.serving.task),
            hooks,
            self.client,
            stall_seconds=self._config.engine_start_stall_seconds,
            hang_seconds=self._config.engine_hang_seconds,
            on_cpu=self._on_cpu,
            oom_kills=self._oom_kills,
        )
        self._interrupt, self._taken = run.stop, order
        self._starts += 1
        self._began = trio.current_time()
        self._phase = "starting vLLM"
        self._become(EngineState.STARTING)
        try:
            ended = await self._gate.run(run, order.plan)
        finally:
            self._interrupt = None
        if run.stopping:
            self._become(EngineState.STOPPED)
            return 0.0
        failure = classify(ended.status, ended.tail, ended.why, served=ended.ready_for > 0, oom=ended.oom)
        if failure.code == "engine_flag_unknown" and not failure.retry:
            try:
                if await self._plan_again(order):
                    self._become(EngineState.FAILED)
                    return 0.0
            except AgentError as error:
                failure = Failure(error.code, error.message, error.hint, retry=False)
        if ended.ready_for and (poison := self.client.crashed()):
            log.error("requests that ran at two crashes in a row are refused from now on", extra={"requests": poison})
        return self._failed(failure, ended.ready_for) if self._order else 0.0

    async def _plan_again(self, order: _Order) -> bool:
        """True when there is a better plan than that of `order`: vLLM did not know a flag of it."""
        with trio.CancelScope() as scope:
            self._interrupt = scope.cancel
            try:
                if not await self._planner.learn_flags(order.plan):
                    return False
                made = await self._planner.plan(order.target)
            finally:
                self._interrupt = None
            for warning in made.warnings:
                log.warning(warning)
            if self._order:
                self._order = _Order(self._order.target, made)
        return True

    def _failed(self, failure: Failure, ready_for: float) -> float:
        self._failure = failure
        self._failures += 1
        delay = self._budget.failed(trio.current_time(), ready_for)
        if not failure.retry:
            delay = math.inf  # the same start fails the same way: another assignment or configuration is waited for
        self._health.set("engine_failed", failure.text, failure.remedy)
        self._become(EngineState.FAILED)
        next_start = delay if failure.retry else None
        known = {"error_class": failure.code, "remedy": failure.remedy, "next_start_seconds": next_start}
        tail = f"\n{failure.tail}" if failure.code in UNEXPLAINED and failure.tail else ""
        log.error("%s%s", failure.text, tail, extra=known)
        return delay

    def _become(self, state: EngineState) -> None:
        if state is not self.state:
            assert may_follow(self.state, state), f"{self.state} -> {state}"
            self.state = state
        self._changes.bump()
        self._tell()

    # what a run tells

    def _on_phase(self, phase: str) -> None:
        if phase != self._phase:
            self._phase = phase
            self._tell()

    def _on_ready(self) -> None:
        if self.state is not EngineState.STARTING:
            return
        self._seconds_to_ready = trio.current_time() - self._began
        self._failure = None
        self._health.clear("engine_failed")
        self.client.attach(self._planner.socket)
        self._become(EngineState.READY)
        log.info("engine ready", extra={"seconds": round(self._seconds_to_ready, 1), "ceiling": self._ceiling})

    def _on_over(self) -> None:
        """At once, so that no answer cut by the engine's end passes for a whole one."""
        self.client.detach()
        self._gauges = Gauges()
        if self.state in (EngineState.STARTING, EngineState.READY):
            self._become(EngineState.FAILED)

    def _on_scrape(self, text: str, found: Scrape) -> None:
        self._gauges.note(text, found, trio.current_time())
        if found.kv_tokens and self._taken:
            self._ceiling = self._taken.plan.ceiling_for(found.kv_tokens)
