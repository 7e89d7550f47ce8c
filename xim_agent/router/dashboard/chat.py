"""*Try it*: a conversation from the dashboard, answered as any client's, without an API key."""

import json
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from xim_agent.router import names
from xim_agent.router.dashboard import form
from xim_agent.router.dashboard.parts import Handler, Viewer, asked
from xim_agent.router.incoming import Replay
from xim_agent.router.openai import ClientApi
from xim_agent.router.replies import ApiError

MOST_MESSAGES = 1000
MOST_TOKENS = 1_000_000
_PATH = "/v1/chat/completions"
_ROLES = ("system", "user", "assistant")


class Chat:
    """The page closes the request to stop an answer; the agent's lease ends with it."""

    def __init__(self, clients: ClientApi) -> None:
        self._clients = clients
        self.reads: dict[str, Handler] = {}
        self.writes: dict[str, Handler] = {"/dashboard/api/chat": self._ask}

    async def _ask(self, request: Request, _: Viewer) -> ASGIApp:
        given = await asked(request)
        project = form.checked(given, "project", names.project_name)
        body: dict[str, Any] = {
            "model": form.text(given, "model"),
            "messages": _messages(given.get("messages")),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if given.get("max_tokens") is not None:
            body["max_tokens"] = form.whole(given, "max_tokens", 1, MOST_TOKENS)
        headers = [(b"content-type", b"application/json"), (b"accept", b"text/event-stream")]
        scope = {**request.scope, "path": _PATH, "headers": headers}
        return await self._clients.complete(Request(scope, Replay(json.dumps(body).encode())), project)


def _messages(given: Any) -> list[dict[str, str]]:
    """Raises ApiError 400."""
    good = isinstance(given, list) and 1 <= len(given) <= MOST_MESSAGES
    good = good and all(
        isinstance(m, dict) and m.get("role") in _ROLES and isinstance(m.get("content"), str) for m in given
    )
    if not good:
        text = (
            f"messages: it must be 1 to {MOST_MESSAGES} objects with a role ({', '.join(_ROLES)}) and a text `content`"
        )
        raise ApiError(400, "invalid_request", text, param="messages")
    return [{"role": m["role"], "content": m["content"]} for m in given]
