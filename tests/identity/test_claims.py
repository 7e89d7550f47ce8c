"""Attacks on tokens, key sets and assignments. Each forged token differs from a good one in one thing only."""

import hashlib
import hmac
import json
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from xim_agent.identity import claims, jose
from xim_agent.identity.claims import TokenRefused, UnknownKid
from xim_agent.router.tokens import RouterKeys

NOW = 1_700_000_000
ISSUER = "https://router.example"
KEYS = RouterKeys(ISSUER, Ed25519PrivateKey.generate(), [Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()])
AGENT = Ed25519PrivateKey.generate()
JKT = jose.thumbprint(AGENT.public_key())
SAME = {"project": "p", "region": "eu", "worker_id": "w"}
KID = jose.thumbprint(KEYS.signing[0].public_key())
PAYLOAD: dict[str, Any] = {
    "iss": ISSUER,
    "aud": "xim",
    "sub": "agent-1",
    "iat": NOW,
    "nbf": NOW,
    "exp": NOW + 3600,
    "jti": "1",
    "nonce": "n",
    "cnf": {"jkt": JKT},
    "tiers": ["self_hosted"],
    "scope": "agent",
    **SAME,
}


def check(token: object, now: float = NOW) -> claims.Claims:
    return claims.verify_token(
        token, keys=KEYS.public, issuer=ISSUER, now=now, subject="agent-1", nonce="n", jkt=JKT, same=SAME
    )


def signed(payload: bytes, header: dict[str, Any] | None = None, key: Ed25519PrivateKey = KEYS.signing[0]) -> str:
    head = {"alg": "EdDSA", "typ": "xem+jwt", "kid": KID, **(header or {})}
    text = jose.b64u(json.dumps(head).encode()) + "." + jose.b64u(payload)
    return text + "." + jose.b64u(key.sign(text.encode()))


def token(header: dict[str, Any] | None = None, **changes: Any) -> str:
    payload = {name: value for name, value in {**PAYLOAD, **changes}.items() if value is not ...}
    return signed(json.dumps(payload).encode(), header)


def hs256(secret: bytes, named: str = "HS256") -> str:
    text = signed(json.dumps(PAYLOAD).encode(), {"alg": named}).rpartition(".")[0]
    return f"{text}.{jose.b64u(hmac.digest(secret, text.encode(), hashlib.sha256))}"


def test_a_good_token_is_accepted() -> None:
    accepted = check(token())
    assert (accepted.agent_id, accepted.tiers, accepted.scope) == ("agent-1", ("self_hosted",), "agent")
    assert check(token(tiers=..., scope=..., jti=..., unknown={"x": 1})).tiers == ()
    check(signed(json.dumps(PAYLOAD).encode(), {"kid": list(KEYS.public)[1]}, KEYS.signing[1]))


