"""What a token, a key set and an assignment must say before the agent believes them (wire-protocol §3.2, §3.3, §4)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from xim_agent.errors import AgentError, Exit
from xim_agent.identity import jose
from xim_agent.identity.jose import JoseError
from xim_agent.mesh.messages import Assignment

TYP_XEM = "xem+jwt"
TYP_KEY_SET = "xim-jwks+jws"
TYP_ASSIGNMENT = "xim-assignment+jws"
AUDIENCE = "xim"
_LAST = 10**11  # Unix seconds, in the year 5138: of larger ones no clock can make a date
LEEWAY = 60  # seconds, wire-protocol §3.2
MAX_TOKEN = 8 * 1024
MAX_KEY_SET = 64 * 1024
MAX_ASSIGNMENT = 256 * 1024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class TokenRefused(AgentError):
    """The router's signature or words are not acceptable. `clock`: only the times are wrong, so a clock is off."""

    def __init__(self, code: str, what: str, reason: str, *, clock: bool = False, hint: str = "") -> None:
        hint = hint or "check that this is the right router; see the reason"
        super().__init__(code, f"the router's {what} was refused: {reason}", hint=hint, exit_code=Exit.TOKEN_REFUSED)
        self.what, self.reason = what, reason
        self.clock = clock


class UnknownKid(TokenRefused):
    """Signed by a key that is not in the set the agent holds; a refresh brings the newest set."""


@dataclass(frozen=True)
class KeySet:
    """The router's signing keys by `kid`, and the signed text they came in. `iat`: Unix seconds."""

    jws: str
    iat: int
    keys: Mapping[str, Ed25519PublicKey]


@dataclass(frozen=True)
class Claims:
    """An accepted token. Times are Unix seconds."""

    issuer: str
    agent_id: str
    worker_id: str
    project: str
    region: str
    jkt: str
    jti: str
    iat: int
    nbf: int
    exp: int
    nonce: str | None
    tiers: tuple[str, ...]
    scope: str


def verify_pin(jwk: object, pin: str) -> Ed25519PublicKey:
    """The root key of the reply, if it is the one the join key names. Raises TokenRefused."""
    try:
        root = jose.public_key(jwk)
    except JoseError as error:
        raise TokenRefused("root_refused", "root key", str(error)) from None
    found = jose.thumbprint(root)
    if found != pin:
        raise TokenRefused("pin_mismatch", "root key", f"its thumbprint is {found}, the join key says {pin}")
    return root


def verify_key_set(jws: object, root: Ed25519PublicKey, issuer: str, not_older_than: int) -> KeySet:
    """`not_older_than`: `iat` of the last set accepted. Raises TokenRefused."""
    try:
        unverified = jose.parse(jws, TYP_KEY_SET, MAX_KEY_SET)
        if unverified.kid != jose.thumbprint(root):
            raise JoseError("it is not signed by the router's root key")
        payload = unverified.verify(root)
        _expect(payload, "iss", issuer)
        iat = _int(payload, "iat")
        if iat < not_older_than:
            raise JoseError(f"it is older ({iat}) than the one in use ({not_older_than})")
        keys = _keys(payload.get("keys"))
    except JoseError as error:
        raise TokenRefused("key_set_refused", "key set", str(error)) from None
    return KeySet(unverified.text, iat, keys)


def _keys(jwks: object) -> dict[str, Ed25519PublicKey]:
    """Keys of other kinds are left out: that is how a router may announce them. The name of a key is its thumbprint."""
    if not isinstance(jwks, list) or not all(isinstance(jwk, dict) for jwk in jwks):
        raise JoseError("`keys` is not a list of JWKs")
    keys: dict[str, Ed25519PublicKey] = {}
    for jwk in jwks:
        if jwk.get("kty") != "OKP" or jwk.get("crv") != "Ed25519":
            continue
        key = jose.public_key(jwk)
        if (kid := jose.thumbprint(key)) in keys:
            raise JoseError("a key occurs twice")
        keys[kid] = key
    if not keys:
        raise JoseError("it has no Ed25519 key")
    return keys


