"""Why an agent is idle, as `status` says it."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from xim_agent.clock import SystemClock
from xim_agent.health import Health
from xim_agent.outside import Agent
from xim_agent.work.sender import SenderStatistics
from xim_agent.work.statistics import WorkStatistics

SENDER = SenderStatistics(0, 0, {}, 0, 0, 0, 0, 0.0, None, None)  # type: ignore[arg-type]
WELL = WorkStatistics(True, "ready", False, False, [], False, 1, 0, 0, None, "no request waits for toy", 1, SENDER)


def idle(ready: bool = True, expires: float = 3600.0, **changed: Any) -> list[str]:
    now = SystemClock().now()
    work = replace(WELL, last_poll=now, **changed)
    parts: dict[str, Any] = dict.fromkeys(("parts", "cache", "assignment", "sender", "machine"))
    return Agent(
        identity=SimpleNamespace(statistics=lambda: SimpleNamespace(token_expires=now + expires)),  # type: ignore[arg-type]
        engine=SimpleNamespace(ready=ready),  # type: ignore[arg-type]
        poller=SimpleNamespace(statistics=lambda: work),  # type: ignore[arg-type]
        health=Health(lambda: now), **parts,
    ).idle()  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "reasons"),
    [
        ({}, ["router: no request waits for toy"]),
        ({"idle_reason": None}, ["router: it has not said why there is no request"]),
        ({"paused": True}, ["switch: another model takes the place of this one"]),
        ({"sender": replace(SENDER, running=1), "ready": False}, []),
        ({"ready": False}, ["engine: no model is proven to answer yet"]),
        ({"drained_by": ["a stop", "an operator"], "draining": True},
         ["draining: a stop asked for it", "draining: an operator asked for it"]),
        ({"suspended": True}, ["suspended: the router lets this agent take no work"]),
        ({"link_up": False, "expires": -1.0},
         ["link: the router has not answered the last poll", "identity: there is no valid token"]),
    ],
)  # fmt: skip
def test_why_it_is_idle(changed: dict[str, Any], reasons: list[str]) -> None:
    assert idle(**changed) == reasons
