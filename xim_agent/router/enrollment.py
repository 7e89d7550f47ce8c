"""The router's side of identity over SQLite: join keys, enroll, refresh, leave (wire-protocol §3).

Every function is one transaction: what was not committed was never answered, and what was committed but whose answer
was lost is answered in the same way again.
"""

import hashlib
import hmac
import json
import re
import secrets
import sqlite3
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from xim_agent import PROTOCOL
from xim_agent.errors import AgentError
from xim_agent.identity import jose
from xim_agent.identity.join_key import JoinKey
from xim_agent.router.tokens import Problem, Proof, RouterKeys

REPLAY_SECONDS = 150  # wire-protocol §3.4
REFRESH_PREFIX = "xrt_"
_REGION = re.compile(r"[\x21-\x7e]{1,24}")


class Replay:
    """Remembers the `jti` of each proof for 150 s, longer than a proof can be valid (60 s either side).

    In memory: a restarted router forgets, and a proof replayed then spends nothing that its owner had not spent.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], float] = {}

    def check(self, proof: Proof, now: float) -> None:
        """Raises Problem `dpop_invalid` for a proof seen before."""
        while self._seen and next(iter(self._seen.values())) < now - REPLAY_SECONDS:
            del self._seen[next(iter(self._seen))]
        if (proof.jkt, proof.jti) in self._seen:
            raise Problem(400, "dpop_invalid", "the DPoP proof was used before")
        self._seen[proof.jkt, proof.jti] = now


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """BEGIN IMMEDIATE to COMMIT; rolled back by any exception. The connection must not be inside another one."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.commit()
    except BaseException:
        db.rollback()
        raise


def open_keys(db: sqlite3.Connection, issuer: str, now: float) -> RouterKeys:
    """The router's keys, made at the first call: later ones only read. Retired signing keys are left out."""
    query = "SELECT kind, private FROM signing_keys WHERE retired IS NULL ORDER BY created DESC, rowid DESC"
    rows = db.execute(query).fetchall()
    if {kind for kind, _ in rows} != {"root", "signing"}:
        with transaction(db):
            have = {kind for kind, _ in db.execute(query)}
            for kind in sorted({"root", "signing"} - have):
                key = Ed25519PrivateKey.generate()
                jwk = {**jose.jwk_of(key.public_key()), "d": jose.private_text(key)}
                row = (jose.thumbprint(key.public_key()), kind, json.dumps(jwk), now)
                db.execute("INSERT INTO signing_keys(kid, kind, private, created) VALUES(?, ?, ?, ?)", row)
            rows = db.execute(query).fetchall()
    keys = [(kind, jose.private_key(json.loads(private)["d"])) for kind, private in rows]
    root = next(key for kind, key in keys if kind == "root")
    return RouterKeys(issuer, root, tuple(key for kind, key in keys if kind == "signing"))


def create_join_key(
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
) -> str:
    """The key's text; only a hash of its secret is kept. Raises AgentError `join_key_invalid`, exit 2."""
    if not _REGION.fullmatch(region) or uses < 1 or not project:
        raise AgentError(
            "join_key_invalid",
            "a join key needs a project, 1 use or more and a region of 1 to 24 ASCII characters",
            exit_code=2,
        )
    secret = secrets.token_bytes(32)
    slug = re.sub(r"[^a-z0-9-]+", "-", project.lower())[:63].strip("-") or "project"
    try:
        key = JoinKey.make(slug, tuple(public_urls), keys.pin(), secret)
    except ValueError as error:
        raise AgentError("join_key_invalid", f"the public URLs do not fit a join key: {error}", exit_code=2) from None
    row = (_hash(secret), project, region, json.dumps(list(tiers)), expires_at, uses, now)
    with transaction(db):
        db.execute(
            "INSERT INTO join_keys(secret_hash, project, region, tiers, expires, uses_left, created)"
            " VALUES(?, ?, ?, ?, ?, ?, ?)",
            row,
        )
    return key.text


