"""Agents as the router's operator handles them: listed, suspended, drained, removed, their credentials revoked.

A running router notices each of these within a second; they work without one, too.
"""

import json
import sqlite3
from typing import Any

from xim_agent.errors import AgentError, Exit
from xim_agent.router import chronicle
from xim_agent.router.chronicle import Who
from xim_agent.router.jobs import Limits
from xim_agent.router.lifecycle import lifecycle
from xim_agent.router.sql import row, rows, transaction

_COLUMNS = "agent_id, name, worker_id, project, region, state, enrolled, last_seen, info, join_key, family_revoked"


def listed(db: sqlite3.Connection, now: float, limits: Limits, *, removed: bool = False) -> list[dict[str, Any]]:
    """By name: `id`, `name`, `worker_id`, `project`, `region`, `status` (draining: active, but to take nothing new),
    `credential` (valid or revoked), `last_seen`, `enrolled` (Unix seconds; None: never), `address` (it enrolled from),
    `version`, `join_key` (number).

    `last_seen` is written every 15 s (at once for a newcomer), so a state may be that much behind.
    """
    found = rows(db, f"SELECT {_COLUMNS} FROM agents ORDER BY name, enrolled")  # noqa: S608 no input in it
    drained = {one["agent_id"] for one in rows(db, "SELECT agent_id FROM drained")}
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
                "status": "draining" if status == "active" and one["agent_id"] in drained else status,
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


def suspend(db: sqlite3.Connection, agent_id: str, now: float, who: Who = "command") -> None:
    """Gets no work until `resume`; what it is serving it finishes, and its credential stays fresh."""
    _set_state(db, agent_id, "suspended", now, who)


def resume(db: sqlite3.Connection, agent_id: str, now: float, who: Who = "command") -> None:
    _set_state(db, agent_id, "enrolled", now, who)


def drain(db: sqlite3.Connection, agent_id: str, now: float, who: Who = "command") -> None:
    """Finishes what it has, and takes nothing new until `undrain`; its engine stays up. Again does nothing."""
    with transaction(db):
        _here(db, agent_id)
        if db.execute("INSERT OR IGNORE INTO drained(agent_id, since) VALUES(?, ?)", (agent_id, now)).rowcount:
            chronicle.record(db, [(agent_id, now, "drained", "takes nothing new", who)])


def undrain(db: sqlite3.Connection, agent_id: str, now: float, who: Who = "command") -> None:
    with transaction(db):
        _here(db, agent_id)
        if db.execute("DELETE FROM drained WHERE agent_id=?", (agent_id,)).rowcount:
            chronicle.record(db, [(agent_id, now, "undrained", "takes work again", who)])


def drains(db: sqlite3.Connection, agent_id: str) -> bool:
    """Whether an operator wants it drained."""
    return db.execute("SELECT 1 FROM drained WHERE agent_id=?", (agent_id,)).fetchone() is not None


def remove(db: sqlite3.Connection, agent_id: str, now: float, who: Who = "command") -> None:
    """Gone for good: it stops, and its credential and tokens open nothing any more. Again does nothing."""
    with transaction(db):
        _revoke(db, agent_id, now)
        changed = "UPDATE agents SET state='removed' WHERE agent_id=? AND state != 'removed'"
        if db.execute(changed, (agent_id,)).rowcount:
            text = "removed for good" if who else "left by itself"
            chronicle.record(db, [(agent_id, now, "removed", text, who)])


def revoke_credentials(db: sqlite3.Connection, agent_id: str, now: float, who: Who = "command") -> None:
    """Its tokens and refresh tokens open nothing any more; with a join key that is still good it may enroll again."""
    with transaction(db):
        _here(db, agent_id)
        if _revoke(db, agent_id, now):
            chronicle.record(db, [(agent_id, now, "credentials_revoked", "must enroll again", who)])


def _revoke(db: sqlite3.Connection, agent_id: str, now: float) -> bool:
    """Whether that changed anything."""
    query = "UPDATE agents SET family_revoked=? WHERE agent_id=? AND family_revoked IS NULL"
    return bool(db.execute(query, (now, agent_id)).rowcount)


def _set_state(db: sqlite3.Connection, agent_id: str, state: str, now: float, who: Who) -> None:
    with transaction(db):
        _here(db, agent_id)
        if db.execute("UPDATE agents SET state=? WHERE agent_id=? AND state != ?", (state, agent_id, state)).rowcount:
            kind, text = ("suspended", "gets no work") if state == "suspended" else ("resumed", "gets work again")
            chronicle.record(db, [(agent_id, now, kind, text, who)])


def _here(db: sqlite3.Connection, agent_id: str) -> None:
    """Raises AgentError `agent_removed`, exit 2."""
    if not db.execute("SELECT 1 FROM agents WHERE agent_id=? AND state != 'removed'", (agent_id,)).fetchone():
        raise AgentError(
            "agent_removed",
            f"agent {agent_id} was removed from this router",
            hint="it can only enroll again, with a new join key",
            exit_code=Exit.USAGE,
        )
