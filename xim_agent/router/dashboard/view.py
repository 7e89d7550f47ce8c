"""What the dashboard shows, as plain data: the rows of the database joined with what the dispatcher knows."""

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from xim_agent.router.catalog import Assigned, Published
from xim_agent.router.fleet import Agent
from xim_agent.router.jobs import Limits
from xim_agent.router.lifecycle import lifecycle
from xim_agent.text import printable

KEEP_TEXT = 300
KEEP_PARSED = 4096  # characters; a machine with 8 GPUs says 3,000, and longer ones must not fill the memory


def agent_view(
    row: Mapping[str, Any], agent: Agent | None, assigned: Assigned | None, *, now: float, wall: float, limits: Limits
) -> dict[str, Any]:
    """One agent. `row`: of table agents; `agent`: None while it has not polled since the router started."""
    hardware, info = _object(row["hardware"]), _object(row["info"])
    found = hardware.get("devices")
    devices = [d.get("name") for d in found if isinstance(d, dict)] if isinstance(found, list) else []
    cpu = hardware.get("cpu")
    model = cpu.get("model") if isinstance(cpu, dict) else None
    seen = wall - agent.silent(now) if agent else row["last_seen"]
    load = agent.load if agent else None
    return {
        "id": row["agent_id"],
        "name": _text(row["name"]),
        "project": row["project"],
        "region": row["region"],
        "version": _text(info.get("version")),
        "tier": _text(hardware.get("tier")),
        "accelerator": _text(", ".join(map(str, devices)) or model or hardware.get("accelerator")),
        "status": _status(row, agent, now, wall, limits),
        "phase": agent.phase if agent else None,
        "model": (agent and agent.serves) or (assigned.model.name if assigned else None),
        "assigned": f"{assigned.model.name}@{assigned.model.revision}" if assigned else None,
        "progress": _progress(agent),
        "running": len(agent.grants) if agent else 0,
        "waiting": max(0, load.waiting) if load and load.waiting is not None else None,
        "tokens_per_s": _number(load.tokens_per_s) if load else None,
        "kv_usage": _number(load.kv_usage) if load else None,
        "ceiling": agent.ceiling if agent else row["max_concurrent"],
        "last_seen": seen,
        "health": [
            {"code": _text(c.code), "text": _text(c.text), "since": _number(c.since)}
            for c in (agent.health if agent else ())
        ],
    }


def model_view(model: Published, serving: int) -> dict[str, Any]:
    """One published revision; `serving`: how many agents answer for it now."""
    return {
        "name": model.name,
        "revision": model.revision,
        "task": model.task,
        "size_bytes": model.size_bytes,
        "stored_bytes": model.stored_bytes,
        "serving": serving,
    }


def _status(row: Mapping[str, Any], agent: Agent | None, now: float, wall: float, limits: Limits) -> str:
    if agent is not None and row["state"] == "enrolled":
        return agent.status(now, limits)
    # One that has not polled since the router started is not connected, however lately it was heard before.
    silent = None if row["last_seen"] is None else max(limits.disconnected, wall - row["last_seen"])
    return lifecycle(row["state"], silent, limits.disconnected, limits.dead)


def _progress(agent: Agent | None) -> dict[str, Any] | None:
    if agent is None or (p := agent.progress) is None:
        return None
    return {"stage": p.stage, "done": p.done, "total": p.total, "rate": _number(p.rate), "text": _text(p.text)}


def _object(text: str) -> Mapping[str, Any]:
    """What an agent said when it enrolled, which is looked at every second."""
    return _kept(text) if len(text) <= KEEP_PARSED else _kept.__wrapped__(text)


@lru_cache(2048)
def _kept(text: str) -> Mapping[str, Any]:
    value = json.loads(text)
    return value if isinstance(value, dict) else {}


def _number(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None


def _text(value: Any) -> str | None:
    """Without what turns the writing around: it would turn our own words beside it, and a question that names it."""
    return printable(str(value)[:KEEP_TEXT]) if value is not None else None