def enroll(
    db: sqlite3.Connection, keys: RouterKeys, body: Mapping[str, Any], proof: Proof, now: float, remote: str
) -> dict[str, Any]:
    """`POST /v1/enroll`: the 201 reply. `remote` is the caller's address, kept with the agent. Raises Problem."""
    request = _enroll_request(body, proof)
    with transaction(db):
        join = _row(db, "SELECT * FROM join_keys WHERE secret_hash=?", (_hash(request["secret"]),))
        if join is None:
            raise Problem(403, "join_key_invalid", "this router does not know the join key")
        agent = _row(db, "SELECT * FROM agents WHERE join_key=? AND jkt=?", (join["id"], proof.jkt))
        _usable(join, agent, now)
        if agent is None:
            db.execute("UPDATE join_keys SET uses_left = uses_left - 1 WHERE id=?", (join["id"],))
            agent_id = _insert(db, join, request, proof, now, remote)
        else:
            agent_id = agent["agent_id"]
            db.execute(
                "UPDATE agents SET family = family + 1, used = 0, family_revoked = NULL, name=?, info=?, hardware=?,"
                " max_concurrent=? WHERE agent_id=?",
                (*_described(request, remote), agent_id),
            )
        agent = _row(db, "SELECT * FROM agents WHERE agent_id=?", (agent_id,))
        assert agent is not None
        refresh_token = _issue(db, agent, 1)
    return {
        "agent_id": agent_id,
        "worker_id": agent["worker_id"],
        "project": agent["project"],
        "region": agent["region"],
        "token": _token(keys, agent, now, request["nonce"]),
        "refresh_token": refresh_token,
        "issuer": keys.issuer,
        "root": keys.root_jwk(),
        "keys": keys.key_set(now),
    }


def _usable(join: Mapping[str, Any], agent: Mapping[str, Any] | None, now: float) -> None:
    """An agent that was enrolled by this key and never used its credential may have lost the reply: it comes back even
    when the key has expired since. A key that was revoked opens nothing.
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


def refresh(
    db: sqlite3.Connection, keys: RouterKeys, body: Mapping[str, Any], proof: Proof, now: float
) -> dict[str, Any]:
    """`POST /v1/enroll/refresh`: the 200 reply. Raises Problem; a revoked family stays revoked whatever is raised."""
    presented = body.get("refresh_token")
    if not isinstance(presented, str) or not presented.startswith(REFRESH_PREFIX) or not presented.isascii():
        raise Problem(400, "invalid_request", "`refresh_token` is missing or has the wrong form")
    with transaction(db):
        row = _row(db, "SELECT * FROM refresh_tokens WHERE hash=?", (_hash(presented.encode()),))
        agent = row and _row(db, "SELECT * FROM agents WHERE agent_id=?", (row["agent_id"],))
        if not row or not agent:
            raise Problem(403, "credential_revoked", "this router does not know the refresh token")
        if agent["jkt"] != proof.jkt:
            raise Problem(400, "dpop_invalid", "the DPoP proof is not by the key that was enrolled")
        if agent["state"] == "removed":
            raise Problem(410, "agent_removed", "the agent was removed from this router")
        if row["family"] != agent["family"] or agent["family_revoked"] is not None:
            raise Problem(403, "credential_revoked", "the refresh token was revoked")
        reused = row["serial"] < agent["used"]
        if reused:
            db.execute("UPDATE agents SET family_revoked=? WHERE agent_id=?", (now, agent["agent_id"]))
        else:
            used = (row["serial"], now, agent["agent_id"])
            db.execute("UPDATE agents SET used=?, last_seen=? WHERE agent_id=?", used)
            successor = _issue(db, agent, row["serial"] + 1)
    if reused:
        raise Problem(403, "credential_reused", "an old refresh token was presented; all of the agent's are revoked")
    return {"token": _token(keys, agent, now, None), "refresh_token": successor, "keys": keys.key_set(now)}


def leave(db: sqlite3.Connection, agent_id: str, now: float) -> None:
    """`POST /v1/agents/self/leave`: the agent is removed and its credential revoked. Again does nothing."""
    with transaction(db):
        db.execute(
            "UPDATE agents SET state='removed', family_revoked=coalesce(family_revoked, ?) WHERE agent_id=?",
            (now, agent_id),
        )


def _enroll_request(body: Mapping[str, Any], proof: Proof) -> dict[str, Any]:
    """What enroll uses, checked: every text can be stored, every size is bounded by the body's own limit."""
    protocols = body.get("protocols")
    if not isinstance(protocols, list) or PROTOCOL not in protocols:
        detail = f"this router speaks protocol {PROTOCOL}, the agent {protocols!r:.100}"
        raise Problem(426, "protocol_unsupported", detail, {"protocols": [PROTOCOL]})
    try:
        jose.unb64u(body.get("nonce"), 16)
        if jose.thumbprint(jose.public_key(body.get("public_key"))) != proof.jkt:
            raise Problem(400, "dpop_invalid", "`public_key` is not the key of the DPoP proof")
    except jose.JoseError as error:
        raise Problem(400, "invalid_request", f"`nonce` or `public_key`: {error}") from None
    agent, hardware, most = body.get("agent"), body.get("hardware"), body.get("max_concurrent")
    if not isinstance(agent, dict) or not isinstance(hardware, dict) or not isinstance(agent.get("name"), str):
        raise Problem(400, "invalid_request", "`agent` or `hardware` has the wrong form")
    if most is not None and (type(most) is not int or not 1 <= most <= 65536):
        raise Problem(400, "invalid_request", "`max_concurrent` is neither null nor a positive number")
    try:
        key = JoinKey.parse(str(body.get("join_key")))
    except AgentError:
        raise Problem(403, "join_key_invalid", "the join key is malformed") from None
    name = agent["name"][:128].encode("utf-8", "replace").decode()
    return {**body, "secret": key.secret, "name": name}


