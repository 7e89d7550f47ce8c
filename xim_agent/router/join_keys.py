"""Join keys in the router's database: made, judged, listed, revoked (wire-protocol §3.1)."""

import json
import re
import secrets
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from xim_agent.errors import AgentError, Exit
from xim_agent.identity.join_key import JoinKey
from xim_agent.router.sql import digest, row, rows, transaction
from xim_agent.router.tokens import Problem, RouterKeys

_REGION = re.compile(r"[\x21-\x7e]{1,24}")


def create(
    db: sqlite3.Connection,
    keys: RouterKeys,
    *,
    project: str,
    region: str,
    uses: int,
    expires_at: float | None,
    tiers: Sequence[str],
    public_urls: Sequence[str],
    now: float,
) -> tuple[int, str]:
    """Number and text of a new key; only a hash of its secret is kept. Raises AgentError `join_key_invalid`, exit 2."""
    if not _REGION.fullmatch(region) or uses < 1 or not project:
        raise AgentError(
            "join_key_invalid",
            "a join key needs a project, 1 use or more and a region of 1 to 24 ASCII characters",
            exit_code=Exit.USAGE,
        )
    secret = secrets.token_bytes(32)
    slug = re.sub(r"[^a-z0-9-]+", "-", project.lower())[:63].strip("-") or "project"
    try:
        key = JoinKey.make(slug, tuple(public_urls), keys.pin(), secret)
    except ValueError as error:
        message = f"the public URLs do not fit a join key: {error}"
        raise AgentError("join_key_invalid", message, exit_code=Exit.USAGE) from None
    values = (digest(secret), project, region, json.dumps(list(tiers)), expires_at, uses, now)
    with transaction(db):
        number = db.execute(
            "INSERT INTO join_keys(secret_hash, project, region, tiers, expires, uses_left, created)"
            " VALUES(?, ?, ?, ?, ?, ?, ?)",
            values,
        ).lastrowid
    assert number is not None
    return number, key.text


def find(db: sqlite3.Connection, secret: bytes) -> dict[str, Any]:
    """The key's row. Raises Problem `join_key_invalid`.

    Looked up by its hash: a guess is hashed before anything is compared, so the time that takes tells nothing of how
    near it was, and from a hash, of which it might tell something, nobody gets to the 32 random bytes behind it.
    """
    found = row(db, "SELECT * FROM join_keys WHERE secret_hash=?", (digest(secret),))
    if found is None:
        raise Problem(403, "join_key_invalid", "this router does not know the join key")
    return found


def check_usable(join: Mapping[str, Any], agent: Mapping[str, Any] | None, now: float) -> None:
    """`agent`: the one this key enrolled before, with the same public key.

    One that never used its credential may have lost the reply: it comes back even when the key has expired since. A key
    that was revoked opens nothing. Raises Problem 403 or 410.
    """
    if join["revoked"] is not None:
        raise Problem(403, "join_key_revoked", "the join key was revoked")
    if agent is not None and agent["state"] == "removed":
        raise Problem(410, "agent_removed", "the agent was removed from this router")
    unused = agent is not None and agent["used"] == 0 and agent["family_revoked"] is None
    if join["expires"] is not None and now >= join["expires"] and not unused:
        raise Problem(403, "join_key_expired", "the join key has expired")
    if agent is None and join["uses_left"] < 1:
        raise Problem(403, "join_key_used_up", "the join key has no use left")


def state(join: Mapping[str, Any], now: float) -> str:
    """What an operator sees: `valid`, `revoked`, `expired` or `used up`."""
    if join["revoked"] is not None:
        return "revoked"
    if join["expires"] is not None and now >= join["expires"]:
        return "expired"
    return "valid" if join["uses_left"] > 0 else "used up"


def listed(db: sqlite3.Connection, now: float) -> list[dict[str, Any]]:
    """All keys, newest first: `id`, `project`, `region`, `state`, `uses_left`, `agents` (enrolled by it), `created`,
    `expires` (Unix seconds or None).
    """
    query = (
        "SELECT id, project, region, uses_left, created, expires, revoked,"
        " (SELECT count(*) FROM agents WHERE join_key = j.id) AS agents FROM join_keys j ORDER BY id DESC"
    )
    return [
        {**{name: value for name, value in found.items() if name != "revoked"}, "state": state(found, now)}
        for found in rows(db, query)
    ]


def revoke(db: sqlite3.Connection, number: int, now: float) -> None:
    """Opens nothing from now on; its agents are unaffected. Raises AgentError `join_key_unknown`, exit 2."""
    with transaction(db):
        done = db.execute("UPDATE join_keys SET revoked=coalesce(revoked, ?) WHERE id=?", (now, number))
        if not done.rowcount:
            raise AgentError(
                "join_key_unknown",
                f"there is no join key {number}",
                hint="`router join-key ls` shows the numbers",
                exit_code=Exit.USAGE,
            )
