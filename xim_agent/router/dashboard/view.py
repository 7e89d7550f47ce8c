"""What the dashboard shows, as plain data: the rows of the database joined with what the dispatcher knows."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from xim_agent import PROTOCOL
from xim_agent.router.catalog import Assigned, Published
from xim_agent.router.fleet import Agent
from xim_agent.router.jobs import Limits
from xim_agent.router.lifecycle import lifecycle
from xim_agent.router.series import Series

KEEP_TEXT = 300
KEEP_ROWS = 64


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
        "version": _text(agent.versions.get("agent") if agent else None) or _text(info.get("version")),
        "tier": _text(hardware.get("tier")),
        "accelerator": _text(", ".join(map(str, devices)) or model or hardware.get("accelerator")),
        "status": _status(row, agent, now, wall, limits),
        "phase": agent.phase if agent else None,
        "model": (agent and agent.serves) or (assigned.model.name if assigned else None),
        "assigned": f"{assigned.model.name}@{assigned.model.revision}" if assigned else None,
        "progress": _progress(agent),
        "running": len(agent.grants) if agent else 0,
        "waiting": _count(load.waiting) if load else None,
        "tokens_per_s": _number(load.tokens_per_s) if load else None,
        "kv_usage": _number(load.kv_usage) if load else None,
        "ceiling": agent.ceiling if agent else row["max_concurrent"],
        "last_seen": seen,
        "health": [
            {"code": _text(c.code), "text": _text(c.text), "since": _number(c.since), "hint": _text(c.hint)}
            for c in (agent.health if agent else ())
        ],
    }


def agent_detail(
    row: Mapping[str, Any],
    agent: Agent | None,
    *,
    drain: bool,
    events: Iterable[Mapping[str, Any]],
    now: float,
    wall: float,
) -> dict[str, Any]:
    """What the page of one agent shows besides its row of the list. `events`: in the order of their times."""
    hardware, info = _object(row["hardware"]), _object(row["info"])
    series = (agent.series if agent else Series()).report(now)
    return {
        "suspended": row["state"] == "suspended",
        "removed": row["state"] == "removed",
        "drain": drain,
        "credential": "valid" if row["family_revoked"] is None else "revoked",
        "worker_id": row["worker_id"],
        "join_key": row["join_key"],
        "enrolled": row["enrolled"],
        "address": _text(info.get("address")),
        "platform": _text(" ".join(str(info[n]) for n in ("os", "arch") if info.get(n))),
        "hostname": _text(info.get("hostname")),
        "vllm": _text(agent.versions.get("vllm")) if agent else None,
        "protocol": PROTOCOL,
        "hardware": _hardware(hardware),
        "slots": _slots(agent, now),
        "series": {**series, "end": wall - series["end"]},
        "events": [dict(event) for event in reversed(list(events))],
    }


def _hardware(told: Mapping[str, Any]) -> dict[str, Any]:
    """What the agent said when it enrolled, as far as it has the form that it should have."""
    cpu = told.get("cpu") if isinstance(told.get("cpu"), dict) else {}
    found = told.get("devices")
    devices = [d for d in found if isinstance(d, dict)] if isinstance(found, list) else []
    return {
        "devices": [
            {
                "name": _text(d.get("name")),
                "memory_bytes": _count(d.get("memory_total_bytes")),
                "compute": _text(d.get("compute_capability")),
                "mig": d.get("mig") is True,
            }
            for d in devices[:KEEP_ROWS]
        ],
        "driver": _text(told.get("driver")),
        "cuda": _text(told.get("cuda")),
        "cpu": _text(cpu.get("model")) if cpu else None,
        "cores": _count(cpu.get("cores")) if cpu else None,
        "threads": _count(cpu.get("threads")) if cpu else None,
        "memory_bytes": _count(told.get("memory_total_bytes")),
    }


def _slots(agent: Agent | None, now: float) -> list[dict[str, Any]]:
    """The requests that it has now, the longest first; nothing of what is in them."""
    grants = sorted(agent.grants.values(), key=lambda g: g.job.granted_at or now)[:KEEP_ROWS] if agent else []
    return [
        {
            "request": g.job.request,
            "path": g.job.path,
            "seconds": round(now - (g.job.granted_at or now), 1),
            "bytes": g.received,
            "stream": g.job.stream,
            "state": "stopping" if g.cancel else "answering" if g.received else "reading" if g.confirmed else "offered",
        }
        for g in grants
    ]


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
    amounts = {"done": _count(p.done), "total": _count(p.total)}
    return {"stage": p.stage, **amounts, "rate": _number(p.rate), "text": _text(p.text)}


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    return value if isinstance(value, dict) else {}


def _number(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None


def _count(value: Any) -> int | None:
    """A browser knows whole numbers up to 2^53; what is no number at all is none."""
    return max(0, min(value, 2**53)) if type(value) is int else None


def _text(value: Any) -> str | None:
    return str(value)[:KEEP_TEXT] if value is not None else None
