"""How a running agent is seen and reached from outside: its status, the metrics port, the control socket."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import msgspec
import trio

from xim_agent import PROTOCOL, __version__, agent, leaks
from xim_agent.assignment.service import AssignmentService
from xim_agent.cache import control as cache_control
from xim_agent.cache.admin import Commands
from xim_agent.cache.claim import announce
from xim_agent.cache.service import Cache
from xim_agent.cli.status_show import one_line
from xim_agent.clock import Clock, SystemClock
from xim_agent.config.config import describe
from xim_agent.config.fields import Config
from xim_agent.config.level import reread
from xim_agent.config.paths import control_name, runtime_directory
from xim_agent.control import commands
from xim_agent.control.server import ControlServer
from xim_agent.engine.service import EngineService
from xim_agent.hardware.machine import Machine
from xim_agent.health import Health
from xim_agent.history import History
from xim_agent.identity.service import IdentityService
from xim_agent.log import hidden, kept, redact
from xim_agent.mesh.client import RouterClient
from xim_agent.metrics.registry import Collector
from xim_agent.metrics.server import MetricsServer
from xim_agent.notify import Notifier
from xim_agent.watch import Changed
from xim_agent.work.poller import Poller
from xim_agent.work.sender import Sender

# A poll is held for 25 s at most.
SILENT_SECONDS = 60.0
# Of `status` and `requests`: raised when a member goes or changes its meaning.
SCHEMA = 1
# What a supervisor adds, for the end of the program itself.
SPARE_SECONDS = 5.0


def longest_stop(drain_seconds: float) -> float:
    """Seconds from the signal to the end of the process, at most: what a supervisor has to wait before it kills."""
    return drain_seconds + agent.TELL_SECONDS + agent.FLUSH_SECONDS + agent.ENGINE_STOP_SECONDS


@dataclass(frozen=True)
class Agent:
    """One agent, wired."""

    parts: agent.Parts
    identity: IdentityService
    cache: Cache
    assignment: AssignmentService
    engine: EngineService
    poller: Poller
    sender: Sender
    health: Health
    machine: Machine
    stop: trio.Event = field(default_factory=trio.Event)
    status: Callable[[], dict[str, Any]] = field(default=dict)

    def reasons(self) -> list[str]:
        """Why this agent is not ready: link up, engine proven, not draining; empty when it is."""
        work, now = self.poller.statistics(), SystemClock().now()
        reasons = [] if work.link_up else ["link: the router has not answered the last poll"]
        if work.link_up and now - (work.last_poll or now) > SILENT_SECONDS:
            reasons.append("link: no poll was answered for a minute")
        if not self.has_token():
            reasons.append("identity: there is no valid token")
        if not self.engine.ready:
            reasons.append("engine: no model is proven to answer yet")
        reasons += [f"draining: {who} asked for it" for who in work.drained_by]
        if work.suspended:
            reasons.append("suspended: the router lets this agent take no work")
        if reasons:
            reasons += self.health.sentences()
        return reasons

    def has_token(self) -> bool:
        return (self.identity.statistics().token_expires or 0) >= SystemClock().now()

    def idle(self) -> list[str]:
        """Why no request runs now; empty while one does."""
        work = self.poller.statistics()
        if work.sender.running:
            return []
        if reasons := self.reasons():
            return reasons
        if work.paused:
            return ["switch: another model takes the place of this one"]
        return [f"router: {work.idle_reason or 'it has not said why there is no request'}"]

    def view(self) -> dict[str, str]:
        """What `history` keeps the changes of."""
        work, model = self.poller.statistics(), self.assignment.statistics().model
        return {
            "state": work.phase,
            "router": "answers" if work.link_up else "does not answer",
            "drain": ", ".join(work.drained_by),
            "model": f"{model.name} {model.revision}" if model else "",
            "engine": self.engine.statistics().state,
            **{f"trouble {c.code}": c.text for c in self.health.conditions()},
        }


@dataclass(frozen=True)
class Process:
    version: str
    protocol: int
    started: float
    pid: int


def reachable(made: Agent, config: Config, clock: Clock, router: RouterClient, changed: Changed) -> Agent:
    """With the listeners for operators and for what collects metrics, and with what a SIGHUP does."""
    process = Process(__version__, PROTOCOL, clock.now(), os.getpid())
    statistics: dict[str, Callable[[], Any]] = {
        "identity": made.identity.statistics,
        "work": made.poller.statistics,
        "mesh": router.statistics,
        "cache": made.cache.statistics,
        "assignment": made.assignment.statistics,
        "engine": made.engine.statistics,
    }

    history = History(clock.now, made.view)

    def news() -> None:
        history.look()
        made.poller.changed()

    changed.listener = made.health.on_change = news

    def status() -> dict[str, Any]:
        history.look()
        return {
            "schema": SCHEMA,
            "agent": process,
            "config": describe(config),
            "not_ready": made.reasons(),
            "idle": made.idle(),
            "health": made.health.report(),
            "hardware": made.machine.hardware,
            "history": history.changes(),
            **{name: report() for name, report in statistics.items()},
        }

    def shown() -> dict[str, Any]:
        """As JSON."""
        found: dict[str, Any] = _plain(status())
        return found

    listeners = [_control(made, config, shown)]
    if not config.disable_metrics_server:
        more: dict[str, Callable[[], Any]] = {
            "agent": lambda: process,
            "ready": lambda: not made.reasons(),
            "health": lambda: {c.code: 1 for c in made.health.conditions()},
            "times": lambda: made.sender.times,
            "streams": lambda: made.engine.client.streams,
            "transfers": lambda: made.cache.counters,
        }
        listeners.append(_metrics(made, config, status, Collector(statistics | more)))
    all_listeners = (*made.parts.listeners, *listeners)
    parts = replace(made.parts, listeners=all_listeners, on_hangup=partial(reread, config))
    return replace(made, parts=parts, status=shown)


def told(made: Agent, systemd: Notifier) -> Agent:
    """With the listeners that tell systemd. They are the last ones: READY comes when all the others listen."""

    async def enrolled() -> None:
        if not made.identity.enrolled:
            await made.identity.wait_bearer()

    listeners = (
        systemd.deliver,
        partial(systemd.stopping, made.stop, longest_stop(made.parts.drain_seconds) + SPARE_SECONDS),
        partial(
            systemd.watch,
            beats=lambda: made.poller.beats,
            excused=lambda: made.poller.waits or not made.has_token(),
            status=lambda: one_line(made.status()),
        ),
        partial(systemd.ready, enrolled),
    )
    on_hangup = partial(systemd.reload, made.parts.on_hangup)
    parts = replace(made.parts, listeners=(*made.parts.listeners, *listeners), on_hangup=on_hangup)
    return replace(made, parts=parts)


def _plain(value: Any) -> Any:
    """As JSON has it, without secrets."""
    return json.loads(redact(msgspec.json.encode(value, enc_hook=str).decode()))


def _logs(status: dict[str, Any]) -> dict[str, Any]:
    """The last lines, and which secrets that only this process knows are in them or in the status, encoded."""
    agent, engine = kept.agent(), kept.engine()
    members = {"status.json": json.dumps(status, ensure_ascii=False)}
    members |= {"log-agent.jsonl": "\n".join(agent), "log-engine.jsonl": "\n".join(engine)}
    return {"agent": agent, "engine": engine, "leaks": leaks.find(members, hidden())}


def _metrics(made: Agent, config: Config, status: Callable[[], dict[str, Any]], collector: Collector) -> Any:
    server = MetricsServer(
        collect=collector,
        ready=made.reasons,
        status=status,
        engine_text=made.engine.metrics_text,
        redact=redact,
    )
    return partial(server.run, config.metrics_host, config.metrics_port)


def _control(made: Agent, config: Config, status: Callable[[], dict[str, Any]]) -> Any:
    """Operators' commands. The cache is ours alone, so a socket that is named by it is too."""
    store = made.cache.store
    path = runtime_directory(config.config_path, os.environ) / control_name(store.root)
    own = commands.calls(
        status=status,
        requests=lambda: {"schema": SCHEMA, "requests": _plain(made.sender.requests())},
        logs=lambda: _logs(status()),
        drain=partial(made.poller.drain, commands.OPERATOR),
        resume=partial(made.poller.undrain, commands.OPERATOR),
        drained_by=lambda: made.poller.statistics().drained_by,
        drained=made.sender.wait_idle,
    )
    calls = cache_control.calls(Commands(made.cache, agent=True)) | own
    return ControlServer(path, calls, partial(announce, store.lock)).run