PUBLIC = KEYS.signing[0].public_key()
PEM = PUBLIC.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
GOOD = token()
FORGED: dict[str, str] = {
    "alg none": signed(json.dumps(PAYLOAD).encode(), {"alg": "none"}),
    "alg none, no signature": signed(json.dumps(PAYLOAD).encode(), {"alg": "none"}).rpartition(".")[0] + ".",
    "alg NONE by PyJWT": jwt.encode(PAYLOAD, "", "none", headers={"typ": "xem+jwt", "kid": KID}),
    "HS256 with the public key": hs256(PUBLIC.public_bytes_raw()),
    "HS256 with the public key as PEM": hs256(PEM),
    "EdDSA named, HMAC made": hs256(PEM, "EdDSA"),
    "alg missing": signed(json.dumps(PAYLOAD).encode(), {"alg": None}),
    "alg in other case": signed(json.dumps(PAYLOAD).encode(), {"alg": "eddsa"}),
    "another key": signed(json.dumps(PAYLOAD).encode(), None, Ed25519PrivateKey.generate()),
    "signed by the agent's own key": signed(json.dumps(PAYLOAD).encode(), {"kid": JKT}, AGENT),
    "signed by the root key": signed(json.dumps(PAYLOAD).encode(), {"kid": KEYS.pin()}, KEYS.root),
    "kid missing": token({"kid": None}),
    "kid a list": token({"kid": [KID]}),
    "kid a path": token({"kid": "../../etc/passwd"}),
    "kid a URL": token({"kid": "https://evil.example/key.jwk"}),
    "kid with a NUL": token({"kid": KID + "\0"}),
    "kid in other case": token({"kid": KID.swapcase()}),
    "kid of the other key": token({"kid": list(KEYS.public)[1]}),
    "typ JWT": token({"typ": "JWT"}),
    "typ of an assignment": token({"typ": "xim-assignment+jws"}),
    "crit": token({"crit": ["exp"], "exp": 1}),
    "jwk": token({"jwk": jose.jwk_of(PUBLIC)}),
    "jku": token({"jku": "https://evil.example"}),
    "x5c": token({"x5c": ["MIIB"]}),
    "zip": token({"zip": "DEF"}),
    "x5u": token({"x5u": "https://evil.example"}),
    "b64 false": token({"b64": False}),
    "issuer": token(iss="https://evil.example"),
    "issuer missing": token(iss=...),
    "audience": token(aud="other"),
    "audience a list": token(aud=["xim"]),
    "audience missing": token(aud=...),
    "subject": token(sub="agent-2"),
    "nonce": token(nonce="m"),
    "nonce missing": token(nonce=...),
    "cnf of another key": token(cnf={"jkt": KID}),
    "cnf missing": token(cnf=...),
    "cnf not an object": token(cnf=[JKT]),
    "exp missing": token(exp=...),
    "exp text": token(exp=str(NOW + 60)),
    "exp a float": token(exp=NOW + 60.0),
    "exp true": token(exp=True),
    "exp after all time": token(exp=10**400),
    "iat before all time": token(iat=-(10**400)),
    "iat negative": token(iat=-1),
    "nbf missing": token(nbf=...),
    "iat missing": token(iat=...),
    "project": token(project="q"),
    "region": token(region="us"),
    "worker": token(worker_id="x"),
    "tiers text": token(tiers="self_hosted"),
    "a claim twice": signed(json.dumps(PAYLOAD)[:-1].encode() + b',"sub":"agent-1"}'),
    "a nested claim twice": signed(json.dumps(PAYLOAD).replace('"cnf": {', f'"cnf": {{"jkt": "{KID}", ').encode()),
    "a header member twice": ".".join(
        [jose.b64u(f'{{"alg":"none","alg":"EdDSA","typ":"xem+jwt","kid":"{KID}"}}'.encode()), *GOOD.split(".")[1:]]
    ),
    "kid twice": ".".join(
        [
            jose.b64u(f'{{"alg":"EdDSA","typ":"xem+jwt","kid":"{JKT}","kid":"{KID}"}}'.encode()),
            *GOOD.split(".")[1:],
        ]
    ),
    "payload a list": signed(b"[]"),
    "payload NaN": signed(json.dumps(PAYLOAD)[:-1].encode() + b',"x":NaN}'),
    "payload deep": signed(b'{"a":' * 3000 + b"1" + b"}" * 3000),
    "oversized": token(extra="x" * 9000),
    "padded": GOOD + "=",
    "four parts": GOOD + ".x",
    "empty": "",
    "signature of the header alone": GOOD.rpartition(".")[0] + "." + jose.b64u(b"\0" * 64),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_token_is_refused(name: str) -> None:
    with pytest.raises(TokenRefused) as caught:
        check(FORGED[name])
    assert caught.value.exit_code == 15
    assert not caught.value.clock, "not a matter of the clock"
    assert FORGED[name] == "" or FORGED[name] not in caught.value.message


def test_unknown_key_can_be_told_apart() -> None:
    with pytest.raises(UnknownKid):
        check(FORGED["kid a path"])


@pytest.mark.parametrize(
    ("now", "accepted"),
    [
        (NOW - 61, False),
        (NOW - 60, True),
        (NOW + 3600, True),
        (NOW + 3659, True),
        (NOW + 3660, False),
        (NOW + 10**6, False),
    ],
)
def test_times_have_a_minute_of_leeway_and_are_named_as_the_clock(now: float, accepted: bool) -> None:
    if accepted:
        check(token(), now)
        return
    with pytest.raises(TokenRefused) as caught:
        check(token(), now)
    assert caught.value.clock


def test_wrong_times_do_not_hide_another_fault() -> None:
    with pytest.raises(TokenRefused) as caught:
        check(token(nonce="m"), NOW + 10**6)
    assert not caught.value.clock
    with pytest.raises(TokenRefused):
        check(token(nbf=NOW + 10), NOW - 55)


@given(st.text(max_size=200) | st.binary(max_size=200) | st.none() | st.integers())
def test_any_input_is_refused_by_name(value: object) -> None:
    for verify in (
        lambda: check(value),
        lambda: claims.verify_key_set(value, KEYS.root.public_key(), ISSUER, 0),
        lambda: claims.verify_assignment(value, KEYS.public, ISSUER, "agent-1", 0),
    ):
        with pytest.raises(TokenRefused):
            verify()


@given(st.integers(0, len(GOOD) - 1), st.characters(codec="ascii"))
def test_one_changed_character_is_refused(position: int, character: str) -> None:
    changed = GOOD[:position] + character + GOOD[position + 1 :]
    if changed != GOOD:
        with pytest.raises(TokenRefused):
            check(changed)


def key_set(change: Callable[[dict[str, Any]], None] = lambda _: None, key: Ed25519PrivateKey = KEYS.root) -> str:
    payload = {"iss": ISSUER, "iat": NOW, "keys": [jose.jwk_of(k.public_key()) for k in KEYS.signing]}
    change(payload)
    return jose.sign(key, payload, "xim-jwks+jws")


def test_key_set_by_the_root_is_accepted() -> None:
    root = KEYS.root.public_key()
    assert claims.verify_key_set(KEYS.key_set(NOW), root, ISSUER, NOW).keys.keys() == KEYS.public.keys()
    future = key_set(lambda p: p["keys"].append({"kty": "XYZ", "crv": "new"}))
    assert len(claims.verify_key_set(future, root, ISSUER, 0).keys) == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (key_set(key=Ed25519PrivateKey.generate()), "root key"),
        (key_set(key=KEYS.signing[0]), "root key"),
        (key_set(lambda p: p.update(iat=NOW - 1)), "older"),
        (key_set(lambda p: p.update(iat=None)), "iat"),
        (key_set(lambda p: p.update(iss="https://evil.example")), "iss"),
        (key_set(lambda p: p.update(keys=[])), "no Ed25519"),
        (key_set(lambda p: p.update(keys={})), "list"),
        (key_set(lambda p: p["keys"].append(p["keys"][0])), "twice"),
        (key_set(lambda p: p["keys"][0].update(x="AA")), "bytes"),
        (jose.sign(KEYS.root, {"iss": ISSUER, "iat": NOW, "keys": []}, "xem+jwt"), "typ"),
        (jose.sign(Ed25519PrivateKey.generate(), {}, "xim-jwks+jws", {"kid": KEYS.pin()}), "signature"),
    ],
)
def test_key_set_is_refused(text: str, reason: str) -> None:
    with pytest.raises(TokenRefused, match=reason):
        claims.verify_key_set(text, KEYS.root.public_key(), ISSUER, NOW)


