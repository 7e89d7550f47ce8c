"""Salts of vLLM's prefix cache, so that no tenant finds out by timing what another one has asked. Pure.

The one change that is made to a body: a member `cache_salt` more. All else stays byte for byte.
"""

import hashlib
import hmac
import json

import msgspec

PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses"})
_ABSENT, _NULL = b"", b"null"


class _Body(msgspec.Struct):
    cache_salt: msgspec.Raw = msgspec.Raw(_ABSENT)


def salt(secret: str, tenant: str) -> str:
    return hmac.new(secret.encode(), tenant.encode(), hashlib.sha256).hexdigest()


def salted(secret: str, tenant: str, path: str, body: bytes) -> bytes:
    """Unchanged where the body brings a salt of its own, is no JSON object, or `path` does not generate."""
    if path not in PATHS or (brought := _brought(body)) not in (_ABSENT, _NULL):
        return body
    member = b'"cache_salt":"%s"' % salt(secret, tenant).encode()
    if brought == _NULL:  # of two members of one name vLLM takes the last
        return body[: body.rindex(b"}")] + b"," + member + b"}"
    begin = body.index(b"{") + 1
    rest = body[begin:]
    return body[:begin] + member + (b"" if rest.lstrip().startswith(b"}") else b",") + rest


def _brought(body: bytes) -> bytes | None:
    """The salt in the body, as written; None when the body is no JSON object."""
    try:
        return bytes(msgspec.json.decode(body, type=_Body).cache_salt)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    try:  # vLLM reads with Python's parser, which takes NaN and halves of surrogate pairs too
        members = json.loads(body.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(members, dict):
        return None
    return json.dumps(members["cache_salt"]).encode() if "cache_salt" in members else _ABSENT
