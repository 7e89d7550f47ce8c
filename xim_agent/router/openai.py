"""The router's side for clients: OpenAI's API (wire-protocol §7). Bodies pass unchanged in both directions."""

import hashlib
import logging
import secrets
from typing import Any

import msgspec
import trio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from xim_agent.clock import Clock
from xim_agent.mesh.trace import trace_id, traced
from xim_agent.router import catalog
from xim_agent.router.dispatch import Dispatch
from xim_agent.router.ending import Ending
from xim_agent.router.jobs import COMPLETE, Job, Outcome, Refused
from xim_agent.router.replies import ApiError, head_fields
from xim_agent.router.store import Store
from xim_agent.watch import Watch

log = logging.getLogger("xim_agent.router")

_PASSED = ("content-type", "accept", "traceparent", "tracestate")


class Asked(msgspec.Struct):
    """All the router reads of a request; the engine judges the rest."""

    model: str | None = None
    stream: Any = False


_asked = msgspec.json.Decoder(Asked)


class ClientApi:
    def __init__(self, store: Store, dispatch: Dispatch, clock: Clock) -> None:
        self._store = store
        self._dispatch = dispatch
        self._clock = clock
        self._used: dict[bytes, float] = {}

    def save_used(self) -> None:
        """Writes when each API key was last used; what was not written is kept. Raises sqlite3.Error."""
        self._store.save_used(self._used)
        self._used = {}

    def client(self, request: Request) -> str:
        """The project of the API key. Raises ApiError 401."""
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        found = catalog.find_api_key(self._store.db, key.strip()) if kind.lower() == "bearer" else None
        if found is None:
            what = "Incorrect API key provided." if key else "You didn't provide an API key."
            raise ApiError(401, "invalid_api_key", f"{what} Make one with `router api-key create --project NAME`.")
        hashed, project = found
        self._used[hashed] = self._clock.now()
        return project

    async def complete(self, request: Request, project: str) -> "Relay":
        """Any of the served paths."""
        body = await request.body()
        try:
            asked = _asked.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ApiError(400, "invalid_request", f"The body is no JSON request: {error}") from None
        model = self._model(asked.model)
        watch = Watch()
        headers: dict[str, str] = {}
        for name, value in request.headers.items():
            if name in _PASSED or name.startswith("x-slo-"):
                # What comes twice is one list (RFC 9110 §5.3), but a content-type is none: the last one counts.
                several = name in headers and name != "content-type"
                headers[name] = f"{headers[name]}, {value}" if several else value
        name = f"req-{secrets.token_hex(12)}"
        job = Job(
            request=name,
            project=project,
            model=model,
            path=request.scope["path"],
            headers=traced(headers, name),
            body=body,
            stream=asked.stream is True,
            tenant=hashlib.sha256(f"tenant|{project}".encode()).hexdigest()[:16],
            wake=watch.bump,
            expected=catalog.expects(self._store.db, project, model),
        )
        return Relay(self._dispatch, job, watch)

    def _model(self, asked: str | None) -> str:
        if asked is None:
            assigned = catalog.assigned_models(self._store.db)
            if len(assigned) != 1:
                raise ApiError(400, "invalid_request", "You must provide a model parameter.")
            return assigned[0].name
        if catalog.find_model(self._store.db, asked) is None:
            raise ApiError(404, "model_not_found", f"The model {asked!r:.200} does not exist.")
        return asked

    async def models(self, request: Request, project: str) -> Response:
        data = [_described(model) for model in catalog.assigned_models(self._store.db)]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: Request, project: str) -> Response:
        name = request.path_params["name"]
        for model in catalog.assigned_models(self._store.db):
            if model.name == name:
                return JSONResponse(_described(model))
        raise ApiError(404, "model_not_found", f"The model {name!r:.200} does not exist.")


def _described(model: catalog.Published) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": int(model.created), "owned_by": "xerotier"}