def verify_token(
    token: object,
    *,
    keys: Mapping[str, Ed25519PublicKey],
    issuer: str,
    now: float,
    subject: str | None = None,
    nonce: str | None = None,
    jkt: str | None = None,
    same: Mapping[str, object] | None = None,
) -> Claims:
    """Raises TokenRefused (`clock` when all but the times is right) or UnknownKid.

    `subject`, `nonce`, `jkt` are compared where given; `same` holds further claims that must have the given value
    (`project`, `region`, `worker_id` of an enroll reply).
    """
    try:
        unverified = jose.parse(token, TYP_XEM, MAX_TOKEN)
        if (key := keys.get(unverified.kid)) is None:
            raise UnknownKid("token_unknown_key", "token", f"it is signed by an unknown key {unverified.kid[:64]!r}")
        payload = unverified.verify(key)
        expected = {"iss": issuer, "aud": AUDIENCE, "sub": subject, "nonce": nonce, **(same or {})}
        for name, value in expected.items():
            if value is not None:
                _expect(payload, name, value)
        claims = _claims(payload)
        if jkt is not None and claims.jkt != jkt:
            raise JoseError("`cnf.jkt` is not this agent's key")
    except JoseError as error:
        raise TokenRefused("token_refused", "token", str(error)) from None
    if wrong := _wrong_time(claims, now):
        raise TokenRefused("token_time", "token", wrong, clock=True)
    return claims


def _wrong_time(claims: Claims, now: float) -> str:
    if claims.exp <= max(claims.iat, claims.nbf):
        return "it ends before it begins"
    if now >= claims.exp + LEEWAY:
        return f"it expired {now - claims.exp:.0f} s ago by this machine's clock"
    if now < max(claims.iat, claims.nbf) - LEEWAY:
        return f"it is valid only in {max(claims.iat, claims.nbf) - now:.0f} s by this machine's clock"
    return ""


def _claims(payload: Mapping[str, Any]) -> Claims:
    cnf = payload.get("cnf")
    tiers = payload.get("tiers", [])
    if not isinstance(cnf, dict) or not isinstance(tiers, list) or not all(isinstance(tier, str) for tier in tiers):
        raise JoseError("`cnf` or `tiers` has the wrong form")
    nonce = payload.get("nonce")
    return Claims(
        issuer=_str(payload, "iss"),
        agent_id=_str(payload, "sub"),
        worker_id=_str(payload, "worker_id"),
        project=_str(payload, "project"),
        region=_str(payload, "region"),
        jkt=_str(cnf, "jkt"),
        jti=_str(payload, "jti", ""),
        iat=_int(payload, "iat"),
        nbf=_int(payload, "nbf"),
        exp=_int(payload, "exp"),
        nonce=nonce if isinstance(nonce, str) else None,
        tiers=tuple(tiers),
        scope=_str(payload, "scope", ""),
    )


def verify_assignment(
    jws: object, keys: Mapping[str, Ed25519PublicKey], issuer: str, agent_id: str, not_older_than: int
) -> Assignment:
    """`not_older_than`: `iat` of the last one accepted. Raises TokenRefused or UnknownKid."""
    try:
        unverified = jose.parse(jws, TYP_ASSIGNMENT, MAX_ASSIGNMENT)
        if (key := keys.get(unverified.kid)) is None:
            reason = f"it is signed by an unknown key {unverified.kid[:64]!r}"
            raise UnknownKid("assignment_unknown_key", "assignment", reason)
        assignment = msgspec.convert(unverified.verify(key), Assignment)
        _expect({"iss": assignment.iss, "sub": assignment.sub}, "iss", issuer)
        _expect({"sub": assignment.sub}, "sub", agent_id)
        _check_model(assignment)
        if assignment.iat < not_older_than:
            raise JoseError(f"it is older ({assignment.iat}) than the last one ({not_older_than})")
    except (JoseError, msgspec.ValidationError) as error:
        raise TokenRefused("assignment_refused", "assignment", str(error)) from None
    return assignment


def _check_model(assignment: Assignment) -> None:
    model = assignment.model
    for name, value in (("id", model.id), ("revision", model.revision)):
        if not _NAME.fullmatch(value):
            raise JoseError(f"`model.{name}` {value[:64]!r} has characters that are not allowed")
    if not _DIGEST.fullmatch(model.manifest):
        raise JoseError("`model.manifest` is not sha256:<hex>")
    if assignment.generation < 1 or model.size_bytes < 0 or not assignment.serving.served_model_name:
        raise JoseError("`generation`, `model.size_bytes` or `serving.served_model_name` is out of range")


def _expect(payload: Mapping[str, Any], name: str, value: object) -> None:
    found = payload.get(name)
    if type(found) is not type(value) or found != value:
        raise JoseError(f"`{name}` is {str(found)[:100]!r}, expected {str(value)[:100]!r}")


def _str(payload: Mapping[str, Any], name: str, default: str | None = None) -> str:
    value = payload.get(name, default)
    if not isinstance(value, str):
        raise JoseError(f"`{name}` is missing or not text")
    return value


def _int(payload: Mapping[str, Any], name: str) -> int:
    value = payload.get(name)
    if type(value) is not int:
        raise JoseError(f"`{name}` is missing or not an integer")
    if not 0 <= value < _LAST:
        raise JoseError(f"`{name}` is out of range")
    return value
