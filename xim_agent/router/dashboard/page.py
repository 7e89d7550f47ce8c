"""The dashboard's paths: one page, its two files, and the data as JSON and as server-sent events."""

import ipaddress
import json
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from xim_agent.clock import Clock
from xim_agent.router import catalog
from xim_agent.router.dashboard.view import agent_view, model_view
from xim_agent.router.dispatch import Dispatch
from xim_agent.router.replies import ApiError
from xim_agent.router.store import Store

EVERY = 1.0  # seconds between two looks; a change is shown within that
QUIET = 15.0  # a comment so often, so that a dead connection is noticed

_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Dashboard:
    """`paths`: handler by path. It has no accounts yet, so that it answers callers on the router's own machine only.

    `also`: networks whose addresses count as that machine's. From a container with a port on the host's loopback, the
    host has the address of a bridge.
    """

    def __init__(self, store: Store, dispatch: Dispatch, clock: Clock) -> None:
        self._store = store
        self._dispatch = dispatch
        self._clock = clock
        self.also: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = ()
        self.paths: dict[str, Callable[[Request, None], Awaitable[ASGIApp]]] = {
            "/": _File("index.html", "text/html"),
            "/dashboard/app.js": _File("app.js", "text/javascript"),
            "/dashboard/style.css": _File("style.css", "text/css"),
            "/dashboard/agents.json": self.data,
            "/dashboard/events": self.events,
        }

    def viewer(self, request: Request) -> None:
        """Raises ApiError 403 for a caller elsewhere, one that comes by way of a proxy here, and a page elsewhere whose
        name was made to resolve to us.
        """
        remote = request.client.host if request.client else ""
        try:
            host = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
        except ValueError:
            host = ""
        forwarded = any(n in ("forwarded", "via", "x-real-ip") or n.startswith("x-forwarded-") for n in request.headers)
        if forwarded or not self._near(remote) or not _loopback(host):
            text = "The dashboard answers on the router's own machine only; reach it by `ssh -L 8080:127.0.0.1:8080`."
            raise ApiError(403, "dashboard_local", text)

    def _near(self, remote: str) -> bool:
        if _loopback(remote):
            return True
        try:
            return any(ipaddress.ip_address(remote) in network for network in self.also)
        except ValueError:
            return False

    def snapshot(self) -> dict[str, Any]:
        """Everything the page shows."""
        db, now, wall = self._store.db, trio.current_time(), self._clock.now()
        cursor = db.execute("SELECT * FROM agents WHERE state != 'removed' ORDER BY name, agent_id")
        names = [column[0] for column in cursor.description]
        rows = [dict(zip(names, row, strict=True)) for row in cursor]
        agents = self._dispatch.agents
        views = [
            agent_view(
                row,
                agents.get(row["agent_id"]),
                catalog.assignment(db, row["agent_id"]),
                now=now,
                wall=wall,
                limits=self._dispatch.limits,
            )
            for row in rows
        ]
        running = [a.model for a in agents.values() if a.key is not None and a.model is not None]
        models = [
            model_view(m, sum((r.id, r.revision) == (m.id, m.revision) for r in running)) for m in catalog.models(db)
        ]
        queued = self._dispatch.statistics().queued
        return {"time": wall, "urls": self._store.public_urls, "agents": views, "models": models, "queued": queued}

    async def data(self, request: Request, _: None) -> Response:
        return Response(json.dumps(self.snapshot()), headers=_HEADERS, media_type="application/json")

    async def events(self, request: Request, _: None) -> ASGIApp:
        return self._stream

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        fields = {**_HEADERS, "content-type": "text/event-stream"}
        headers = [(name.encode(), value.encode()) for name, value in fields.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        last, quiet = b"", 0.0
        while True:
            text = json.dumps(self.snapshot()).encode()
            quiet += EVERY
            if text != last or quiet >= QUIET:
                last, quiet = text, 0.0
                await send({"type": "http.response.body", "body": b"data: " + text + b"\n\n", "more_body": True})
            await trio.sleep(EVERY)


class _File:
    """One of the page's own files, read when the router starts."""

    def __init__(self, name: str, kind: str) -> None:
        self._content = resources.files(__package__).joinpath(name).read_bytes()
        self._kind = f"{kind}; charset=utf-8"

    async def __call__(self, request: Request, _: None) -> Response:
        return Response(self._content, headers=_HEADERS, media_type=self._kind)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
