"""The router's signed words (key sets, tokens, assignments) and its judgement of what agents present (wire §3)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from xim_agent.identity import claims, jose
from xim_agent.identity.claims import Claims
from xim_agent.identity.jose import JoseError

TOKEN_LIFE = 3600  # seconds
PROOF_LEEWAY = 60  # seconds, wire-protocol §3.4
MAX_PROOF = 4096


class Problem(Exception):
    """An error reply (RFC 9457): `extra` are further members, `retry_after` seconds. replies.py renders it."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        extra: Mapping[str, Any] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.extra = dict(extra or {})
        self.retry_after = retry_after


@dataclass(frozen=True)
class RouterKeys:
    """`root` signs key sets and nothing else; `signing` newest first, the newest signs, all of them verify."""

    issuer: str
    root: Ed25519PrivateKey
    signing: Sequence[Ed25519PrivateKey]

    @cached_property
    def public(self) -> dict[str, Ed25519PublicKey]:
        """The signing keys by `kid`."""
        keys = [key.public_key() for key in self.signing]
        return {jose.thumbprint(key): key for key in keys}

    def key_set(self, iat: int) -> str:
        """The signed key set that agents check tokens and assignments with."""
        keys = [jose.jwk_of(key.public_key()) for key in self.signing]
        return jose.sign(self.root, {"iss": self.issuer, "iat": iat, "keys": keys}, claims.TYP_KEY_SET)

    def mint_token(
        self,
        *,
        agent_id: str,
        worker_id: str,
        project: str,
        region: str,
        tiers: Sequence[str],
        jkt: str,
        nonce: str | None,
        jti: str,
        now: float,
        life: int = TOKEN_LIFE,
    ) -> str:
        """A XEM token; `nonce` only at enrollment, `jti` unique, `life` in seconds."""
        payload: dict[str, Any] = {
            "iss": self.issuer,
            "aud": claims.AUDIENCE,
            "sub": agent_id,
            "iat": int(now),
            "nbf": int(now),
            "exp": int(now) + life,
            "jti": jti,
            "cnf": {"jkt": jkt},
            "project": project,
            "region": region,
            "worker_id": worker_id,
            "tiers": list(tiers),
            "scope": "agent",
        }
        if nonce is not None:
            payload["nonce"] = nonce
        return jose.sign(self.signing[0], payload, claims.TYP_XEM)

    def sign_assignment(self, payload: Mapping[str, Any]) -> str:
        """`payload` as in wire-protocol §4; `iss` is filled in, `sub` and `iat` are the caller's."""
        return jose.sign(self.signing[0], {"iss": self.issuer, **payload}, claims.TYP_ASSIGNMENT)

    def root_jwk(self) -> dict[str, str]:
        return jose.jwk_of(self.root.public_key())

    def pin(self) -> str:
        """What join keys carry: the thumbprint of the root key."""
        return jose.thumbprint(self.root.public_key())


@dataclass(frozen=True)
class Proof:
    """An accepted DPoP proof; `jti` must still be checked against `enrollment.Replay`."""

    jkt: str
    jwk: Mapping[str, str]
    jti: str
    htu: str


def verify_dpop(proof: object, *, method: str, urls: Sequence[str], path: str, now: float) -> Proof:
    """`proof`: the DPoP header (None when absent); `urls`: the router's public base URLs; `path`: of the request line.

    Raises Problem 400 `dpop_invalid`, or `dpop_url` when all but the URL is right.
    """
    try:
        unverified = jose.parse(proof, "dpop+jwt", MAX_PROOF, allowed=("jwk",))
        key = jose.public_key(unverified.header.get("jwk"))
        payload = unverified.verify(key)
        iat, jti, htu = payload.get("iat"), payload.get("jti"), payload.get("htu")
        if type(iat) is not int or not isinstance(jti, str) or not 1 <= len(jti) <= 128 or not isinstance(htu, str):
            raise JoseError("`iat`, `jti` or `htu` is missing or has the wrong form")
        if payload.get("htm") != method:
            raise JoseError("`htm` is another method")
        if abs(now - iat) > PROOF_LEEWAY:
            raise JoseError(f"`iat` differs by {iat - now:.0f} s from the router's clock")
    except JoseError as error:
        raise Problem(400, "dpop_invalid", f"the DPoP proof was refused: {error}") from None
    expected = [url.rstrip("/") + path for url in urls]
    called = _normal(htu)
    if called is None or called not in [_normal(url) for url in expected]:
        extra = {"called": htu[:500], "expected": " or ".join(expected)}
        raise Problem(400, "dpop_url", "the agent called a URL that is none of this router's public URLs", extra)
    return Proof(jose.thumbprint(key), jose.jwk_of(key), jti, htu)


def _normal(url: str) -> tuple[str, str, int | None, str] | None:
    """Scheme, host and port as RFC 3986 compares them, the path exactly; None for what is no such URL."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    if parts.query or parts.fragment or parts.username is not None or not parts.hostname:
        return None
    return parts.scheme, parts.hostname, port or {"https": 443, "http": 80}.get(parts.scheme), parts.path


def verify_bearer(token: object, keys: RouterKeys, issuer: str, now: float) -> Claims:
    """`token`: what follows `Bearer`. Raises Problem 401 `token_expired` or `token_invalid`."""
    try:
        return claims.verify_token(token, keys=keys.public, issuer=issuer, now=now)
    except claims.TokenRefused as error:
        code = "token_expired" if error.clock else "token_invalid"
        raise Problem(401, code, error.message.replace("the router's token", "the token")) from None
