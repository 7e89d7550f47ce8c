"""`run` after an error that trying again cannot cure: it ends; or, where nobody reads exit codes, stays and tells why.

A container is started again whatever its exit code was, and a join key, say, would be tried for ever.
"""

import logging
import os
import signal
from collections.abc import Callable
from typing import Any

from xim_agent.cli.healthcheck import METRICS
from xim_agent.cli.render import code_of_named
from xim_agent.config import sources
from xim_agent.errors import FINAL, AgentError, leaves

log = logging.getLogger("xim_agent")

AGAIN_SECONDS = 600.0
PARKED = "parked: nothing is tried before a restart"


def or_park(serve: Callable[[], None], flags: sources.Flags) -> None:
    """Runs `serve`. A final error that it raises goes on or, with --on-final-error park, is told until a signal."""
    try:
        serve()
    except (AgentError, BaseExceptionGroup) as error:
        causes = _final(error)
        if not causes or sources.alone("on_final_error", flags, os.environ) != "park":
            raise
    else:
        return

    import trio

    from xim_agent.engine.guard import die_with_parent

    die_with_parent()
    trio.run(parked, causes, flags)


def _final(error: BaseException) -> list[tuple[str, str, str]]:
    """Code, message and hint of each; none when a supervisor should start the agent again."""
    found = [e for e in leaves(error) if not isinstance(e, KeyboardInterrupt)]
    named = [e for e in found if isinstance(e, AgentError)]
    if not named or len(named) < len(found) or code_of_named(named) not in FINAL:
        return []
    return [(e.code, e.message, e.hint) for e in named]


async def parked(causes: list[tuple[str, str, str]], flags: sources.Flags) -> None:
    """Until SIGTERM or SIGINT. Holds no lock, so that `enroll`, say, can be run beside it."""
    import trio

    from xim_agent.clock import SystemClock
    from xim_agent.health import Health

    health = Health(SystemClock().now)
    for code, message, hint in causes:
        health.set(code, message, hint)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as received:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_tell, health)
            nursery.start_soon(_answer, health, flags)
            async for number in received:
                if number != signal.SIGHUP:  # a reload: there is nothing to read again
                    log.info(f"{signal.Signals(number).name}: stopped")
                    break
            nursery.cancel_scope.cancel()


async def _tell(health: Any) -> None:
    import trio

    while True:
        log.error(f"{PARKED}; {'; '.join(health.sentences())}", extra={"codes": [c.code for c in health.conditions()]})
        await trio.sleep(AGAIN_SECONDS)


async def _answer(health: Any, flags: sources.Flags) -> None:
    """The metrics port as of a running agent, as far as its settings are right and it can be had."""
    from xim_agent import PROTOCOL, __version__
    from xim_agent.log import redact
    from xim_agent.metrics.registry import Collector
    from xim_agent.metrics.server import MetricsServer
    from xim_agent.outside import Process

    host, port, off = (sources.alone(attr, flags, os.environ) for attr in METRICS)
    if off:
        return
    process = Process(__version__, PROTOCOL, health.now(), os.getpid())
    reasons = [PARKED, *health.sentences()]
    status = {"agent": process, "parked": True, "not_ready": reasons, "idle": reasons, "health": health.report()}
    conditions = {condition.code: 1 for condition in health.conditions()}
    server = MetricsServer(
        collect=Collector({"agent": lambda: process, "ready": lambda: False, "health": lambda: conditions}),
        ready=lambda: reasons,
        status=lambda: status,
        engine_text=lambda: b"",
        redact=redact,
    )
    try:
        await server.run(host, port)
    except AgentError as error:
        log.warning(f"parked without /readyz: {error.message}")
