"""Links that sign in once and the sessions that they open, in the router's database. Times are Unix seconds.

Of both only a hash is kept (`digest`): who reads the database, or a copy of it, cannot sign in.
"""

import hashlib
import secrets
import sqlite3
from contextlib import suppress
from typing import Any

from xim_agent.router.dashboard.parts import Role, Viewer
from xim_agent.router.replies import ApiError
from xim_agent.router.sql import digest, row, transaction

LINK_LIFE = 24 * 3600.0  # a link is for now, and may be made again
IDLE = 12 * 3600.0  # without a request: a working day's evening
LIFE = 7 * 86400.0  # in all
SEEN_EVERY = 60.0  # a use is written down so often at most
_AGAIN = "; `router admin-link` makes a new one"


def own_id(db: sqlite3.Connection) -> str:
    """Tells this router's cookie from that of another on the same machine: cookies know no ports."""
    db.execute("INSERT OR IGNORE INTO settings(key, value) VALUES('dashboard_id', ?)", (secrets.token_hex(4),))
    return str(db.execute("SELECT value FROM settings WHERE key='dashboard_id'").fetchone()[0])


def make_link(db: sqlite3.Connection, now: float, role: Role = "admin", *, at_start: bool = False) -> str:
    """The token of a new link, which is nowhere else. `at_start`: takes the place of the one made at the last start."""
    token = secrets.token_urlsafe(32)
    with transaction(db):
        db.execute("DELETE FROM dashboard_links WHERE expires < ? OR (at_start AND ?)", (now - LINK_LIFE, at_start))
        db.execute("DELETE FROM dashboard_sessions WHERE created <= ? OR seen <= ?", (now - LIFE, now - IDLE))
        db.execute(
            "INSERT INTO dashboard_links(hash, role, expires, at_start) VALUES(?, ?, ?, ?)",
            (hashed(token), role, now + LINK_LIFE, at_start),
        )
    return token


def link(url: str, token: str) -> str:
    """The link itself. `url`: where a browser reaches the router. A fragment is in no log and no Referer."""
    return f"{url.rstrip('/')}/dashboard/#/login/{token}"


def redeem(db: sqlite3.Connection, token: str, now: float, *, insecure: bool) -> tuple[str, Viewer]:
    """The secret of a new session. `insecure`: it came over plain http from elsewhere. Raises ApiError 403."""
    secret, key = secrets.token_urlsafe(32), hashed(token)
    with transaction(db):
        link = row(db, "SELECT role, expires, used FROM dashboard_links WHERE hash=?", (key,))
        if link is None:
            raise ApiError(403, "link_unknown", f"this router does not know the link{_AGAIN}")
        if link["used"] is not None:
            raise ApiError(403, "link_used", f"the link was used already{_AGAIN}")
        if now >= link["expires"]:
            raise ApiError(403, "link_expired", f"the link has expired{_AGAIN}")
        db.execute("UPDATE dashboard_links SET used=? WHERE hash=?", (now, key))
        viewer = Viewer(hashed(secret), link["role"])
        db.execute(
            "INSERT INTO dashboard_sessions(hash, role, created, seen, insecure) VALUES(?, ?, ?, ?, ?)",
            (viewer.session, viewer.role, now, now, insecure),
        )
    return secret, viewer


def find(db: sqlite3.Connection, secret: str, now: float) -> Viewer | None:
    """Who has this session, if it has not ended; counts as its use. Looked up by its hash, see join_keys.find."""
    session = live(db, hashed(secret), now)
    if session is None:
        return None
    if now - session["seen"] >= SEEN_EVERY:
        # On a disk that is full one can still look.
        with suppress(sqlite3.OperationalError):
            db.execute("UPDATE dashboard_sessions SET seen=? WHERE hash=?", (now, session["hash"]))
    return Viewer(session["hash"], session["role"])


def live(db: sqlite3.Connection, session: bytes, now: float) -> dict[str, Any] | None:
    """The session's row, if it has not ended."""
    query = "SELECT * FROM dashboard_sessions WHERE hash=? AND seen > ? AND created > ?"
    return row(db, query, (session, now - IDLE, now - LIFE))


def end(db: sqlite3.Connection, session: bytes) -> None:
    db.execute("DELETE FROM dashboard_sessions WHERE hash=?", (session,))


def hashed(secret: str) -> bytes:
    """What is kept of a link or a session."""
    return digest(secret.encode())


def revoke(db: sqlite3.Connection) -> int:
    """Ends every session and makes every link that was not used worthless. Returns how many sessions."""
    with transaction(db):
        db.execute("DELETE FROM dashboard_links")
        return db.execute("DELETE FROM dashboard_sessions").rowcount


def csrf(secret: str) -> str:
    """What a page must send with each write: only who reads our replies knows it. It needs no place in the database."""
    return hashlib.sha256(b"csrf:" + secret.encode()).hexdigest()
