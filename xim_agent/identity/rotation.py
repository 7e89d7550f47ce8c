"""What the agent keeps of its identity, and how a reply of the router changes it (wire-protocol §3.2, §3.3, §3.5).

Two slots: a reply's refresh token becomes `current`, and the one that was presented stays as `previous` until the new
one has worked in its turn. The router keeps it valid for as long, so a crash or a lost reply at any step leaves the
agent with a token that is good.
"""

from collections.abc import Mapping
from typing import Any

from msgspec import Struct, structs

from xim_agent.identity import claims, jose
from xim_agent.identity.claims import Claims, KeySet, TokenRefused
from xim_agent.identity.join_key import JoinKey, router_url
from xim_agent.identity.jose import JoseError

FORMAT = 1


class Enrollment(Struct, frozen=True, kw_only=True, repr_omit_defaults=True):
    """`root` is a JWK, `keys` the signed key set, `current` and `previous` are refresh tokens, `assignment` the last
    signed one accepted; its `iat` is kept after it was withdrawn, so that an older one stays refused.
    """

    routers: tuple[str, ...]
    issuer: str
    root: dict[str, str]
    keys: str
    keys_iat: int
    agent_id: str
    worker_id: str
    project: str
    region: str
    token: str
    current: str
    previous: str | None = None
    assignment: str | None = None
    assignment_iat: int = 0

    def __repr__(self) -> str:
        return f"Enrollment(agent_id={self.agent_id!r})"

    def key_set(self) -> KeySet:
        """Raises TokenRefused or JoseError when the state is damaged."""
        return claims.verify_key_set(self.keys, jose.public_key(self.root), self.issuer, self.keys_iat)

    def check(self, jkt: str) -> None:
        """`jkt`: thumbprint of the agent's key. Raises TokenRefused or JoseError."""
        keys = self.key_set().keys
        try:
            claims.verify_token(self.token, keys=keys, issuer=self.issuer, now=0, subject=self.agent_id, jkt=jkt)
        except TokenRefused as error:
            if not error.clock:
                raise
        try:
            routers = [router_url(url) for url in self.routers]
        except ValueError as error:
            raise JoseError(str(error)) from None
        if not routers:
            raise JoseError("it names no router")

    def claims(self, now: float) -> Claims | None:
        """Of the stored token, if it is still good at `now` (Unix seconds)."""
        keys = self.key_set().keys
        try:
            return claims.verify_token(self.token, keys=keys, issuer=self.issuer, now=now, subject=self.agent_id)
        except TokenRefused:
            return None

    def presentable(self) -> tuple[str, ...]:
        """Refresh tokens in the order in which they are tried."""
        return (self.current,) if self.previous is None else (self.current, self.previous)


class State(Struct, frozen=True):
    """`enrollment.json`: `key` is the agent's private key (32 bytes, base64url), there before the first call."""

    key: str
    enrollment: Enrollment | None = None
    version: int = FORMAT

    def __repr__(self) -> str:
        return f"State(enrollment={self.enrollment!r})"

    def check(self) -> None:
        """Raises TokenRefused or JoseError when the parts do not belong together. Times are no matter."""
        jkt = jose.thumbprint(jose.private_key(self.key).public_key())
        if self.enrollment is not None:
            self.enrollment.check(jkt)


def enrolled(
    reply: Mapping[str, Any], *, join_key: JoinKey, nonce: str, jkt: str, now: float
) -> tuple[Enrollment, Claims]:
    """What an enroll reply gives once every check of §3.2 has passed. Raises TokenRefused."""
    texts = _texts(reply, "agent_id", "worker_id", "project", "region", "token", "refresh_token", "issuer", "keys")
    root = claims.verify_pin(reply.get("root"), join_key.pin)
    keys = claims.verify_key_set(texts["keys"], root, texts["issuer"], 0)
    accepted = claims.verify_token(
        texts["token"],
        keys=keys.keys,
        issuer=texts["issuer"],
        now=now,
        subject=texts["agent_id"],
        nonce=nonce,
        jkt=jkt,
        same={name: texts[name] for name in ("project", "region", "worker_id")},
    )
    enrollment = Enrollment(
        routers=join_key.routers,
        issuer=texts["issuer"],
        root=jose.jwk_of(root),
        keys=keys.jws,
        keys_iat=keys.iat,
        agent_id=texts["agent_id"],
        worker_id=texts["worker_id"],
        project=texts["project"],
        region=texts["region"],
        token=texts["token"],
        current=texts["refresh_token"],
    )
    return enrollment, accepted


def refreshed(
    old: Enrollment, reply: Mapping[str, Any], *, presented: str, jkt: str, now: float
) -> tuple[Enrollment, Claims]:
    """The successor of `old`: first the key set, then the token by a key of it. Raises TokenRefused."""
    texts = _texts(reply, "token", "refresh_token", "keys")
    keys = claims.verify_key_set(texts["keys"], jose.public_key(old.root), old.issuer, old.keys_iat)
    accepted = claims.verify_token(
        texts["token"], keys=keys.keys, issuer=old.issuer, now=now, subject=old.agent_id, jkt=jkt
    )
    changes = {"token": texts["token"], "current": texts["refresh_token"], "previous": presented}
    return structs.replace(old, keys=keys.jws, keys_iat=keys.iat, **changes), accepted


def _texts(reply: Mapping[str, Any], *names: str) -> dict[str, str]:
    for name in names:
        if not isinstance(reply.get(name), str) or not reply[name]:
            raise TokenRefused("reply_malformed", "reply", f"`{name}` is missing or not text")
    return {name: reply[name] for name in names}
