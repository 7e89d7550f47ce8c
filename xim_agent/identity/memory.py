"""The state the agent works with: read from disk once, changed only after the change is on disk."""

from pathlib import Path
from typing import Protocol

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import structs

from xim_agent.identity import claims, jose
from xim_agent.identity.claims import TokenRefused
from xim_agent.identity.rotation import Enrollment, State
from xim_agent.mesh.messages import Assignment


class Store(Protocol):
    def load(self) -> State | None: ...

    async def save(self, state: State) -> None: ...

    async def set_aside(self, suffix: str, instead: State | None) -> Path: ...


class Memory:
    """Every method may raise AgentError with exit 77 (see store.py); a save that failed leaves the old state in use."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._state: State | None = None
        self._loaded = False
        self._saving = trio.Lock()

    @property
    def enrollment(self) -> Enrollment | None:
        if not self._loaded:
            self._state, self._loaded = self._store.load(), True
        return self._state.enrollment if self._state else None

    async def key(self) -> Ed25519PrivateKey:
        """The agent's key, made and on disk before anybody is told about it."""
        async with self._saving:
            if self.enrollment is None and self._state is None:
                await self._save(State(jose.private_text(Ed25519PrivateKey.generate())))
            assert self._state is not None
            return jose.private_key(self._state.key)

    async def keep(self, fresh: Enrollment) -> bool:
        """Stores what a router replied. An assignment accepted while the call was under way is not lost.

        True when the assignment that is remembered cannot be verified by the new keys: it should be fetched again.
        """
        async with self._saving:
            old = self.enrollment
            if old is not None and (old.agent_id, old.issuer) == (fresh.agent_id, fresh.issuer):
                fresh = structs.replace(fresh, assignment=old.assignment, assignment_iat=old.assignment_iat)
            assert self._state is not None
            await self._save(structs.replace(self._state, enrollment=fresh))
        return fresh.assignment is not None and self.remembered() is None

    async def set_aside(self, suffix: str, *, keep_key: bool) -> Path:
        """Ends the enrollment. With its key an agent is still known to the router, that removed it for example."""
        async with self._saving:
            instead = State(self._state.key) if keep_key and self._state is not None else None
            kept = await self._store.set_aside(suffix, instead)
            self._state, self._loaded = instead, True
            return kept

    def verified(self, jws: str) -> Assignment:
        """Raises TokenRefused, UnknownKid."""
        old = self.enrollment
        if old is None:
            raise TokenRefused("assignment_refused", "assignment", "this agent is not enrolled")
        return claims.verify_assignment(jws, old.key_set().keys, old.issuer, old.agent_id, old.assignment_iat)

    async def remember(self, jws: str | None, iat: int = 0) -> None:
        """The assignment for a start without the router; None when there is none. Older ones stay refused."""
        async with self._saving:
            old = self.enrollment
            if self._state is None or old is None or old.assignment == jws:
                return
            fresh = structs.replace(old, assignment=jws, assignment_iat=max(iat, old.assignment_iat))
            await self._save(structs.replace(self._state, enrollment=fresh))

    def remembered(self) -> Assignment | None:
        """The last assignment accepted, checked again; None also when its key has been rotated out since."""
        if self.enrollment is None or self.enrollment.assignment is None:
            return None
        try:
            return self.verified(self.enrollment.assignment)
        except TokenRefused:
            return None

    async def _save(self, state: State) -> None:
        await self._store.save(state)
        self._state = state
