"""One path of the router: who may call it, how much it takes, and what happens when the caller leaves or we stop."""

import logging
import math
import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import trio
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from xim_agent.mesh.content import ContentError, unpack
from xim_agent.router.incoming import PATIENCE_SECONDS, Gone, Incoming, Replay, Silent, TooLarge
from xim_agent.router.replies import ApiError, error_response, stopping, with_protocol
from xim_agent.router.tokens import Problem

log = logging.getLogger("xim_agent.router")

LAST_WORD_SECONDS = 1.0  # for a caller that does not read
Who = TypeVar("Who")


@dataclass(frozen=True, eq=False)
class Endpoint(Generic[Who]):
    """One path. `admit` judges the headers before the body is read; `limit`: bytes of the body, decoded.

    `admit` and `handle` raise Problem or ApiError for an error reply. The handler, and the reply it returns, are
    cancelled when the caller closes the connection. Nothing between them and the connection buffers. `waits`: whether a
    handler ever does; for the others nobody need watch the caller meanwhile.
    """

    methods: frozenset[str]
    limit: int
    admit: Callable[[Request], Who]
    handle: Callable[[Request, Who], Awaitable[ASGIApp]]
    agents: bool = False
    waits: bool = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._call(scope, receive, with_protocol(send) if self.agents else send)
        finally:
            # We stop, or this connection broke: a caller that left is dealt with in `_call`.
            if trio.current_effective_deadline() == -math.inf:
                with trio.move_on_after(LAST_WORD_SECONDS, shield=True):
                    await stopping(scope, receive, send)

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        incoming = Incoming(receive)
        try:
            try:
                who, body = await self._enter(Request(scope, receive), incoming)
            except (Problem, ApiError, sqlite3.Error) as error:
                await incoming.discard()
                await self._refusal(error)(scope, receive, send)
                return
        except Gone:
            return
        if not self.waits:
            await self._answer(scope, body, who, send)
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_when_left, incoming, nursery.cancel_scope)
            await self._answer(scope, body, who, send)
            nursery.cancel_scope.cancel()

    async def _answer(self, scope: Scope, body: Replay, who: Who, send: Send) -> None:
        reply: ASGIApp
        try:
            reply = await self.handle(Request(scope, body), who)
        except (Problem, ApiError, sqlite3.Error) as error:
            reply = self._refusal(error)
        await reply(scope, Replay(b""), send)

    async def _enter(self, request: Request, incoming: Incoming) -> tuple[Who, Replay]:
        if request.method not in self.methods:
            raise self._error(405, "method_not_allowed", f"{request.method} is not allowed here")
        who = self.admit(request)
        try:
            body = await incoming.read(self.limit)
            return who, Replay(unpack(body, request.headers.get("content-encoding", ""), self.limit))
        except Silent:
            text = f"nothing more of the body came for {PATIENCE_SECONDS:g} s"
            raise self._error(408, "request_timeout", text) from None
        except TooLarge:
            raise self._error(413, "request_too_large", f"the body is larger than {self.limit} bytes") from None
        except ContentError as error:
            raise self._error(400, "invalid_request", f"the body: {error}") from None

    def _refusal(self, error: Problem | ApiError | sqlite3.Error) -> ASGIApp:
        if isinstance(error, sqlite3.Error):
            log.warning("a request failed: the router's database does not answer", extra={"error": str(error)})
            error = self._error(503, "router_busy", "the router's database does not answer; try again")
        return error_response(error)

    def _error(self, status: int, code: str, detail: str) -> Problem | ApiError:
        return Problem(status, code, detail) if self.agents else ApiError(status, code, detail)


async def _cancel_when_left(incoming: Incoming, scope: trio.CancelScope) -> None:
    await incoming.left()
    scope.cancel()
