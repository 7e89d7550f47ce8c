"""The router's side of §3 over SQLite."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from xim_agent.errors import AgentError
from xim_agent.identity import jose
from xim_agent.identity.join_key import JoinKey
from xim_agent.router import enrollment, join_keys, keyring, roster
from xim_agent.router.store import Store
from xim_agent.router.tokens import Problem, Proof, RouterKeys

NOW = 1_700_000_000.0
URL = "http://127.0.0.1:8080"
numbers = itertools.count()


class Side:
    """One database and one agent key."""

    def __init__(self, store: Store) -> None:
        self.db = store.db
        self.keys: RouterKeys = keyring.open_keys(store.db, URL, NOW)
        self.key = Ed25519PrivateKey.generate()

    def join_key(self, **changes: Any) -> str:
        fields: dict[str, Any] = {
            "project": "demo",
            "region": "eu",
            "uses": 1,
            "expires_at": None,
            "tiers": ["t"],
            "public_urls": [URL],
            "now": NOW,
        }
        return join_keys.create(self.db, self.keys, **{**fields, **changes})[1]

    def proof(self, key: Ed25519PrivateKey | None = None) -> Proof:
        public = (key or self.key).public_key()
        return Proof(jose.thumbprint(public), jose.jwk_of(public), str(next(numbers)), URL)

    def body(self, join_key: str, key: Ed25519PrivateKey | None = None, **changes: Any) -> dict[str, Any]:
        return {
            "join_key": join_key,
            "nonce": jose.b64u(b"n" * 16),
            "public_key": jose.jwk_of((key or self.key).public_key()),
            "protocols": [1],
            "agent": {"name": "box", "version": "0", "os": "linux", "arch": "x", "hostname": "h"},
            "hardware": {"accelerator": "cpu"},
            "max_concurrent": None,
            **changes,
        }

    def enroll(self, join_key: str, key: Ed25519PrivateKey | None = None, now: float = NOW, **changes: Any) -> Any:
        body = self.body(join_key, key, **changes)
        return enrollment.enroll(self.db, self.keys, body, self.proof(key), now, "1.2.3.4")

    def refresh(self, token: object, key: Ed25519PrivateKey | None = None) -> str:
        reply = enrollment.refresh(self.db, self.keys, {"refresh_token": token}, self.proof(key), NOW)
        return str(reply["refresh_token"])

    def one(self, query: str) -> Any:
        return self.db.execute(query).fetchone()[0]


@pytest.fixture
def side(tmp_path: Path) -> Iterator[Side]:
    with Store.open(tmp_path) as store:
        yield Side(store)


def refused(call: Any, *values: Any, **named: Any) -> tuple[int, str]:
    with pytest.raises(Problem) as caught:
        call(*values, **named)
    return caught.value.status, caught.value.code


def test_enroll_twice_is_one_agent_and_one_use(side: Side) -> None:
    key = side.join_key()
    first, second = side.enroll(key), side.enroll(key)
    assert first["agent_id"] == second["agent_id"]
    assert first["worker_id"] == second["worker_id"]
    assert side.one("SELECT uses_left FROM join_keys") == 0
    assert side.one("SELECT count(*) FROM agents") == 1
    assert first["refresh_token"] != second["refresh_token"]
    assert refused(side.refresh, first["refresh_token"]) == (403, "credential_revoked")
    side.refresh(second["refresh_token"])


def test_another_key_needs_another_use(side: Side) -> None:
    key = side.join_key(uses=2)
    ids = {side.enroll(key, Ed25519PrivateKey.generate())["agent_id"] for _ in range(2)}
    assert len(ids) == 2
    assert refused(side.enroll, key, Ed25519PrivateKey.generate()) == (403, "join_key_used_up")
    assert side.one("SELECT count(*) FROM agents") == 2


def test_join_key_refusals(side: Side) -> None:
    late = side.join_key(expires_at=NOW + 10)
    assert refused(side.enroll, late, now=NOW + 10) == (403, "join_key_expired")
    assert refused(side.enroll, "xjk_nonsense") == (403, "join_key_invalid")
    stranger = JoinKey.make("demo", (URL,), side.keys.pin(), b"x" * 32).text
    assert refused(side.enroll, stranger) == (403, "join_key_invalid")
    key = side.join_key()
    side.enroll(key)
    side.db.execute("UPDATE join_keys SET revoked = 1")
    assert refused(side.enroll, key) == (403, "join_key_revoked")


def test_lost_reply_comes_back_after_the_key_expired_but_only_until_the_credential_was_used(side: Side) -> None:
    key = side.join_key(expires_at=NOW + 10)
    side.enroll(key)
    token = side.enroll(key, now=NOW + 20)["refresh_token"]
    side.refresh(token)
    assert refused(side.enroll, key, now=NOW + 30) == (403, "join_key_expired")


def test_revoked_credential_does_not_bring_an_expired_key_back(side: Side) -> None:
    key = side.join_key(expires_at=NOW + 10)
    agent_id = side.enroll(key)["agent_id"]
    side.enroll(key, now=NOW + 20)
    roster.revoke_credentials(side.db, agent_id, NOW + 30)
    assert refused(side.enroll, key, now=NOW + 40) == (403, "join_key_expired")


def test_secret_is_stored_as_a_hash(side: Side, tmp_path: Path) -> None:
    key = side.join_key()
    token = side.enroll(key)["refresh_token"]
    side.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = (tmp_path / "router.sqlite").read_bytes()
    assert JoinKey.parse(key).secret not in content
    assert token.encode() not in content


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"protocols": [2]}, (426, "protocol_unsupported")),
        ({"protocols": None}, (426, "protocol_unsupported")),
        ({"nonce": "AA"}, (400, "invalid_request")),
        ({"nonce": None}, (400, "invalid_request")),
        ({"public_key": {"kty": "RSA"}}, (400, "invalid_request")),
        ({"public_key": jose.jwk_of(Ed25519PrivateKey.generate().public_key())}, (400, "dpop_invalid")),
        ({"agent": None}, (400, "invalid_request")),
        ({"agent": {"name": 1}}, (400, "invalid_request")),
        ({"hardware": []}, (400, "invalid_request")),
        ({"max_concurrent": 0}, (400, "invalid_request")),
        ({"max_concurrent": True}, (400, "invalid_request")),
    ],
)
def test_enroll_request_is_checked_and_spends_nothing(
    side: Side, changes: dict[str, Any], expected: tuple[int, str]
) -> None:
    assert refused(side.enroll, side.join_key(), **changes) == expected
    assert side.one("SELECT uses_left FROM join_keys") == 1


def test_names_that_are_no_text_are_stored(side: Side) -> None:
    side.enroll(side.join_key(), agent={"name": "\ud800" + "x" * 500, "hostname": "\udfff"})
    assert len(side.one("SELECT name FROM agents")) <= 130


def test_same_token_gives_the_same_successor_until_that_is_used(side: Side) -> None:
    first = side.enroll(side.join_key())["refresh_token"]
    second = side.refresh(first)
    assert [side.refresh(first) for _ in range(3)] == [second] * 3
    third = side.refresh(second)
    assert side.refresh(second) == third
    assert len({first, second, third}) == 3


def test_older_than_the_previous_revokes_the_family(side: Side) -> None:
    first = side.enroll(side.join_key())["refresh_token"]
    second = side.refresh(first)
    third = side.refresh(second)
    assert refused(side.refresh, first) == (403, "credential_reused")
    for token in (first, second, third):
        assert refused(side.refresh, token) == (403, "credential_revoked")


def test_unknown_token_leaves_the_family_alone(side: Side) -> None:
    first = side.enroll(side.join_key())["refresh_token"]
    assert refused(side.refresh, "xrt_unknown") == (403, "credential_revoked")
    for malformed in (None, 1, "", "xrt_\ud800"):
        assert refused(side.refresh, malformed) == (400, "invalid_request")
    side.refresh(first)


def test_stolen_token_without_the_key_spends_nothing(side: Side) -> None:
    first = side.enroll(side.join_key())["refresh_token"]
    assert refused(side.refresh, first, Ed25519PrivateKey.generate()) == (400, "dpop_invalid")
    assert side.one("SELECT used FROM agents") == 0
    old, second = first, side.refresh(first)
    side.refresh(second)
    assert refused(side.refresh, old, Ed25519PrivateKey.generate()) == (400, "dpop_invalid")
    assert side.one("SELECT family_revoked FROM agents") is None


def test_leave_removes_the_agent(side: Side) -> None:
    key = side.join_key()
    reply = side.enroll(key)
    for _ in range(2):
        roster.remove(side.db, reply["agent_id"], NOW)
    assert refused(side.refresh, reply["refresh_token"]) == (410, "agent_removed")
    assert refused(side.enroll, key) == (410, "agent_removed")


def test_suspended_agent_still_refreshes(side: Side) -> None:
    token = side.enroll(side.join_key())["refresh_token"]
    side.db.execute("UPDATE agents SET state = 'suspended'")
    side.refresh(token)


def test_keys_stay_and_a_newer_signing_key_signs(side: Side) -> None:
    again = keyring.open_keys(side.db, URL, NOW)
    assert again.pin() == side.keys.pin()
    assert again.public.keys() == side.keys.public.keys()
    side.db.execute("UPDATE signing_keys SET retired = 1 WHERE kind = 'signing'")
    rotated = keyring.open_keys(side.db, URL, NOW + 1)
    assert rotated.pin() == side.keys.pin()
    assert not rotated.public.keys() & side.keys.public.keys()


def test_replay_is_refused_for_150_s(side: Side) -> None:
    replay, proof = enrollment.Replay(), side.proof()
    replay.check(proof, NOW)
    assert refused(replay.check, proof, NOW + 149) == (400, "dpop_invalid")
    replay.check(side.proof(), NOW + 1)
    replay.check(proof, NOW + 151)
    replay.check(Proof("other key", {}, proof.jti, URL), NOW + 151)


@pytest.mark.parametrize(
    "changes",
    [{"region": ""}, {"region": "x" * 25}, {"region": "é"}, {"uses": 0}, {"project": ""}, {"public_urls": ["ftp://x"]}],
)
def test_join_key_that_cannot_be_made(side: Side, changes: dict[str, Any]) -> None:
    with pytest.raises(AgentError) as caught:
        side.join_key(**changes)
    assert caught.value.exit_code == 2


def test_slug_comes_from_the_project(side: Side) -> None:
    assert JoinKey.parse(side.join_key(project="Écoles & Co_2")).slug == "coles-co-2"
    assert JoinKey.parse(side.join_key(project="日本")).slug == "project"
