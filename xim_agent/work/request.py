"""One lease from its receipt to its one ending. The only place where any exception at all is caught."""

import logging
import math
import random
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import trio

from xim_agent.backoff import Backoff
from xim_agent.errors import AgentError
from xim_agent.mesh.messages import MAX_BODY, End, Error, ErrorCode, Lease
from xim_agent.outcome import Action, RouterError
from xim_agent.work.lease import reply_headers, request_headers
from xim_agent.work.outgoing import Outgoing
from xim_agent.work.tail import Tail

log = logging.getLogger("xim_agent.work")

_CODES: dict[str, ErrorCode] = {
    "engine_lost": "engine_lost", "poison_request": "invalid_request", "reply_too_large": "invalid_request",
}  # fmt: skip


class _BrokeOff(AgentError):
    """The engine's own words go to the router, like its answer, and into no log: they may quote the request."""

    def __init__(self, words: str) -> None:
        super().__init__("engine_lost", f"the engine broke off: {words}")


class Taker(Protocol):
    def take(self, piece: bytes) -> bool: ...
    async def room(self) -> None: ...


class EngineReply(Protocol):
    """`headers`: lower-case names. `relay` gives the whole body, and raises an AgentError with code `engine_lost` when
    the engine is gone; it reads on only while `take` says so, else after `room`.
    """

    @property
    def status(self) -> int: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    async def relay(self, taker: Taker) -> None: ...


class EngineClient(Protocol):
    def open(
        self, path: str, headers: Mapping[str, str], body: bytes, *, tenant: str = ""
    ) -> AbstractAsyncContextManager[EngineReply]:
        """Leaving the context, by cancellation too, closes the connection, which aborts the request at vLLM.

        Raises AgentError: `engine_lost`, and `poison_request` for one that no engine is to see again.
        """
        ...


class Engine(Protocol):
    @property
    def ready(self) -> bool: ...
    @property
    def client(self) -> EngineClient: ...


class Bodies(Protocol):
    async def lease_body(self, request_id: str) -> bytes: ...


async def serve(lease: Lease, out: Outgoing, engine: Engine, bodies: Bodies) -> None:
    """Relays the engine's answer unchanged. Raises only when cancelled from outside, which ends in `draining`."""
    ending: End | Error | None = None
    told: dict[str, object] = {"request": lease.request, "lease": lease.id}
    try:
        with out.scope:
            ending = await _relay(lease, out, engine, bodies)
        if ending is None:
            ending = _cut_short(out)
    except AgentError as error:
        code = _CODES.get(error.code, "internal")
        reason = "the engine broke off" if isinstance(error, _BrokeOff) else error.message
        log.warning("request failed", extra=told | {"code": error.code, "reason": reason})
        # A request that brings an engine down is not to be tried on the next one.
        ending = Error(code, error.message[:2000], retryable=out.untouched and code != "invalid_request")
    except Exception as error:
        log.exception("request failed by a bug", extra=told)
        ending = Error("internal", f"internal error: {type(error).__name__}", retryable=out.untouched)
    finally:
        if ending is None:
            ending = Error("draining", "the agent is stopping", retryable=out.untouched)
        out.end(ending)


def _cut_short(out: Outgoing) -> End | Error:
    """Why the scope was cancelled; without a verdict it was the deadline."""
    verdict = out.verdict
    if isinstance(verdict, Error):
        return verdict
    if verdict is None or verdict == "unknown":
        return out.ending("deadline")
    return out.ending(verdict)


async def _relay(lease: Lease, out: Outgoing, engine: Engine, bodies: Bodies) -> End | Error:
    body = lease.body if lease.body is not None else await _fetch(lease.request, bodies)
    if len(body) > MAX_BODY:
        return Error("invalid_request", f"the body has {len(body)} bytes, over {MAX_BODY}", retryable=False)
    asked = request_headers(lease.headers, lease.request)
    out.asks(asked["traceparent"])
    async with engine.client.open(lease.path, asked, body, tenant=lease.tenant) as reply:
        out.head(reply.status, reply_headers(reply.headers))
        if out.events:
            out.tail = Tail()
        await reply.relay(out)
        if out.tail is not None and (message := out.tail.error()) is not None:
            raise _BrokeOff(message)
    if not engine.ready:
        return Error("engine_lost", "the engine stopped during the request", retryable=out.untouched)
    return out.ending("complete")


async def _fetch(request: str, bodies: Bodies) -> bytes:
    """A body by reference; tried until the lease's deadline ends it."""
    backoff = Backoff()
    while True:
        try:
            return await bodies.lease_body(request)
        except RouterError as error:
            if error.code == "lease_unknown":  # its client has left: the cancel is on its way, and says how it ends
                wait = math.inf
            elif error.action is not Action.RETRY or error.code == "reply_too_large":
                raise
            else:
                wait = backoff.next(random.random(), error.retry_after)
        await trio.sleep(wait)
