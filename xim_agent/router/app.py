"""The local router as an ASGI application, and the server around it."""

import logging
import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import trio
from starlette.requests import Request
from starlette.routing import Route
from starlette.routing import Router as Routes
from starlette.types import ASGIApp, Receive, Scope, Send

from xim_agent.clock import Clock, SystemClock
from xim_agent.errors import AgentError, Exit
from xim_agent.mesh.messages import MAX_BODY, MAX_EVENTS, SERVED_PATHS
from xim_agent.router import blobs
from xim_agent.router.agents import MAX_IDENTITY, AgentApi
from xim_agent.router.dashboard.actions import Agents
from xim_agent.router.dashboard.chat import Chat
from xim_agent.router.dashboard.join import JoinKeys
from xim_agent.router.dashboard.keys import ApiKeys
from xim_agent.router.dashboard.models import Models
from xim_agent.router.dashboard.page import Dashboard, Secured
from xim_agent.router.dashboard.parts import MAX_WRITE, Part
from xim_agent.router.dispatch import Dispatch
from xim_agent.router.endpoint import Endpoint
from xim_agent.router.jobs import Limits
from xim_agent.router.openai import ClientApi
from xim_agent.router.replies import not_found
from xim_agent.router.server import Server, bound_url, everywhere, open_tls, parse_listen
from xim_agent.router.store import Store

log = logging.getLogger("xim_agent.router")

TICK_SECONDS = 0.25
SEEN_SECONDS = 15.0
MAX_TOKEN = 4096  # bytes of a login


def _anybody(request: Request) -> None:
    pass


@dataclass(frozen=True)
class _Either:
    """A path that can be read and written."""

    reads: ASGIApp
    writes: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self.writes if scope["method"] == "POST" else self.reads)(scope, receive, send)


