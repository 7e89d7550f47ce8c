"""THE TREE. SERVICES outlive all work, WORK holds a task per lease, the engine's CHILD is inside its service.

    root cancel scope                 cancelled by the second signal: "abandon"
    └─ SERVICES                       an exception here ends the process
       ├─ signals · metrics server · control socket · systemd · cache.watch · GPU watch
       ├─ identity.service            load or enroll; refresh
       ├─ engine.service              restart loop; one CHILD nursery per run of vLLM
       ├─ assignment.service          assignment → cache.ensure → engine.switch
       ├─ work.sender                 outbox → /v1/work/events
       ├─ work.poller                 heartbeat and intake; starts requests in WORK; polls until SERVICES is cancelled
       └─ WORK                        gets its deadline when a stop is asked for

Stop: closed and told → WORK empties or meets its deadline → endings flushed → engine stopped → SERVICES cancelled.
"""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import trio

from xim_agent import signals

log = logging.getLogger("xim_agent")

TELL_SECONDS = 5.0
FLUSH_SECONDS = 5.0
# SIGTERM to the API server, 10 s, SIGKILL to all of the tree, 5 s.
ENGINE_STOP_SECONDS = 15.0
REMAINS_EVERY_SECONDS = 10.0


class Service(Protocol):
    async def run(self) -> None: ...


class Engine(Service, Protocol):
    async def stop(self) -> None: ...


class Poller(Protocol):
    async def run(self, work: trio.Nursery) -> None: ...
    def drain(self) -> None: ...
    async def told_draining(self) -> None: ...


class Sender(Service, Protocol):
    async def flushed(self) -> None: ...
    def spool(self) -> None: ...
    def remains(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class Parts:
    """What the tree runs. `listeners` become ready in bounded time and are started first, in order."""

    identity: Service
    engine: Engine
    assignment: Service
    poller: Poller
    sender: Sender
    listeners: tuple[Callable[..., Awaitable[Any]], ...]
    drain_seconds: float
    on_hangup: Callable[[], None] = field(default=lambda: None)


async def run(
    parts: Parts,
    *,
    stop: trio.Event | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Returns after a stop was asked for by a signal or by `stop`; a second signal cuts everything at once.

    Raises what a service raised, as a group. Cancellation abandons: nothing is flushed, and the guard ends the engine.
    """
    stop = trio.Event() if stop is None else stop
    with trio.CancelScope() as root:
        async with trio.open_nursery() as services:
            await services.start(signals.watch, stop, root, parts.on_hangup)
            for listener in parts.listeners:
                await services.start(listener)
            services.start_soon(parts.identity.run)
            services.start_soon(parts.engine.run)
            services.start_soon(parts.assignment.run)
            services.start_soon(parts.sender.run)
            async with trio.open_nursery() as work:
                # The poller outlives WORK: it has stopped starting requests before WORK closes.
                services.start_soon(parts.poller.run, work)  # noqa: ASYNC111
                task_status.started()
                await stop.wait()
                _phase(parts, "1/4: the router is told", TELL_SECONDS)
                parts.poller.drain()
                with trio.move_on_after(TELL_SECONDS):
                    await parts.poller.told_draining()
                _phase(parts, "2/4: requests finish", parts.drain_seconds)
                deadline = trio.current_time() + parts.drain_seconds
                work.cancel_scope.deadline = deadline
                services.start_soon(_remains, parts, deadline)
            _phase(parts, "3/4: the last endings are sent", FLUSH_SECONDS)
            with trio.move_on_after(FLUSH_SECONDS):
                await parts.sender.flushed()
            parts.sender.spool()
            _phase(parts, "4/4: the engine is stopped", ENGINE_STOP_SECONDS)
            with trio.move_on_after(ENGINE_STOP_SECONDS):
                await parts.engine.stop()
            services.cancel_scope.cancel()
    log.info("stopped" if not root.cancelled_caught else "abandoned")


def _phase(parts: Parts, what: str, seconds: float) -> None:
    log.info(f"drain {what}", extra={**parts.sender.remains(), "seconds_at_most": round(seconds)})


async def _remains(parts: Parts, deadline: float) -> None:
    while parts.sender.remains()["requests"]:
        await trio.sleep(REMAINS_EVERY_SECONDS)
        if (found := parts.sender.remains())["requests"]:
            log.info("drain goes on", extra={**found, "seconds_left": round(deadline - trio.current_time())})
