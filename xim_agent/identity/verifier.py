"""Judges assignments by the router's keys and remembers the last one, for a start while no router answers (§4)."""

import logging
from collections.abc import Awaitable, Callable

from xim_agent.errors import AgentError
from xim_agent.identity.claims import UnknownKid
from xim_agent.identity.memory import Memory
from xim_agent.mesh.messages import Assignment
from xim_agent.outcome import RouterError

log = logging.getLogger("xim_agent.identity")


class AssignmentVerifier:
    """`refresh` fetches the router's newest keys; it tells whether that succeeded."""

    def __init__(self, memory: Memory, refresh: Callable[[], Awaitable[bool]]) -> None:
        self._memory = memory
        self._refresh = refresh

    async def verify_assignment(self, jws: str) -> Assignment:
        """Also remembers it on disk.

        Raises TokenRefused. When it is signed by an unknown key, the newest key set is fetched first; where that fails,
        nobody knows yet, and it is a RouterError of the retry class.
        """
        unknown = None
        try:
            assignment = self._memory.verified(jws)
        except UnknownKid as error:
            unknown = error
        if unknown is not None:
            if not await self._refresh():
                raise RouterError(unknown.code, unknown.message)
            assignment = self._memory.verified(jws)
        try:
            await self._memory.remember(jws, assignment.iat)
        except AgentError as error:  # good all the same: only a start without the router would miss it
            log.warning(f"assignment not remembered: {error.message}", extra={"code": error.code})
        return assignment

    def remembered_assignment(self) -> Assignment | None:
        """The last one accepted, checked again; None when there is none or its key has been rotated out since."""
        return self._memory.remembered()

    async def forget_assignment(self) -> None:
        """The router assigns no model: the next start must not begin with the old one. Older ones stay refused."""
        await self._memory.remember(None)