class Router:
    """The application and the state behind it. `serve` runs it."""

    def __init__(self, store: Store, limits: Limits, clock: Clock) -> None:
        self.store = store
        self.dispatch = Dispatch(limits)
        self.agents = AgentApi(store, self.dispatch, clock)
        self.clients = ClientApi(store, self.dispatch, clock)
        self.dashboard = Dashboard(store, self.dispatch, clock)
        self.dashboard.add(Agents(store, self.dispatch, clock, self.agents.reload))
        self.dashboard.add(JoinKeys(store, clock))
        self.dashboard.add(Models(store, self.dispatch, self.agents.reload))
        self.dashboard.add(ApiKeys(store, clock))
        self.dashboard.add(Chat(self.clients))
        self.state = SimpleNamespace(data_dir=store.directory)  # where `blobs` looks, as `request.app.state`
        self._route()

    def add(self, part: Part) -> None:
        """One more part of the dashboard."""
        self.dashboard.add(part)
        self._route()

    def _route(self) -> None:
        routes = [*self._agent_routes(), *self._client_routes(), *self._dashboard_routes()]
        self._exact = {route.path: route.app for route in routes if "{" not in route.path}
        self._routes = Routes(routes, redirect_slashes=False, default=not_found)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self
        exact = self._exact.get(scope["path"]) if scope["type"] == "http" else None
        await (exact or self._routes)(scope, receive, send)

    def _agent_routes(self) -> list[Route]:
        api = self.agents

        def route(path: str, method: str, limit: int, handle: Any, admit: Any = api.agent) -> Route:
            methods = frozenset({"GET", "HEAD"} if handle in (manifest, blob) else {method})
            return Route(path, Endpoint(methods, limit, admit, handle, agents=True, waits=handle != api.events))

        async def manifest(request: Request, _: Any) -> ASGIApp:
            return await blobs.manifest_endpoint(request)

        async def blob(request: Request, _: Any) -> ASGIApp:
            return await blobs.blob_endpoint(request)

        return [
            route("/v1/enroll", "POST", MAX_IDENTITY, api.enroll, api.anyone),
            route("/v1/enroll/refresh", "POST", MAX_IDENTITY, api.refresh, api.anyone),
            route("/v1/agents/self/leave", "POST", MAX_IDENTITY, api.leave),
            route("/v1/assignment", "GET", 0, api.assignment),
            route("/v1/models/manifests/{sha256}", "GET", 0, manifest),
            route("/v1/models/blobs/{sha256}", "GET", 0, blob),
            route("/v1/work/poll", "POST", MAX_EVENTS, api.poll),
            route("/v1/work/events", "POST", MAX_EVENTS, api.events),
            route("/v1/work/leases/{request}/body", "GET", 0, api.lease_body),
        ]

    def _client_routes(self) -> list[Route]:
        api = self.clients
        get, post = frozenset({"GET", "HEAD"}), frozenset({"POST"})
        return [
            *(Route(path, Endpoint(post, MAX_BODY, api.client, api.complete)) for path in sorted(SERVED_PATHS)),
            Route("/v1/models", Endpoint(get, 0, api.client, api.models)),
            Route("/v1/models/{name:path}", Endpoint(get, 0, api.client, api.model)),
        ]

    def _dashboard_routes(self) -> list[Route]:
        page = self.dashboard
        get, post = frozenset({"GET", "HEAD"}), frozenset({"POST"})

        def path(at: str) -> Route:
            read, write = page.reads.get(at), page.writes.get(at)
            reads = Endpoint(get, 0, page.reader, read) if read else None
            writes = Endpoint(post, MAX_WRITE, page.writer, write) if write else None
            return Route(at, Secured(_Either(reads, writes) if reads and writes else reads or writes or not_found))

        return [
            *(Route(at, Secured(Endpoint(get, 0, _anybody, page.file))) for at in page.files),
            *(path(at) for at in {**page.reads, **page.writes}),
            Route("/dashboard/api/login", Secured(Endpoint(post, MAX_TOKEN, page.same_origin, page.login))),
            Route("/dashboard/api/logout", Secured(Endpoint(post, MAX_TOKEN, page.own, page.logout))),
            Route("/dashboard/{rest:path}", Secured(not_found)),
        ]

    async def tend(self) -> None:
        """Until cancelled: time that passes, and what other processes write into the database."""
        self.dispatch.start(trio.current_time())
        version, saved = -1, trio.current_time()
        try:
            while True:
                now = trio.current_time()
                self.dispatch.tick(now)
                self.dispatch.board.diary.silent(self.dispatch.agents, now, self.dispatch.limits)
                try:
                    if (found := self.store.data_version()) != version:
                        self.agents.reload()
                        version = found
                    if now - saved >= SEEN_SECONDS or self.agents.newcomers:
                        self.agents.save_seen()
                        self.clients.save_used()
                        saved = now
                except sqlite3.Error as error:
                    # Busy or full: what could not be read or written is tried again, and requests go on.
                    log.warning("the router's database does not answer", extra={"error": str(error)})
                await trio.sleep(TICK_SECONDS)
        finally:
            with suppress(sqlite3.Error):
                self.agents.save_seen()
                self.clients.save_used()


def make_app(store: Store, limits: Limits | None = None, clock: Clock | None = None) -> Router:
    """The store must stay open for as long as the application runs."""
    return Router(store, limits or Limits(), clock or SystemClock())


async def serve(
    app: Router,
    listen: str,
    *,
    public_urls: Sequence[str] = (),
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves until cancelled; then every connection is closed at once and nothing is left of it.

    `listen` is HOST:PORT, port 0 for any. Reports the bound URLs. Raises AgentError `listen_failed`, `tls_certificate`,
    `public_url_missing`.
    """
    host, port = parse_listen(listen)
    if not public_urls and everywhere(host) and not app.store.urls_given:
        raise AgentError(
            "public_url_missing",
            f"agents and clients cannot reach {listen}: it means every address of this machine",
            hint="say by which one they come: --public-url http://HOST:PORT",
            exit_code=Exit.USAGE,
        )
    context = open_tls(tls_cert, tls_key) if tls_cert else None
    try:
        sockets = await trio.open_tcp_listeners(port, host=host)
    except OSError as error:
        hint = "another router may be running: choose another --listen address"
        raise AgentError(
            "listen_failed", f"cannot listen on {listen}: {error}", hint=hint, exit_code=Exit.CONFIG
        ) from error
    bound = [bound_url(listener.socket.getsockname(), "https" if context else "http") for listener in sockets]
    app.store.serve_at(public_urls, bound[0])
    app.store.hurry()
    app.agents.reload()  # the first start decides the issuer
    listeners: list[Any] = (
        [trio.SSLListener(s, context, https_compatible=True) for s in sockets] if context else sockets
    )
    server = Server(app)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(app.tend)
        await nursery.start(trio.serve_listeners, server.connection, listeners)
        task_status.started(bound)
