"""Enroll and refresh as conversations: a proof for each call, each router once a round, the clock corrected once."""

import secrets
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from xim_agent import PROTOCOL
from xim_agent.clock import Clock
from xim_agent.identity import jose, refusals, rotation
from xim_agent.identity.claims import Claims, TokenRefused
from xim_agent.identity.join_key import JoinKey
from xim_agent.identity.rotation import Enrollment
from xim_agent.outcome import Action, RouterError

ENROLL = "/v1/enroll"
REFRESH = "/v1/enroll/refresh"


class EnrollTransport(Protocol):
    """Two unauthenticated calls; `proof` is the DPoP header. Both raise RouterError.

    `skew`: seconds, the Date of the last reply minus our clock; None when it had none.
    """

    @property
    def skew(self) -> float | None: ...

    async def enroll(self, router: str, proof: str, request: dict[str, Any]) -> dict[str, Any]: ...

    async def refresh(self, router: str, proof: str, request: dict[str, Any]) -> dict[str, Any]: ...


Result = tuple[Enrollment, Claims, str]


class Exchange:
    """The calls of one agent key. Results: what to keep, the token's claims, the router that answered."""

    def __init__(self, transport: EnrollTransport, clock: Clock, key: Ed25519PrivateKey) -> None:
        self._transport = transport
        self._clock = clock
        self._key = key
        self.jkt = jose.thumbprint(key.public_key())

    async def enroll(self, join_key: JoinKey, routers: tuple[str, ...], about: dict[str, Any]) -> Result:
        """`about`: `agent`, `hardware`, `max_concurrent`. Raises RouterError or TokenRefused.

        Cancellation may lose the reply; enrolling again with the same keys is free.
        """
        nonce = jose.b64u(secrets.token_bytes(16))
        request = {
            "join_key": join_key.text,
            "nonce": nonce,
            "public_key": jose.jwk_of(self._key.public_key()),
            "protocols": [PROTOCOL],
            **about,
        }
        reply, router = await self._round(routers, ENROLL, lambda at, proof: self._transport.enroll(at, proof, request))
        with self._clock_named():
            kept = rotation.enrolled(reply, join_key=join_key, nonce=nonce, jkt=self.jkt, now=self._clock.now())
        return *kept, router

    async def refresh(self, old: Enrollment, presented: str, routers: tuple[str, ...]) -> Result:
        """Raises RouterError or TokenRefused. After a lost reply `presented` gives the same successor again."""
        request = {"refresh_token": presented}
        reply, router = await self._round(
            routers, REFRESH, lambda at, proof: self._transport.refresh(at, proof, request)
        )
        with self._clock_named():
            kept = rotation.refreshed(old, reply, presented=presented, jkt=self.jkt, now=self._clock.now())
        return *kept, router

    @contextmanager
    def _clock_named(self) -> Iterator[None]:
        try:
            yield
        except TokenRefused as error:
            raise (refusals.wrong_times(error, self._transport.skew) if error.clock else error) from None

    async def _round(
        self, routers: tuple[str, ...], path: str, call: Callable[[str, str], Awaitable[dict[str, Any]]]
    ) -> tuple[dict[str, Any], str]:
        """The first reply. An answer that another router cannot better ends the round at once."""
        errors: list[RouterError] = []
        for router in routers:
            try:
                return await self._proven(router, path, call), router
            except RouterError as error:
                if error.action not in refusals.TRANSIENT:
                    raise
                errors.append(error)
        raise next((error for error in errors if error.action is Action.FINAL), errors[-1])

    async def _proven(
        self, router: str, path: str, call: Callable[[str, str], Awaitable[dict[str, Any]]]
    ) -> dict[str, Any]:
        try:
            return await call(router, self._proof(router + path, 0.0))
        except RouterError as error:
            if error.action is not Action.CLOCK or error.date_skew is None:
                raise
            skew = error.date_skew
        return await call(router, self._proof(router + path, skew))

    def _proof(self, url: str, skew: float) -> str:
        iat = int(self._clock.now() + skew)
        return jose.dpop_proof(self._key, htm="POST", htu=url, iat=iat, jti=secrets.token_urlsafe(16))
