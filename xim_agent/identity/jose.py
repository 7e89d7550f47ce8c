"""The small part of JOSE this project uses: base64url, Ed25519 JWKs, compact JWS with EdDSA and nothing else, DPoP.

The algorithm is fixed here and never read from a token. PyJWT checks the signature; it accepts duplicate members, any
`typ` and keys in the header, so the header is parsed and compared here first.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

# `b64` (RFC 7797) changes what is signed; the others let the sender choose the key or demand what we do not know.
_REFUSED_HEADERS = ("crit", "jwk", "jku", "x5u", "x5c", "x5t", "b64", "zip")
_JWS = jwt.PyJWS(algorithms=["EdDSA"])


class JoseError(ValueError):
    """Refused, with the reason as text; never contains the token."""


def b64u(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unb64u(text: object, size: int | None = None) -> bytes:
    """Only canonical unpadded base64url, `size` bytes long if given: one value has one spelling. Raises JoseError."""
    if not isinstance(text, str):
        raise JoseError("not base64url text")
    try:
        data = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise JoseError("not base64url") from None
    if b64u(data) != text:
        raise JoseError("not canonical base64url")
    if size is not None and len(data) != size:
        raise JoseError(f"{len(data)} bytes instead of {size}")
    return data


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise JoseError("a member occurs twice")
    return members


def _no_constant(name: str) -> Any:
    raise JoseError(f"{name} is not JSON")


def json_object(data: bytes) -> dict[str, Any]:
    """A JSON object without duplicate members at any depth, in UTF-8. Raises JoseError."""
    try:
        value = json.loads(data.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except JoseError:
        raise
    except (ValueError, RecursionError):
        raise JoseError("not JSON") from None
    if not isinstance(value, dict):
        raise JoseError("not a JSON object")
    return value


def jwk_of(key: Ed25519PublicKey) -> dict[str, str]:
    return {"kty": "OKP", "crv": "Ed25519", "x": b64u(key.public_bytes_raw())}


def public_key(jwk: object) -> Ed25519PublicKey:
    if not isinstance(jwk, Mapping) or jwk.get("kty") != "OKP" or jwk.get("crv") != "Ed25519":
        raise JoseError("not an Ed25519 JWK")
    return Ed25519PublicKey.from_public_bytes(unb64u(jwk.get("x"), 32))


def thumbprint(key: Ed25519PublicKey) -> str:
    """RFC 7638, SHA-256: members in lexical order, no spaces."""
    return b64u(hashlib.sha256(json.dumps(jwk_of(key), sort_keys=True, separators=(",", ":")).encode()).digest())


def private_key(d: object) -> Ed25519PrivateKey:
    """From the 32 bytes in base64url that `private_text` gives."""
    return Ed25519PrivateKey.from_private_bytes(unb64u(d, 32))


def private_text(key: Ed25519PrivateKey) -> str:
    return b64u(key.private_bytes_raw())


def sign(key: Ed25519PrivateKey, payload: Mapping[str, Any], typ: str, header: Mapping[str, Any] | None = None) -> str:
    """A compact JWS; without `header`, the `kid` is the thumbprint of `key`."""
    extra = {"typ": typ, **(header if header is not None else {"kid": thumbprint(key.public_key())})}
    body = json.dumps(payload, separators=(",", ":")).encode()
    return _JWS.encode(body, key, algorithm="EdDSA", headers=extra)


@dataclass(frozen=True)
class Unverified:
    """A JWS whose header is well-formed; nothing in it may be believed before `verify`."""

    text: str
    header: Mapping[str, Any]

    @property
    def kid(self) -> str:
        kid = self.header.get("kid")
        if not isinstance(kid, str):
            raise JoseError("header `kid` is missing")
        return kid

    def verify(self, key: Ed25519PublicKey) -> dict[str, Any]:
        """The payload. Raises JoseError when the signature is not by `key`."""
        try:
            payload = _JWS.decode(self.text, key, algorithms=["EdDSA"])
        except jwt.PyJWTError:
            raise JoseError("the signature is wrong") from None
        if not isinstance(payload, bytes):
            raise JoseError("the payload is not JSON")
        return json_object(payload)


def parse(text: object, typ: str, max_bytes: int, *, allowed: tuple[str, ...] = ()) -> Unverified:
    """Checks form and header of a compact JWS. `allowed`: header names that are refused elsewhere. Raises JoseError."""
    if not isinstance(text, str) or not text.isascii():
        raise JoseError("not a compact JWS")
    if len(text) > max_bytes:
        raise JoseError(f"{len(text)} bytes, over {max_bytes}")
    parts = text.split(".")
    if len(parts) != 3 or not all(parts):
        raise JoseError("not a compact JWS")
    header = json_object(unb64u(parts[0]))
    for part in parts[1:]:
        unb64u(part)
    if header.get("alg") != "EdDSA":
        raise JoseError(f"header `alg` is {str(header.get('alg'))[:32]!r}, not EdDSA")
    if header.get("typ") != typ:
        raise JoseError(f"header `typ` is {str(header.get('typ'))[:32]!r}, not {typ}")
    for name in _REFUSED_HEADERS:
        if name in header and name not in allowed:
            raise JoseError(f"header `{name}` is not allowed")
    return Unverified(text, header)


def dpop_proof(key: Ed25519PrivateKey, *, htm: str, htu: str, iat: int, jti: str) -> str:
    """RFC 9449 proof of possession for one call; `htu` is the URL called without query, `iat` Unix seconds."""
    header = {"jwk": jwk_of(key.public_key())}
    return sign(key, {"htm": htm, "htu": htu, "iat": iat, "jti": jti}, "dpop+jwt", header)
