"""The agent's calls to the router, by name. Every failure is a `RouterError` that says who must act."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Protocol, Self, TypeVar
from urllib.parse import quote

import msgspec
from msgspec import Raw

from xim_agent.clock import Clock
from xim_agent.mesh import codec, failures
from xim_agent.mesh.blob import BlobReply, open_blob
from xim_agent.mesh.content import pack
from xim_agent.mesh.messages import MAX_BODY, MAX_EVENTS, MAX_POLL_REPLY, EventsReply, PollReply, PollRequest
from xim_agent.mesh.transport import SILENCE_SECONDS, ClientStatistics, Reply, Transport
from xim_agent.outcome import Action, RouterError

MAX_IDENTITY = 64 * 1024
MAX_ASSIGNMENT = 256 * 1024
MAX_MANIFEST = 64 * 1024 * 1024
# Of the token, or of the credential behind it: a refresh tells, and knows what else there is to try.
REFUSED = frozenset({Action.REFRESH, Action.ENROLL_AGAIN})
T = TypeVar("T")


class Bearer(Protocol):
    @property
    def router(self) -> str: ...
    @property
    def token(self) -> str: ...


class Credentials(Protocol):
    async def wait_bearer(self) -> Bearer: ...
    async def refused(self, token: str) -> None: ...


class RouterClient:
    """`on_skew` gets the router's Date minus our clock, in seconds, with every reply. `credentials` is set before use.

    A refused token asks `credentials` for a refresh and repeats once; a second refusal is the retry class. Cancelling a
    call closes its connection and leaves nothing else behind.
    """

    def __init__(self, *, insecure: bool, clock: Clock, on_skew: Callable[[float], None]) -> None:
        self.credentials: Credentials | None = None
        self._transport = Transport(insecure=insecure, clock=clock, on_skew=on_skew)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *info: object) -> None:
        await self._transport.aclose()

    def statistics(self) -> ClientStatistics:
        return self._transport.statistics()

    # identity

    @property
    def skew(self) -> float | None:
        return self._transport.statistics().skew

    async def enroll(self, router: str, proof: str, request: dict[str, Any]) -> dict[str, Any]:
        return await self._identity(router, "/v1/enroll", proof, request)

    async def refresh(self, router: str, proof: str, request: dict[str, Any]) -> dict[str, Any]:
        return await self._identity(router, "/v1/enroll/refresh", proof, request)

    async def _identity(self, router: str, path: str, proof: str, request: dict[str, Any]) -> dict[str, Any]:
        url = self._transport.url(router, path)
        headers = {"dpop": proof, "content-type": "application/json"}
        reply = await self._transport.call("POST", url, headers, body=msgspec.json.encode(request), limit=MAX_IDENTITY)
        try:
            return msgspec.json.decode(reply.body, type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise self._transport.malformed("POST", url, str(error)) from None

    async def leave(self) -> None:
        await self._authorized("POST", "/v1/agents/self/leave", limit=MAX_IDENTITY)

    # assignment and models

    async def assignment(self) -> str | None:
        """The signed assignment as it came; None when no model is assigned."""
        reply = await self._authorized("GET", "/v1/assignment", limit=MAX_ASSIGNMENT)
        # Not ASCII is no JWS either, and is refused with the signature.
        return None if reply.status == 204 else reply.body.decode("latin-1").strip()

    async def manifest(self, sha256_hex: str) -> bytes:
        """Decoded bytes, at most 64 MiB; the caller compares the digest."""
        return (await self._authorized("GET", f"/v1/models/manifests/{sha256_hex}", limit=MAX_MANIFEST)).body

    @asynccontextmanager
    async def blob(self, sha256_hex: str, offset: int) -> AsyncIterator[BlobReply]:
        """One chunk from byte `offset` on; the reply's `start` tells where the router really begins."""
        async with AsyncExitStack() as stack:

            async def enter(bearer: Bearer) -> BlobReply:
                url = self._transport.url(bearer.router, f"/v1/models/blobs/{sha256_hex}")
                own = {"authorization": f"Bearer {bearer.token}", "xim-protocol": str(failures.PROTOCOL)}
                return await stack.enter_async_context(open_blob(self._transport, url, own, offset))

            yield await self._with_bearer(enter)

    # work

    async def poll(self, request: PollRequest) -> PollReply:
        silence = request.wait_ms / 1000 + SILENCE_SECONDS
        body = codec.encode(request)
        return await self._work("/v1/work/poll", body, MAX_POLL_REPLY, self._poll_reply, silence)

    def _poll_reply(self, data: bytes) -> PollReply:
        def nameless(reason: str) -> None:
            self._transport.count(RouterError("lease_malformed", reason))

        return codec.decode_poll_reply(data, nameless)

    async def events(self, boot: str, frames: Sequence[bytes | Raw]) -> EventsReply:
        body = codec.encode_events(boot, frames)
        return await self._work("/v1/work/events", body, MAX_EVENTS, codec.decode_events_reply, SILENCE_SECONDS)

    async def lease_body(self, request_id: str) -> bytes:
        path = f"/v1/work/leases/{quote(request_id, safe='')}/body"
        return (await self._authorized("GET", path, limit=MAX_BODY)).body

    async def _work(self, path: str, body: bytes, limit: int, decode: Callable[[bytes], T], silence: float) -> T:
        headers, packed = pack(body)
        headers["content-type"] = headers["accept"] = "application/vnd.msgpack"

        async def call(bearer: Bearer) -> Reply:
            own = {**headers, "authorization": f"Bearer {bearer.token}"}
            url = self._transport.url(bearer.router, path)
            return await self._transport.post(url, own, body=packed, limit=limit, silence=silence)

        reply = await self._with_bearer(call)
        try:
            return decode(reply.body)
        except codec.CodecError as error:
            raise self._transport.count(failures.malformed(f"POST {path}", str(error))) from None

    # credentials

    async def _authorized(
        self,
        method: str,
        path: str,
        *,
        limit: int,
    ) -> Reply:
        async def call(bearer: Bearer) -> Reply:
            url = self._transport.url(bearer.router, path)
            return await self._transport.call(method, url, {"authorization": f"Bearer {bearer.token}"}, limit=limit)

        return await self._with_bearer(call)

    async def _with_bearer(self, use: Callable[[Bearer], Awaitable[T]]) -> T:
        assert self.credentials is not None, "set when the agent is wired"
        bearer = await self.credentials.wait_bearer()
        try:
            return await use(bearer)
        except RouterError as error:
            if error.action not in REFUSED:
                raise
        await self.credentials.refused(bearer.token)
        try:
            return await use(await self.credentials.wait_bearer())
        except RouterError as error:
            if error.action in REFUSED:
                error.retry()
            raise
