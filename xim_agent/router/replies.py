"""What the router says in HTTP: errors in the form the caller understands, MessagePack, zstd where it is accepted."""

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from hypercorn.utils import UnexpectedMessageError
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from xim_agent import PROTOCOL
from xim_agent.mesh import codec
from xim_agent.mesh.content import pack
from xim_agent.mesh.messages import Head
from xim_agent.router.incoming import Gone, Incoming
from xim_agent.router.jobs import Outcome
from xim_agent.router.tokens import Problem

MSGPACK = "application/vnd.msgpack"

# Hop-by-hop, made by the server itself, or a way to act on the router's own origin.
_DROPPED = frozenset({
    "connection", "keep-alive", "proxy-connection", "transfer-encoding", "te", "trailer", "upgrade",
    "content-length", "date", "server",
    "set-cookie", "alt-svc", "strict-transport-security", "clear-site-data",
})  # fmt: skip
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]{1,128}")
_ZSTD = re.compile(r"\bzstd\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))", re.IGNORECASE)
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]{0,8192}")


class ApiError(Exception):
    """An error for a client, in OpenAI's envelope. `retry_after` in seconds; `param`: the member that is wrong."""

    def __init__(
        self, status: int, code: str, message: str, retry_after: int | None = None, *, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after = retry_after
        self.param = param

    @classmethod
    def of(cls, outcome: Outcome) -> "ApiError":
        return cls(outcome.status, outcome.code, outcome.message, 1 if outcome.status in (429, 503) else None)

    def body(self, kind: str = "") -> bytes:
        """The envelope; `kind` is its `type`, by default after the status."""
        if not kind:
            kind = "service_error" if self.status >= 500 or self.status == 429 else "invalid_request_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def response(self) -> Response:
        return Response(self.body(), self.status, _retry_after(self.retry_after), "application/json")


def _retry_after(seconds: float | None) -> dict[str, str]:
    """In whole seconds, never too few."""
    return {} if seconds is None else {"retry-after": str(math.ceil(seconds))}


def problem_response(problem: Problem) -> Response:
    """application/problem+json (RFC 9457) with our `code`."""
    body = {"type": "about:blank", "title": problem.code, "status": problem.status, "detail": problem.detail}
    content = json.dumps({**body, "code": problem.code, **problem.extra}).encode()
    return Response(content, problem.status, _retry_after(problem.retry_after), "application/problem+json")


def error_response(error: Problem | ApiError) -> Response:
    return problem_response(error) if isinstance(error, Problem) else error.response()


def check_protocol(headers: Mapping[str, str]) -> None:
    """Raises Problem 426 unless the caller speaks our version."""
    called = headers.get("xim-protocol")
    if called != str(PROTOCOL):
        agent = f"the agent {called:.20}" if called else "the request has no XIM-Protocol header"
        detail = f"this router speaks protocol {PROTOCOL}, {agent}"
        raise Problem(426, "protocol_unsupported", detail, {"protocols": [PROTOCOL]})


def with_protocol(send: Send) -> Send:
    """Every reply to an agent says which version speaks."""

    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (b"xim-protocol", str(PROTOCOL).encode())]}
        await send(message)

    return wrapped


def packed(request: Request, body: bytes, media_type: str, status: int = 200) -> Response:
    """zstd where the caller accepts it and it saves something."""
    headers: dict[str, str] = {}
    if _ZSTD.search(request.headers.get("accept-encoding", "")):
        headers, body = pack(body)
    return Response(body, status, headers, media_type)


def message(request: Request, reply: Any) -> Response:
    return packed(request, codec.encode(reply), MSGPACK)


def head_fields(head: Head, request_id: str) -> list[tuple[bytes, bytes]]:
    """The engine's headers as they are, without what is not a header or not an engine's to say."""
    fields = {
        name: value.strip()
        for name, value in ((n.lower(), v) for n, v in head.headers.items())
        if name not in _DROPPED and _NAME.fullmatch(name) and _VALUE.fullmatch(value)
    }
    fields.setdefault("x-request-id", request_id)
    return [(name.encode(), value.encode("latin-1")) for name, value in fields.items()]


async def not_found(scope: Scope, receive: Receive, send: Send) -> None:
    """For every path that is not served."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1000})
    elif _by_agent(scope):
        problem = Problem(404, "not_found", "there is nothing at this path")
        await problem_response(problem)(scope, receive, with_protocol(send))
    else:
        await ApiError(404, "not_found", f"there is nothing at {scope['path']:.200}").response()(scope, receive, send)


async def full(scope: Scope, receive: Receive, send: Send) -> None:
    """For every caller while there are too many connections: this one is closed."""
    try:
        await Incoming(receive).discard()
    except Gone:
        return
    text = "as many connections are open as this router may have; try again"
    await _unavailable("router_full", text, 5, scope, receive, send)


async def stopping(scope: Scope, receive: Receive, send: Send) -> None:
    """For a caller that has no reply yet when the router is stopped. One whose reply has begun is cut off.

    An agent is told no time: by itself it tries again sooner than any that could be promised.
    """
    with suppress(UnexpectedMessageError):
        text = "the router is stopping; try again"
        await _unavailable("router_stopping", text, None if _by_agent(scope) else 1, scope, receive, send)


async def _unavailable(code: str, text: str, again: int | None, scope: Scope, receive: Receive, send: Send) -> None:
    agent = _by_agent(scope)
    error = Problem(503, code, text, retry_after=again) if agent else ApiError(503, code, text, again)
    response = error_response(error)
    response.headers["connection"] = "close"
    await response(scope, receive, with_protocol(send) if agent else send)


def _by_agent(scope: Scope) -> bool:
    return "xim-protocol" in Headers(scope=scope)
