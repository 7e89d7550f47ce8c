"""The dashboard's paths: who may come in, the page's own files, and what its parts answer.

A page elsewhere whose name was made to resolve to us gets nothing: browsers send the session to the host that set it.
"""

import ipaddress
import logging
import secrets
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from urllib.parse import urlsplit

import trio
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xim_agent.clock import Clock
from xim_agent.router.dashboard import sessions
from xim_agent.router.dashboard.feed import Feed
from xim_agent.router.dashboard.parts import Handler, Part, Viewer, asked, reply
from xim_agent.router.dispatch import Dispatch
from xim_agent.router.guesses import Guesses
from xim_agent.router.replies import ApiError
from xim_agent.router.store import Store
from xim_agent.router.tokens import Problem

log = logging.getLogger("xim_agent.router.dashboard")

_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none';"
    b" form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = [
    (b"content-security-policy", _POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]
_KINDS = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".txt": "text/plain",
}


class Dashboard:
    """`reads`, `writes`: handlers by path, of all parts. `open`: those that need no session.

    `also`: networks whose callers count as being on this machine. From a container with a port on the host's loopback,
    the host has the address of a bridge.
    """

    def __init__(self, store: Store, dispatch: Dispatch, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self.feed = Feed(store, dispatch, clock)
        self._guesses = Guesses("links")
        self._cookie_name = f"xim_dashboard_{sessions.own_id(store.db)}"
        self.also: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = ()
        # Where people look first leads to the page; a fragment goes along.
        self.files: dict[str, Response] = {path: RedirectResponse("/dashboard/") for path in ("/", "/dashboard")}
        self.files |= _files()
        self.reads: dict[str, Handler] = {
            "/dashboard/agents.json": self._data,
            "/dashboard/events": self._events,
            "/dashboard/api/session": self._session,
        }
        self.writes: dict[str, Handler] = {}

    def add(self, part: Part) -> None:
        """Before the routes are made."""
        self.reads.update(part.reads)
        self.writes.update(part.writes)

    async def file(self, request: Request, _: None) -> ASGIApp:
        """One of the page's own, for everybody."""
        return self.files[request.scope["path"]]

    def reader(self, request: Request) -> Viewer:
        """Raises ApiError 401 unless somebody is signed in."""
        secret = self._secret(request)
        viewer = sessions.find(self._store.db, secret, self._clock.now()) if secret else None
        if viewer is None:
            text = "you are not signed in, or no longer; `router admin-link` makes a link that signs you in"
            raise ApiError(401, "signed_out", text)
        return viewer

    def own(self, request: Request) -> Viewer:
        """Somebody who is signed in, and whose own page asks. Raises ApiError 401, 403."""
        viewer = self.reader(request)
        self.same_origin(request)
        given = request.headers.get("x-csrf-token", "")
        if not secrets.compare_digest(given.encode(), sessions.csrf(self._secret(request)).encode()):
            raise ApiError(403, "csrf", "this did not come from the dashboard's page; load the page again")
        return viewer

    def writer(self, request: Request) -> Viewer:
        """Raises ApiError 401, 403 unless an admin's own page asks."""
        viewer = self.own(request)
        if not viewer.writes:
            text = "you are signed in to look only; `router admin-link` makes a link that lets you change things"
            raise ApiError(403, "read_only", text)
        return viewer

    def same_origin(self, request: Request) -> None:
        """Raises ApiError 403 for another site's page. Browsers name the origin with every POST."""
        origin, site = request.headers.get("origin", ""), request.headers.get("sec-fetch-site")
        host = request.headers.get("host", "")
        same = bool(origin) and (site == "same-origin" if site is not None else _netloc(origin) == host.lower() != "")
        if not same:
            raise ApiError(403, "other_origin", "this did not come from the dashboard's own page")
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "invalid_request", "the body must be application/json")

    async def login(self, request: Request, _: None) -> ASGIApp:
        address, now = request.client.host if request.client else "", trio.current_time()
        try:
            self._guesses.check(address, now)
        except Problem as problem:
            raise ApiError(problem.status, problem.code, problem.detail, int(problem.retry_after or 0) + 1) from None
        token = (await asked(request)).get("token")
        insecure = not (_secure(request) or self._here(request, address))
        try:
            secret, viewer = sessions.redeem(self._store.db, str(token), self._clock.now(), insecure=insecure)
            sessions.end(self._store.db, sessions.hashed(self._secret(request)))  # the one that this browser had
        except ApiError as error:
            if error.code == "link_unknown":
                self._guesses.wrong(address, now)
            log.warning("a link to the dashboard was refused", extra={"from": address, "code": error.code})
            raise
        log.info("somebody signed in to the dashboard", extra={"from": address, "role": viewer.role})
        if insecure:
            log.warning("the dashboard is used over plain http from another machine", extra={"from": address})
        response = Response(status_code=204)
        self._set_cookie(request, response, secret, int(sessions.LIFE))
        return response

    async def logout(self, request: Request, viewer: Viewer) -> ASGIApp:
        sessions.end(self._store.db, viewer.session)
        response = Response(status_code=204)
        self._set_cookie(request, response, "", 0)
        return response

    async def _session(self, request: Request, viewer: Viewer) -> ASGIApp:
        found = sessions.live(self._store.db, viewer.session, self._clock.now())
        insecure = bool(found and found["insecure"])
        return reply({"role": viewer.role, "csrf": sessions.csrf(self._secret(request)), "insecure": insecure})

    async def _data(self, request: Request, _: Viewer) -> ASGIApp:
        return reply(self.feed.snapshot())

    async def _events(self, request: Request, viewer: Viewer) -> ASGIApp:
        db, clock = self._store.db, self._clock
        return self.feed.stream(lambda: sessions.live(db, viewer.session, clock.now()) is not None)

    def _secret(self, request: Request) -> str:
        cookies = request.cookies
        return cookies.get(f"__Secure-{self._cookie_name}") or cookies.get(self._cookie_name, "")

    def _set_cookie(self, request: Request, response: Response, secret: str, seconds: int) -> None:
        secure = _secure(request)
        response.set_cookie(
            f"__Secure-{self._cookie_name}" if secure else self._cookie_name,
            secret,
            max_age=seconds,
            path="/dashboard",
            secure=secure,
            httponly=True,
            samesite="strict",
        )

    def _here(self, request: Request, address: str) -> bool:
        """Whether the browser is on this machine, or comes through a tunnel that ends here."""
        return self._near(address) and _loopback(_hostname(request.headers.get("host", "")))

    def _near(self, address: str) -> bool:
        if _loopback(address):
            return True
        try:
            return any(ipaddress.ip_address(address) in network for network in self.also)
        except ValueError:
            return False


@dataclass(frozen=True)
class Secured:
    """With the headers that every reply of the dashboard has, errors too."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def wrapped(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        await self.app(scope, receive, wrapped)


def _files() -> dict[str, Response]:
    """The page's own files by path, read when the router starts."""
    found: dict[str, Response] = {}

    def take(folder: Traversable, path: str) -> None:
        for item in folder.iterdir():
            suffix = f".{item.name.rpartition('.')[2]}"
            if item.is_dir() and item.name == "vendor":
                take(item, f"{path}{item.name}/")
            elif item.is_file() and suffix in _KINDS:
                name = "" if item.name == "index.html" else item.name
                found[path + name] = Response(item.read_bytes(), media_type=f"{_KINDS[suffix]}; charset=utf-8")

    take(resources.files(__package__), "/dashboard/")
    return found


def _secure(request: Request) -> bool:
    """Whether the browser speaks TLS, with us or with a proxy before us: it says so itself."""
    return request.url.scheme == "https" or request.headers.get("origin", "").startswith("https://")


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