def _insert(
    db: sqlite3.Connection, join: Mapping[str, Any], request: Mapping[str, Any], proof: Proof, now: float, remote: str
) -> str:
    agent_id = str(uuid.uuid4())
    row = (
        agent_id,
        f"w-{secrets.token_hex(8)}",
        join["id"],
        proof.jkt,
        json.dumps(proof.jwk),
        join["project"],
        join["region"],
        join["tiers"],
        *_described(request, remote),
        now,
    )
    db.execute(
        "INSERT INTO agents(agent_id, worker_id, join_key, jkt, public_key, project, region, tiers, name, info,"
        " hardware, max_concurrent, state, enrolled, family, used)"
        " VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'enrolled', ?, 1, 0)",
        row,
    )
    return agent_id


def _described(request: Mapping[str, Any], remote: str) -> tuple[str, str, str, int | None]:
    info = {**request["agent"], "address": remote}
    return request["name"], json.dumps(info), json.dumps(request["hardware"]), request.get("max_concurrent")


def _issue(db: sqlite3.Connection, agent: Mapping[str, Any], serial: int) -> str:
    """The token of (agent, family, serial). Derived, not random: the router keeps hashes only and can still give the
    same successor again, even after its database was put back to an older state.
    """
    row = db.execute("SELECT value FROM settings WHERE key='hmac_secret'").fetchone()
    if row is None:
        row = (secrets.token_hex(32),)
        db.execute("INSERT INTO settings(key, value) VALUES('hmac_secret', ?)", row)
    text = f"refresh|{agent['agent_id']}|{agent['family']}|{serial}".encode()
    token = REFRESH_PREFIX + jose.b64u(hmac.digest(bytes.fromhex(row[0]), text, "sha256"))
    db.execute(
        "INSERT OR IGNORE INTO refresh_tokens(hash, agent_id, family, serial) VALUES(?, ?, ?, ?)",
        (_hash(token.encode()), agent["agent_id"], agent["family"], serial),
    )
    return token


def _token(keys: RouterKeys, agent: Mapping[str, Any], now: float, nonce: str | None) -> str:
    return keys.mint_token(
        agent_id=agent["agent_id"],
        worker_id=agent["worker_id"],
        project=agent["project"],
        region=agent["region"],
        tiers=json.loads(agent["tiers"]),
        jkt=agent["jkt"],
        nonce=nonce,
        jti=str(uuid.uuid4()),
        now=now,
    )


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _row(db: sqlite3.Connection, query: str, values: tuple[Any, ...]) -> dict[str, Any] | None:
    """As a dictionary, whatever `row_factory` the connection has."""
    cursor = db.execute(query, values)
    row = cursor.fetchone()
    return dict(zip((column[0] for column in cursor.description), row, strict=True)) if row else None
