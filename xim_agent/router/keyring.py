"""The router's own keys in its database: the root key for ever, signing keys that rotate (wire-protocol §3.1, §3.3)."""

import json
import sqlite3

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from xim_agent.identity import jose
from xim_agent.router.sql import transaction
from xim_agent.router.tokens import RouterKeys

# Older signing keys that the set still names: what they signed before two rotations is good until it expires.
KEEP = 2
_IN_USE = "SELECT kind, private FROM signing_keys WHERE retired IS NULL ORDER BY created DESC, rowid DESC"


def open_keys(db: sqlite3.Connection, issuer: str, now: float) -> RouterKeys:
    """The router's keys, made at the first call: later ones only read. Retired signing keys are left out."""
    rows = db.execute(_IN_USE).fetchall()
    if {kind for kind, _ in rows} != {"root", "signing"}:
        with transaction(db):
            have = {kind for kind, _ in db.execute(_IN_USE)}
            for kind in sorted({"root", "signing"} - have):
                _insert(db, kind, now)
            rows = db.execute(_IN_USE).fetchall()
    keys = [(kind, jose.private_key(json.loads(private)["d"])) for kind, private in rows]
    root = next(key for kind, key in keys if kind == "root")
    return RouterKeys(issuer, root, tuple(key for kind, key in keys if kind == "signing"))


def key_set_iat(db: sqlite3.Connection, now: float) -> int:
    """`iat` of a key set that is given out now. Inside a transaction.

    Agents refuse an older set than they hold. So it never goes back when the router's clock does; and it goes forward
    with the clock, or agents would refuse a router whose database was put back to an older state.
    """
    row = db.execute("SELECT value FROM settings WHERE key='key_set_iat'").fetchone()
    last = int(row[0]) if row else 0
    if int(now) > last:
        db.execute("INSERT OR REPLACE INTO settings(key, value) VALUES('key_set_iat', ?)", (str(int(now)),))
    return max(int(now), last)


def rotate(db: sqlite3.Connection, now: float, *, keep: int = KEEP) -> str:
    """A new signing key, which signs from now on; only the newest `keep` older ones stay in the set. Returns its `kid`.

    Running agents meet the new key in the next key set, with their next refresh; one that is given something signed by
    it before that refreshes at once.
    """
    with transaction(db):
        kid = _insert(db, "signing", now)
        db.execute(
            "UPDATE signing_keys SET retired=? WHERE kind='signing' AND retired IS NULL AND kid NOT IN"
            " (SELECT kid FROM signing_keys WHERE kind='signing' AND retired IS NULL"
            "  ORDER BY created DESC, rowid DESC LIMIT ?)",
            (now, keep + 1),
        )
    return kid


def _insert(db: sqlite3.Connection, kind: str, now: float) -> str:
    """`created` is the order of the keys, so it grows even when the clock was set back."""
    key = Ed25519PrivateKey.generate()
    kid = jose.thumbprint(key.public_key())
    jwk = {**jose.jwk_of(key.public_key()), "d": jose.private_text(key)}
    newest = db.execute("SELECT max(created) FROM signing_keys").fetchone()[0]
    created = now if newest is None else max(now, newest + 0.001)
    values = (kid, kind, json.dumps(jwk), created)
    db.execute("INSERT INTO signing_keys(kid, kind, private, created) VALUES(?, ?, ?, ?)", values)
    return kid
