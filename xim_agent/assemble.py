"""Configuration → the parts of one agent, wired. Nothing runs here; `agent.run` does that."""

import logging
import os
import platform
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio

from xim_agent import __version__, agent, notify, outside
from xim_agent.assignment.service import AssignmentService
from xim_agent.cache.service import Cache
from xim_agent.clock import Clock, SystemClock
from xim_agent.config import sources
from xim_agent.config.fields import Config
from xim_agent.config.paths import runtime_directory
from xim_agent.engine.environment import gpu_environment
from xim_agent.engine.guard import Guard
from xim_agent.engine.service import EngineService
from xim_agent.errors import AgentError, leaves
from xim_agent.hardware.holders import read_memory
from xim_agent.hardware.host import oom_kills
from xim_agent.hardware.machine import Machine
from xim_agent.hardware.report import Hardware, report
from xim_agent.hardware.watch import watch_for
from xim_agent.health import Health
from xim_agent.identity.join_key import JoinKey, parse_router_url
from xim_agent.identity.service import IdentityService
from xim_agent.identity.store import LOCK, StateStore
from xim_agent.mesh.client import RouterClient
from xim_agent.outcome import SKEW_SECONDS, Action, RouterError
from xim_agent.outside import Agent
from xim_agent.watch import Changed
from xim_agent.work.link import Link
from xim_agent.work.poller import Poller
from xim_agent.work.sender import Sender
from xim_agent.work.spool import Spool

log = logging.getLogger("xim_agent")

GB = 10**9

# The guard of a killed agent keeps the lock until it has cleaned up, which takes it at most 10 s.
LOCK_SECONDS = 15.0


def agent_info(config: Config) -> dict[str, Any]:
    host = socket.gethostname()
    return {
        "name": config.name or host,
        "version": __version__,
        "os": platform.system().lower(),
        "arch": platform.machine(),
        "hostname": host,
    }


def skew_condition(health: Health, skew: float) -> None:
    """`skew`: seconds the router is ahead of us."""
    if abs(skew) > SKEW_SECONDS:
        way = "behind" if skew > 0 else "ahead of"
        health.set("clock_skew", f"the clock is {abs(skew):.0f} s {way} the router's", "start chrony or ntpd")
    else:
        health.clear("clock_skew")


def make_identity(
    config: Config, store: StateStore, router: RouterClient, health: Health, hardware: Callable[[], Hardware]
) -> IdentityService:
    identity = IdentityService(
        store=store,
        transport=router,
        clock=SystemClock(),
        health=health,
        join_key=lambda: JoinKey.parse(text) if (text := sources.join_key(config)) else None,
        router_url=parse_router_url(config.router_url) if config.router_url else None,
        agent_info=agent_info(config),
        hardware=lambda: report(hardware(), cache_bytes=int(config.model_cache_max_size_gb * GB)),
        max_concurrent=config.max_concurrent,
    )
    router.credentials = identity
    return identity


async def open_store(directory: Path) -> StateStore:
    """The locked state; waits while the guard of a killed agent still cleans up. Raises AgentError (exit 14, 77)."""
    give_up = trio.current_time() + LOCK_SECONDS
    while True:
        try:
            return StateStore.open(directory)
        except AgentError as error:
            if error.code != "already_running" or trio.current_time() > give_up:
                raise
            if _lives(directory / LOCK):
                raise
        await trio.sleep(0.1)


@asynccontextmanager
async def assemble(config: Config, guard: Guard) -> AsyncIterator[Agent]:
    """Opens what must be open for the whole life (state lock, cache lock, connections) and closes it afterwards.

    Raises AgentError for a state or cache directory that cannot be used, or is in use.
    """
    systemd = notify.take(os.environ)
    clock = SystemClock()
    health = Health(clock.now)
    machine = await Machine.find(config, gpu_environment(config, os.environ))
    store = await open_store(config.config_path)
    try:
        async with (
            RouterClient(
                insecure=config.allow_insecure, clock=clock, on_skew=partial(skew_condition, health)
            ) as router,
            Cache(
                directory=config.model_cache_path,
                max_bytes=int(config.model_cache_max_size_gb * GB),
                downloads=config.model_cache_downloads,
                source=router,
                allow_unsafe=config.allow_unsafe_files,
                clock=clock,
                health=health,
            ) as cache,
        ):
            await guard.hold(store.lock)
            made = _wire(config, guard, clock, health, machine, store, router, cache)
            if systemd is not None:
                made = outside.told(made, systemd)
            try:
                yield made
            except* RouterError as group:
                if any(isinstance(e, RouterError) and e.action is Action.REMOVED for e in leaves(group)):
                    with trio.move_on_after(5, shield=True):
                        raise await made.identity.removed() from None
                raise
    finally:
        store.close()


def _lives(lock: Path) -> bool:
    pid = lock.read_text(encoding="ascii", errors="replace").strip()
    return Path("/proc", pid or "self").exists()


def _wire(
    config: Config,
    guard: Guard,
    clock: Clock,
    health: Health,
    machine: Machine,
    store: StateStore,
    router: RouterClient,
    cache: Cache,
) -> Agent:
    identity = make_identity(config, store, router, health, lambda: machine.hardware)
    changed = Changed()
    cards = watch_for(machine, health)
    engine = EngineService(
        config=config,
        hardware=machine.hardware,
        guard=guard,
        runtime_dir=runtime_directory(config.config_path, os.environ),
        clock=clock,
        health=health,
        compile_cache=cache.compile_cache_dir,
        changed=changed,
        blocked=lambda: cards.in_trouble, gpu_memory=read_memory, oom_kills=oom_kills, usable=machine.usable,
    )  # fmt: skip
    cards.changed = engine.recheck
    boot = secrets.token_urlsafe(12)
    link = Link(health=health, unreachable=identity.unreachable)
    sender = Sender(router=router, boot=boot, link=link, spool=Spool(config.config_path / "spool"))
    poller = Poller(
        router=router,
        sender=sender,
        engine=engine,
        link=link,
        health=health,
        clock=clock,
        boot=boot,
        generation_seen=lambda generation: assignment.generation_seen(generation),
        model=lambda: assignment.model_state(),
        progress=lambda: assignment.progress or engine.progress,
        versions=lambda: {"agent": __version__} | ({"vllm": cache.vllm} if cache.vllm else {}),
    )
    assignment = AssignmentService(
        identity=identity.assignments,
        router=router,
        cache=cache,
        engine=engine,
        intake=poller,
        health=health,
        changed=changed,
    )
    identity.outdated = assignment.again
    made = Agent(
        identity=identity, cache=cache, assignment=assignment, engine=engine, poller=poller, sender=sender,
        health=health, machine=machine, parts=agent.Parts(
            identity=identity, engine=engine, assignment=assignment, poller=poller, sender=sender,
            listeners=(cache.watch, cards.run), drain_seconds=config.drain_timeout_seconds,
        ),
    )  # fmt: skip
    return outside.reachable(made, config, clock, router, changed)
