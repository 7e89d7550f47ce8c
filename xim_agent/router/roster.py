"""Agents as the router's operator handles them: listed, suspended, resumed, removed, their credentials revoked.

A running router notices each of these within a second; they work without one, too.
"""

import json
import sqlite3
from typing import Any

from xim_agent.errors import AgentError, Exit
from xim_agent.router.jobs import Limits
from xim_agent.router.lifecycle import lifecycle
from xim_agent.router.sql import row, rows, transaction

_COLUMNS = "agent_id, name, worker_id, project, region, state, enrolled, last_seen, info, join_key, family_revoked"


def listed(db: sqlite3.Connection, now: float, limits: Limits, *, removed: bool = False) -> list[dict[str, Any]]:
    """By name: `id`, `name`, `worker_id`, `project`, `region`, `status`, `credential` (valid or revoked), `last_seen`,
    `enrolled` (Unix seconds; None: never), `address` (it enrolled from), `version`, `join_key` (number).

    `last_seen` is written every 15 s (at once for a newcomer), so a state may be that much behind.
    """
    found = rows(db, f"SELECT {_COLUMNS} FROM agents ORDER BY name, enrolled")  # noqa: S608 no input in it
    listed = []
    for one in found:
        silent = None if one["last_seen"] is None else max(0.0, now - one["last_seen"])
        status = lifecycle(one["state"], silent, limits.disconnected, limits.dead)
        if status == "removed" and not removed:
            continue
        info = json.loads(one["info"])
        listed.append(
            {
                "id": one["agent_id"],
                **{name: one[name] for name in ("name", "worker_id", "project", "region")},
                "status": status,
                "credential": "valid" if one["family_revoked"] is None else "revoked",
                **{name: one[name] for name in ("last_seen", "enrolled", "join_key")},
                "address": info.get("address"),
                "version": info.get("version"),
            }
        )
    return listed


def find(db: sqlite3.Connection, wanted: str) -> dict[str, Any]:
    """The agent with this id, beginning of an id (6 characters or more) or name; removed ones by their whole id only.

    Raises AgentError `agent_unknown` or `agent_ambiguous`, exit 2.
    """
    if exact := row(db, f"SELECT {_COLUMNS} FROM agents WHERE agent_id=?", (wanted,)):  # noqa: S608
        return exact
    alive = rows(db, f"SELECT {_COLUMNS} FROM agents WHERE state != 'removed'")  # noqa: S608
    found = [a for a in alive if a["name"] == wanted or (len(wanted) >= 6 and a["agent_id"].startswith(wanted))]
    if len(found) == 1:
        return found[0]
    if not found:
        message, code = f"no agent {wanted!r} is enrolled here", "agent_unknown"
    else:
        which = ", ".join(a["agent_id"] for a in found)
        message, code = f"{wanted!r} means {len(found)} agents: {which}", "agent_ambiguous"
    raise AgentError(code, message, hint="`router agents ls` shows ids and names", exit_code=Exit.USAGE)


def suspend(db: sqlite3.Connection, agent_id: str) -> None:
    """Gets no work until `resume`; what it is serving it finishes, and its credential stays fresh."""
    _set_state(db, agent_id, "suspended")


def resume(db: sqlite3.Connection, agent_id: str) -> None:
    _set_state(db, agent_id, "enrolled")


def remove(db: sqlite3.Connection, agent_id: str, now: float) -> None:
    """Gone for good: it stops, and its credential and tokens open nothing any more. Again does nothing."""
    with transaction(db):
        _revoke(db, agent_id, now)
        db.execute("UPDATE agents SET state='removed' WHERE agent_id=?", (agent_id,))


def revoke_credentials(db: sqlite3.Connection, agent_id: str, now: float) -> None:
    """Its tokens and refresh tokens open nothing any more; with a join key that is still good it may enroll again."""
    with transaction(db):
        _revoke(db, agent_id, now)


def _revoke(db: sqlite3.Connection, agent_id: str, now: float) -> None:
    db.execute("UPDATE agents SET family_revoked=coalesce(family_revoked, ?) WHERE agent_id=?", (now, agent_id))


def _set_state(db: sqlite3.Connection, agent_id: str, state: str) -> None:
    """Raises AgentError `agent_removed`, exit 2."""
    with transaction(db):
        changed = "UPDATE agents SET state=? WHERE agent_id=? AND state != 'removed'"
        if not db.execute(changed, (state, agent_id)).rowcount:
            raise AgentError(
                "agent_removed",
                f"agent {agent_id} was removed from this router",
                hint="it can only enroll again, with a new join key",
                exit_code=Exit.USAGE,
            )
