"""What the dashboard's parts are made of: who looks, and how a handler reads and answers JSON."""

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from xim_agent.router.replies import ApiError

Role = Literal["admin", "read-only"]
MAX_WRITE = 1024 * 1024  # bytes of a write: a conversation of the chat is the longest


@dataclass(frozen=True)
class Viewer:
    """Who is signed in. `session`: the hash of the session's secret."""

    session: bytes
    role: Role

    @property
    def writes(self) -> bool:
        return self.role == "admin"


Handler = Callable[[Request, Viewer], Awaitable[ASGIApp]]


class Part(Protocol):
    """Handlers by path; a path of both is GET in `reads` and POST in `writes`. They raise ApiError or Problem.

    A handler of `writes` is called only for an admin's own page; `{name}` in a path is in `request.path_params`.
    """

    @property
    def reads(self) -> Mapping[str, Handler]: ...

    @property
    def writes(self) -> Mapping[str, Handler]: ...


async def asked(request: Request) -> dict[str, Any]:
    """The JSON object of a write. Raises ApiError 400."""
    try:
        value = json.loads(await request.body())
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ApiError(400, "invalid_request", "the body must be a JSON object")
    return value


def reply(value: Any, status: int = 200) -> Response:
    """`value` as JSON, which has no NaN: a handler that gives one fails."""
    return Response(json.dumps(value, allow_nan=False), status, media_type="application/json")
