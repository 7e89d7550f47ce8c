"""The router's side of identity over SQLite: enroll, refresh, and whether a token still counts (wire-protocol §3).

Every function is one transaction: what was not committed was never answered, and what was committed but whose answer
was lost is answered in the same way again.
"""

import hmac
import json
import secrets
import sqlite3
import uuid
from collections.abc import Mapping
from typing import Any

from xim_agent import PROTOCOL
from xim_agent.errors import AgentError
from xim_agent.identity import jose
from xim_agent.identity.join_key import JoinKey
from xim_agent.router import join_keys, keyring
from xim_agent.router.sql import digest, row, rows, transaction
from xim_agent.router.tokens import Problem, Proof, RouterKeys

REPLAY_SECONDS = 150  # wire-protocol §3.4
REFRESH_PREFIX = "xrt_"
AHEAD = 5000  # refreshes, a hundred days of them, by which an agent may know more than a restored database


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


def enroll(
    db: sqlite3.Connection, keys: RouterKeys, body: Mapping[str, Any], proof: Proof, now: float, remote: str
) -> dict[str, Any]:
    """`POST /v1/enroll`: the 201 reply. `remote` is the caller's address, kept with the agent. Raises Problem."""
    request = _enroll_request(body, proof)
    with transaction(db):
        join = join_keys.find(db, request["secret"])
        agent = row(db, "SELECT * FROM agents WHERE join_key=? AND jkt=?", (join["id"], proof.jkt))
        join_keys.check_usable(join, agent, now)
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
        agent = row(db, "SELECT * FROM agents WHERE agent_id=?", (agent_id,))
        assert agent is not None
        refresh_token = _issue(db, agent, 1)
        key_set = keys.key_set(keyring.key_set_iat(db, now))
    return {
        "agent_id": agent_id,
        "worker_id": agent["worker_id"],
        "project": agent["project"],
        "region": agent["region"],
        "token": _token(keys, agent, now, request["nonce"]),
        "refresh_token": refresh_token,
        "issuer": keys.issuer,
        "root": keys.root_jwk(),
        "keys": key_set,
    }


def refresh(
    db: sqlite3.Connection, keys: RouterKeys, body: Mapping[str, Any], proof: Proof, now: float
) -> dict[str, Any]:
    """`POST /v1/enroll/refresh`: the 200 reply. Raises Problem; a revoked family stays revoked whatever is raised."""
    presented = body.get("refresh_token")
    if not isinstance(presented, str) or not presented.startswith(REFRESH_PREFIX) or not presented.isascii():
        raise Problem(400, "invalid_request", "`refresh_token` is missing or has the wrong form")
    with transaction(db):
        hashed = digest(presented.encode())
        found = row(db, "SELECT * FROM refresh_tokens WHERE hash=?", (hashed,)) or _ahead(db, hashed, proof.jkt)
        agent = found and row(db, "SELECT * FROM agents WHERE agent_id=?", (found["agent_id"],))
        if not found or not agent:
            raise Problem(403, "credential_revoked", "this router does not know the refresh token")
        if agent["jkt"] != proof.jkt:
            raise Problem(400, "dpop_invalid", "the DPoP proof is not by the key that was enrolled")
        if agent["state"] == "removed":
            raise Problem(410, "agent_removed", "the agent was removed from this router")
        if found["family"] != agent["family"] or agent["family_revoked"] is not None:
            raise Problem(403, "credential_revoked", "the refresh token was revoked")
        reused = found["serial"] < agent["used"]
        if reused:
            db.execute("UPDATE agents SET family_revoked=? WHERE agent_id=?", (now, agent["agent_id"]))
        else:
            db.execute("UPDATE agents SET used=? WHERE agent_id=?", (found["serial"], agent["agent_id"]))
            successor = _issue(db, agent, found["serial"] + 1)
            key_set = keys.key_set(keyring.key_set_iat(db, now))
    if reused:
        raise Problem(403, "credential_reused", "an old refresh token was presented; all of the agent's are revoked")
    return {"token": _token(keys, agent, now, None), "refresh_token": successor, "keys": key_set}


def standing(db: sqlite3.Connection, agent_id: str, jti: str | None = None) -> str:
    """The agent's state: `enrolled` or `suspended`. `jti`: of the well signed token it came with.

    Raises Problem 410 when it was removed, 401 when its credential was revoked. That concerns all that one family of
    refresh tokens gave out, at once and not only when the tokens expire.
    """
    query = "SELECT state, family, family_revoked FROM agents WHERE agent_id=?"
    state, family, revoked = db.execute(query, (agent_id,)).fetchone() or ("removed", 0, None)
    if state == "removed":
        raise Problem(410, "agent_removed", "the agent was removed from this router")
    if revoked is not None or (jti is not None and jti.partition(".")[0] != str(family)):
        raise Problem(401, "token_invalid", "the token was revoked")
    return str(state)


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
    values = (
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
        values,
    )
    return agent_id


def _described(request: Mapping[str, Any], remote: str) -> tuple[str, str, str, int | None]:
    info = {**request["agent"], "address": remote}
    return request["name"], json.dumps(info), json.dumps(request["hardware"]), request.get("max_concurrent")


def _ahead(db: sqlite3.Connection, hashed: bytes, jkt: str) -> dict[str, Any] | None:
    """The row of a token that this router gave out and forgot, because its database was put back to an older state."""
    secret = _secret(db)
    for agent in rows(db, "SELECT * FROM agents WHERE jkt=?", (jkt,)):
        for serial in range(agent["used"] + 1, agent["used"] + AHEAD):
            if digest(_derived(secret, agent, serial).encode()) == hashed:
                return {"agent_id": agent["agent_id"], "family": agent["family"], "serial": serial}
    return None


def _secret(db: sqlite3.Connection) -> bytes:
    kept = db.execute("SELECT value FROM settings WHERE key='hmac_secret'").fetchone()
    if kept is None:
        kept = (secrets.token_hex(32),)
        db.execute("INSERT INTO settings(key, value) VALUES('hmac_secret', ?)", kept)
    return bytes.fromhex(kept[0])


def _derived(secret: bytes, agent: Mapping[str, Any], serial: int) -> str:
    """The token of (agent, family, serial). Not random: the router keeps hashes only and can still give the same
    successor again.
    """
    text = f"refresh|{agent['agent_id']}|{agent['family']}|{serial}".encode()
    return REFRESH_PREFIX + jose.b64u(hmac.digest(secret, text, "sha256"))


def _issue(db: sqlite3.Connection, agent: Mapping[str, Any], serial: int) -> str:
    token = _derived(_secret(db), agent, serial)
    db.execute(
        "INSERT OR IGNORE INTO refresh_tokens(hash, agent_id, family, serial) VALUES(?, ?, ?, ?)",
        (digest(token.encode()), agent["agent_id"], agent["family"], serial),
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
        jti=f"{agent['family']}.{uuid.uuid4()}",
        now=now,
    )
