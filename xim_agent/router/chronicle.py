"""What happened to each agent, in the router's database: what operators did and what changed with it (diary.py).

`at` is Unix seconds, `who` says by what an operator did it: `dashboard` or `command`; empty for what the agent did.
"""

import sqlite3
from collections.abc import Iterable
from typing import Any, Literal

from xim_agent.router.sql import rows

Who = Literal["", "dashboard", "command"]
KEPT = 100  # of each agent, and as many of what operators did: an agent cannot push that out

_LATEST = "SELECT id FROM agent_events WHERE agent_id=? AND (who='')=? ORDER BY id DESC LIMIT ?"


def record(db: sqlite3.Connection, happened: Iterable[tuple[str, float, str, str, Who]]) -> None:
    """Agent, `at`, kind, text, `who` of each. Inside a transaction; what is too old by then goes."""
    found = list(happened)
    insert = "INSERT INTO agent_events(agent_id, at, kind, text, who) VALUES(?, ?, ?, ?, ?)"
    db.executemany(insert, found)
    trim = f"DELETE FROM agent_events WHERE agent_id=? AND (who='')=? AND id NOT IN ({_LATEST})"  # noqa: S608
    kinds = {(agent_id, who == "") for agent_id, *_, who in found}
    db.executemany(trim, [(*kind, *kind, KEPT) for kind in kinds])


def recorded(db: sqlite3.Connection, agent_id: str) -> list[dict[str, Any]]:
    """Oldest first: `at`, `kind`, `text`, `who`."""
    return rows(db, "SELECT at, kind, text, who FROM agent_events WHERE agent_id=? ORDER BY at, id", (agent_id,))