def test_root_must_be_the_one_of_the_join_key() -> None:
    assert jose.thumbprint(claims.verify_pin(KEYS.root_jwk(), KEYS.pin())) == KEYS.pin()
    for jwk in (jose.jwk_of(KEYS.signing[0].public_key()), {"kty": "RSA"}, None, {**KEYS.root_jwk(), "x": "AA"}):
        with pytest.raises(TokenRefused):
            claims.verify_pin(jwk, KEYS.pin())


MODEL = {"id": "m", "name": "toy", "revision": "r", "manifest": "sha256:" + "0" * 64, "size_bytes": 1}


def assignment(**changes: Any) -> str:
    payload = {"sub": "agent-1", "iat": NOW, "generation": 1, "model": MODEL, "serving": {"served_model_name": "toy"}}
    return KEYS.sign_assignment({**payload, **changes})


def test_assignment_is_accepted() -> None:
    accepted = claims.verify_assignment(assignment(extra=1), KEYS.public, ISSUER, "agent-1", NOW)
    assert (accepted.generation, accepted.model.name, accepted.serving.task) == (1, "toy", "generate")


@pytest.mark.parametrize(
    "changes",
    [
        {"sub": "agent-2"},
        {"iss": "https://evil.example"},
        {"iat": NOW - 1},
        {"iat": "now"},
        {"generation": 0},
        {"model": None},
        {"model": {**MODEL, "id": "../up"}},
        {"model": {**MODEL, "id": ".hidden"}},
        {"model": {**MODEL, "id": "m\n"}},
        {"model": {**MODEL, "revision": "a/b"}},
        {"model": {**MODEL, "revision": "x" * 129}},
        {"model": {**MODEL, "manifest": "md5:00"}},
        {"model": {**MODEL, "manifest": "sha256:" + "0" * 63 + "\n"}},
        {"model": {**MODEL, "size_bytes": -1}},
        {"serving": {"served_model_name": "toy", "task": "other"}},
        {"serving": {"served_model_name": ""}},
        {"serving": {"served_model_name": "toy", "engine_args": "--x"}},
    ],
)
def test_assignment_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(TokenRefused):
        claims.verify_assignment(assignment(**changes), KEYS.public, ISSUER, "agent-1", NOW)


def test_token_is_no_assignment() -> None:
    with pytest.raises(TokenRefused, match="typ"):
        claims.verify_assignment(GOOD, KEYS.public, ISSUER, "agent-1", 0)
