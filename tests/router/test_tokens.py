"""Proofs and bearers as the router judges them, and that the agent accepts what the router signs."""

from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from xim_agent.identity import claims, jose
from xim_agent.router.tokens import Problem, Proof, RouterKeys, verify_bearer, verify_dpop

NOW = 1_700_000_000
URLS = ["https://router.example", "http://127.0.0.1:8080"]
PATH = "/v1/enroll"
KEY = Ed25519PrivateKey.generate()
SIGNING = [Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()]
KEYS = RouterKeys(URLS[0], Ed25519PrivateKey.generate(), SIGNING)


def proof(**changes: Any) -> str:
    fields: dict[str, Any] = {"htm": "POST", "htu": URLS[0] + PATH, "iat": NOW, "jti": "j", **changes}
    return jose.dpop_proof(KEY, **fields)


def check(text: object, now: float = NOW) -> Proof:
    return verify_dpop(text, method="POST", urls=URLS, path=PATH, now=now)


def test_good_proof() -> None:
    accepted = check(proof())
    assert accepted == Proof(jose.thumbprint(KEY.public_key()), jose.jwk_of(KEY.public_key()), "j", URLS[0] + PATH)
    for htu in ("HTTPS://Router.EXAMPLE:443/v1/enroll", "http://127.0.0.1:8080/v1/enroll"):
        check(proof(htu=htu))
    for now in (NOW - 60, NOW + 60):
        check(proof(), now)


def forged(header: dict[str, Any], key: Ed25519PrivateKey = KEY) -> str:
    jwk = {"jwk": jose.jwk_of(KEY.public_key())}
    return jose.sign(key, {"htm": "POST", "htu": URLS[0] + PATH, "iat": NOW, "jti": "j"}, "dpop+jwt", {**jwk, **header})


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        proof(htm="GET"),
        proof(iat=NOW - 61),
        proof(iat=NOW + 61),
        proof(iat=float(NOW)),
        proof(jti=""),
        proof(jti="x" * 129),
        proof(jti=1),
        proof(htu=None),
        forged({}, Ed25519PrivateKey.generate()),
        forged({"typ": "JWT"}),
        forged({"jwk": None}),
        forged({"jwk": {"kty": "oct", "k": "AA"}}),
        forged({"crit": ["x"]}),
        forged({"jku": "https://evil.example"}),
        proof(jti="x", htu="x" * 5000),
    ],
)
def test_proof_is_refused(text: str | None) -> None:
    with pytest.raises(Problem) as caught:
        check(text)
    assert (caught.value.status, caught.value.code) == (400, "dpop_invalid")


@pytest.mark.parametrize(
    "htu",
    [
        "https://router.example/v1/enroll/refresh",
        "https://router.example/v1/enroll/",
        "https://router.example/V1/enroll",
        "https://router.example/v1/%65nroll",
        "https://router.example/v1/enroll?x=1",
        "http://router.example/v1/enroll",
        "https://router.example:8443/v1/enroll",
        "https://other.example/v1/enroll",
        "https://router.example@other.example/v1/enroll",
        "https://[/v1/enroll",
        "not a url",
    ],
)
def test_another_url_is_named(htu: str) -> None:
    with pytest.raises(Problem) as caught:
        check(proof(htu=htu))
    assert (caught.value.status, caught.value.code) == (400, "dpop_url")
    assert caught.value.extra["called"] == htu
    assert URLS[0] + PATH in caught.value.extra["expected"]


@given(st.text(max_size=300))
def test_any_text_is_a_named_problem(text: str) -> None:
    with pytest.raises(Problem):
        check(text)
    with pytest.raises(Problem):
        check(proof(htu=text))


def token(**changes: Any) -> str:
    fields: dict[str, Any] = {
        "agent_id": "a",
        "worker_id": "w",
        "project": "p",
        "region": "eu",
        "tiers": ["self_hosted"],
        "jkt": "k",
        "nonce": None,
        "jti": "1",
        "now": NOW,
    }
    return KEYS.mint_token(**{**fields, **changes})


def test_bearer() -> None:
    accepted = verify_bearer(token(), KEYS, URLS[0], NOW)
    assert (accepted.agent_id, accepted.worker_id, accepted.exp) == ("a", "w", NOW + 3600)
    older = RouterKeys(URLS[0], KEYS.root, SIGNING[1:]).mint_token(
        agent_id="a", worker_id="w", project="p", region="eu", tiers=[], jkt="k", nonce=None, jti="1", now=NOW
    )
    assert verify_bearer(older, KEYS, URLS[0], NOW).agent_id == "a"


@pytest.mark.parametrize(
    ("text", "now", "code"),
    [
        (token(life=10), NOW + 71, "token_expired"),
        (token(), NOW - 100, "token_expired"),
        (token()[:-4] + "AAAA", NOW, "token_invalid"),
        (KEYS.sign_assignment({"sub": "a"}), NOW, "token_invalid"),
        (None, NOW, "token_invalid"),
        (RouterKeys(URLS[0], KEYS.root, [KEY]).sign_assignment({}), NOW, "token_invalid"),
    ],
)
def test_bearer_is_refused(text: str | None, now: float, code: str) -> None:
    with pytest.raises(Problem) as caught:
        verify_bearer(text, KEYS, URLS[0], now)
    assert (caught.value.status, caught.value.code) == (401, code)


def test_bearer_of_another_issuer_is_refused() -> None:
    with pytest.raises(Problem):
        verify_bearer(token(), KEYS, URLS[1], NOW)


def test_agent_accepts_what_the_router_signs() -> None:
    keys = claims.verify_key_set(KEYS.key_set(NOW), KEYS.root.public_key(), URLS[0], NOW)
    assert claims.verify_token(token(nonce="n"), keys=keys.keys, issuer=URLS[0], now=NOW, nonce="n").jkt == "k"
    assert KEYS.root_jwk().keys() == {"kty", "crv", "x"}
    assert KEYS.pin() == jose.thumbprint(KEYS.root.public_key())