class Relay:
    """The reply to one request: waits for an agent, then passes on what it sends. Cancelled when the client leaves.

    A stream begins with its first data, so that an agent that fails before it can be replaced; everything else is kept
    until it is complete. Data goes out as it comes, and is credited when the connection has taken it.
    """

    def __init__(self, dispatch: Dispatch, job: Job, watch: Watch) -> None:
        self._dispatch = dispatch
        self._job = job
        self._watch = watch
        self._received = trio.current_time()
        self._first: float | None = None
        self._last: float | None = None
        self._bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        job = self._job
        try:
            self._dispatch.submit(job, trio.current_time())
            while job.outcome is None and (job.buffered or not job.chunks):
                await self._change()
            if job.outcome is None:
                await self._stream(send)
            elif job.outcome is COMPLETE:
                await self._whole(send)
            else:
                await ApiError.of(job.outcome).response()(scope, receive, send)
        except Refused as refused:
            job.finish(refused.outcome)
            await ApiError.of(refused.outcome).response()(scope, receive, send)
        finally:
            self._dispatch.release(job, trio.current_time())
            self._count()
            log.debug("request", extra=self._hops())
            job.grant = None  # which holds the job: in a circle both stay, body and all, until the collector comes

    def _count(self) -> None:
        first = None if self._first is None or self._job.buffered else self._first - self._received
        self._dispatch.board.times.over(
            self._ending,
            self._bytes,
            first=first,
            seconds=trio.current_time() - self._received,
            trace=trace_id(self._job.headers["traceparent"]) or "",
        )

    @property
    def _ending(self) -> str:
        outcome = self._job.outcome
        return "left" if outcome is None else outcome.code or "complete"

    def _hops(self) -> dict[str, Any]:
        """Nothing of the content; times in ms since the request was complete, None for what was not."""
        job, now = self._job, trio.current_time()
        times = {"granted": job.granted_at, "first": self._first, "last": self._last, "done": now}
        told = {
            "request": job.request, "trace": trace_id(job.headers["traceparent"]), "path": job.path,
            "status": job.head.status if job.head else None, "bytes": self._bytes, "ending": self._ending,
            "agent": job.grant.agent if job.grant else None, "retries": job.retries,
        }  # fmt: skip
        return told | {
            f"{name}_ms": None if at is None else round((at - self._received) * 1000, 1) for name, at in times.items()
        }

    async def _data(self, send: Send, data: bytes, more: bool = True) -> None:
        """Returns when the client's connection has taken it."""
        if self._first is None:
            self._first = trio.current_time()
        await send({"type": "http.response.body", "body": data, "more_body": more})
        self._bytes += len(data)
        self._last = trio.current_time()

    async def _change(self) -> None:
        await self._watch.wait_beyond(self._watch.version)

    async def _whole(self, send: Send) -> None:
        assert self._job.head is not None
        body = self._dispatch.take(self._job)
        fields = [*head_fields(self._job.head, self._job.request), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": self._job.head.status, "headers": fields})
        await self._data(send, body, more=False)

    async def _stream(self, send: Send) -> None:
        job = self._job
        assert job.head is not None
        fields = head_fields(job.head, job.request)
        await send({"type": "http.response.start", "status": job.head.status, "headers": fields})
        ending = Ending()
        while job.chunks or job.outcome is None:
            if not job.chunks:
                await self._change()
                continue
            data = self._dispatch.take(job)
            await self._data(send, data)
            ending.feed(data)
            self._dispatch.consumed(job, len(data), trio.current_time())
        if job.outcome is COMPLETE or ending.said:
            # What has said its last word is an answer with an ending, or an error of the engine's that the client has:
            # a second ending would be one too many.
            await send({"type": "http.response.body", "body": b""})
        elif job.outcome is not None:
            await send({"type": "http.response.body", "body": _event(job.outcome, ending), "more_body": True})
            # Returning here, without the end of the body, makes the server cut the connection: never a clean end.


def _event(outcome: Outcome, ending: Ending) -> bytes:
    """An SSE event of its own, whatever the cut one before it left open."""
    start = b"" if ending.between else b"\n\n"
    return start + b"data: " + ApiError.of(outcome).body("stream_error") + b"\n\n"
