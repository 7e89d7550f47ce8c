"""The body of a request: read within a bound, discarded when it is refused, given to a handler as if it just came."""

from contextlib import suppress

import trio
from starlette.types import Message, Receive

from xim_agent.mesh.messages import MAX_BODY

PATIENCE_SECONDS = 90.0  # a client that pauses for a minute still gets its answer


class Gone(Exception):
    """The caller left before its request was complete."""


class Silent(Exception):
    """The caller sends nothing more of its request, and keeps the connection."""


class TooLarge(Exception):
    """The body is over its limit."""


class Incoming:
    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._more = True

    async def read(self, limit: int) -> bytes:
        """`limit` in bytes. Raises Gone, Silent, TooLarge."""
        parts, size = [], 0
        while self._more:
            parts.append(await self._part())
            size += len(parts[-1])
            if size > limit:
                parts.clear()  # or the exception has them while the rest is discarded
                raise TooLarge
        return b"".join(parts)

    async def discard(self) -> None:
        """Reads what is left of a refused body: closing over unread data may take the reply with it. Raises Gone."""
        size = 0
        with suppress(Silent):
            while self._more and size <= MAX_BODY:
                size += len(await self._part())

    async def left(self) -> None:
        """Returns when the caller has closed the connection."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _part(self) -> bytes:
        with trio.move_on_after(PATIENCE_SECONDS) as patience:
            message = await self._receive()
        if patience.cancelled_caught:
            self._more = False
            raise Silent
        if message["type"] == "http.disconnect":
            raise Gone
        self._more = message.get("more_body", False)
        return bytes(message.get("body", b""))


class Replay:
    """`receive` for a handler: the body, then nothing; the caller's leaving arrives as a cancellation.

    It gives the body away: whoever has one for as long as an answer takes does not have 32 MiB with it.
    """

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body

    async def __call__(self) -> Message:
        if self._body is None:
            await trio.sleep_forever()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}
