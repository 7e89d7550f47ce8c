"""One HTTP call to the router: limits, time limits by silence, and every failure as a `RouterError`."""

import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import h11
import httpx
import trio

from xim_agent import __version__
from xim_agent.clock import Clock
from xim_agent.errors import AgentError, Exit
from xim_agent.mesh import exchange, failures, sockets
from xim_agent.mesh.content import ContentError, ContentTooLarge, unpack
from xim_agent.mesh.lines import Line, Lines
from xim_agent.mesh.tls import verified
from xim_agent.outcome import RouterError

SILENCE_SECONDS = 10.0
MAX_PROBLEM = 64 * 1024
# hypercorn and nginx close idle connections after 75 s; ours go first, so that a call seldom meets a closing one.
KEEPALIVE_SECONDS = 30.0
_AGENT = {"user-agent": f"xerotier-xim-agent/{__version__}"}
_ASKS = {"xim-protocol": str(failures.PROTOCOL), "accept-encoding": "zstd"}


@dataclass(frozen=True)
class ClientStatistics:
    """`failures` by code; bytes of bodies as they travel; `skew` in seconds, the router's clock minus ours."""

    calls: int
    failures: dict[str, int]
    bytes_sent: int
    bytes_received: int
    skew: float | None


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes


class Transport:
    """An httpx client with the rules of wire-protocol §1. Cancelling a call closes its connection."""

    def __init__(self, *, insecure: bool, clock: Clock, on_skew: Callable[[float], None]) -> None:
        self.bytes_sent = 0
        self.bytes_received = 0
        self._insecure = insecure
        self._clock = clock
        self._on_skew = on_skew
        self._calls = 0
        self._failures: dict[str, int] = {}
        self._skew: float | None = None
        # How many calls run at once is bounded by the callers: one poll, two of events, the downloads.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=8, keepalive_expiry=KEEPALIVE_SECONDS)
        # A system proxy is for other hosts; loopback never needs one.
        direct = {f"all://{host}": None for host in ("localhost", "127.0.0.1", "[::1]")}
        context = False if insecure else verified()
        try:
            self._http = httpx.AsyncClient(verify=context, limits=limits, mounts=direct)
        except (ImportError, ValueError, httpx.InvalidURL):
            raise failures.unusable_proxy() from None  # what httpx says of it may hold a password
        sockets.prepare(self._http)
        self._lines = Lines(KEEPALIVE_SECONDS)

    async def aclose(self) -> None:
        """Closes the idle connections; call it when no call runs any more."""
        with trio.move_on_after(1, shield=True):
            await self._lines.aclose()
            await self._http.aclose()

    def url(self, router: str, path: str) -> httpx.URL:
        """Raises AgentError `insecure_router` (exit 78) for plain http to another host."""
        try:
            url = _parsed(router.rstrip("/") + path)
        except httpx.InvalidURL as error:
            raise AgentError("router_url", f"router URL {router!r}: {error}", exit_code=Exit.CONFIG) from None
        if url.scheme not in ("http", "https") or not url.host:
            raise AgentError("router_url", f"router URL {router!r} is not http(s)", exit_code=Exit.CONFIG)
        if url.scheme == "http" and not self._insecure and not failures.is_loopback(url.host):
            raise AgentError(
                "insecure_router",
                f"refusing plain http to {url.host}: credentials and prompts would be readable on the way",
                hint="use https, or --insecure on a network you trust",
                exit_code=Exit.CONFIG,
            )
        return url

    async def call(
        self,
        method: str,
        url: httpx.URL,
        headers: Mapping[str, str],
        *,
        body: bytes | None = None,
        limit: int,
        silence: float = SILENCE_SECONDS,
        line: bool = False,
    ) -> Reply:
        """`limit`: bytes of the decoded reply; `silence`: seconds without a byte. A status other than 2xx raises.

        `line`: the connection is kept for `post`, if it can be.
        """
        async with self.open(method, url, {**_ASKS, **headers}, body, silence) as opened:
            size = self._keeps(url, opened.response) if line else None
            reply = await self._whole(opened, limit, size)
            if size and not opened.response.is_closed:
                opened.kept = True
                await self._lines.give_back(Line(url, opened.response, opened.aclose))
            return reply

    async def post(
        self, url: httpx.URL, headers: Mapping[str, str], *, body: bytes, limit: int, silence: float
    ) -> Reply:
        """The same as `call`, for what is called a hundred times a second: see `lines`."""
        line = await self._lines.take(url)
        if line is None:
            return await self.call("POST", url, headers, body=body, limit=limit, silence=silence, line=True)
        try:
            return await self._ask(line, url, {**_AGENT, **_ASKS, **headers}, body, limit, silence)
        except httpx.TransportError as error:
            raise self.lost("POST", url, error) from error
        finally:
            with trio.move_on_after(1, shield=True):
                await self._lines.give_back(line)

    async def _ask(
        self, line: Line, url: httpx.URL, headers: Mapping[str, str], body: bytes, limit: int, silence: float
    ) -> Reply:
        try:
            request = exchange.request("POST", url.raw_path, url.netloc, headers, body)
        except h11.LocalProtocolError as error:
            raise httpx.LocalProtocolError(str(error)) from error
        self._calls += 1
        self.bytes_sent += len(body)
        came = await line.ask(request, silence, limit)
        if isinstance(came, tuple):
            self.bytes_received += len(came[1])
            self._note_date(came[0])
            return Reply(200, came[0], self._unpacked("POST", url, *came, limit))
        asked = httpx.Request("POST", url, headers=headers, content=body, extensions={"timeout": {"read": silence}})
        async with aclosing(Opened(self, await line.odd(asked, came))) as opened:
            return await self._whole(opened, limit)

    def _keeps(self, url: httpx.URL, response: httpx.Response) -> int | None:
        """Of a reply whose connection can be used again, and talks to the router itself: the size of its body."""
        # A proxy that only forwards wants other requests.
        forwarded = url.scheme == "http" and self._http._transport_for_url(url) is not self._http._transport
        plain = response.http_version == "HTTP/1.1" and response.status_code == 200 and not forwarded
        return exchange.size_of(response.headers) if plain else None

    async def _whole(self, opened: "Opened", limit: int, size: int | None = None) -> Reply:
        response = opened.response
        if not response.is_success:
            raise await self.refusal(opened)
        return Reply(response.status_code, response.headers, await self._read(opened, limit, size))

    @asynccontextmanager
    async def open(
        self, method: str, url: httpx.URL, headers: Mapping[str, str], body: bytes | None, silence: float
    ) -> AsyncIterator["Opened"]:
        """The reply's head with its body unread; leaving the block closes the connection unless all was read."""
        connect = failures.CONNECT_SECONDS
        limits = {"connect": connect, "read": silence, "write": silence, "pool": connect}
        # Built by hand, so that no cookie of an earlier reply is sent.
        sent = {**_AGENT, **headers}
        request = httpx.Request(method, url, headers=sent, content=body, extensions={"timeout": limits})
        self._calls += 1
        self.bytes_sent += len(body or b"")
        try:
            response = await self._head(request, 2 * connect + silence if body is None else math.inf)
            async with aclosing(Opened(self, response)) as opened:
                yield opened
        except httpx.TransportError as error:
            await sockets.close_idle(self._http)  # noqa: ASYNC120 - shielded
            raise self.lost(method, url, error) from error

    async def _head(self, request: httpx.Request, seconds: float) -> httpx.Response:
        """`seconds` for all of it: time limits by silence never end a head that goes on for ever."""
        with trio.move_on_after(seconds):
            # What httpx's client adds (cookies, redirects, hooks, credentials in URLs) is nothing of ours, and a third
            # of the CPU of a call. httpx is pinned, for this is not of its public part: it knows the system's proxies.
            response = await self._http._transport_for_url(request.url).handle_async_request(request)
            response.request = request
            return response
        raise httpx.ReadTimeout(f"no whole head of a reply within {seconds:.0f} s", request=request)

    def lost(self, method: str, url: httpx.URL, error: httpx.TransportError) -> RouterError:
        return self.count(failures.from_transport(failures.what(method, url), url, error))

    async def refusal(self, opened: "Opened", heed: bool = True) -> RouterError:
        """The error of a reply that is not a success; counted. `heed`: whether what its body says counts."""
        response, request = opened.response, opened.response.request
        what = failures.what(request.method, request.url)
        body = b""
        if heed:
            with suppress(RouterError), trio.move_on_after(SILENCE_SECONDS):
                body = await self._read(opened, MAX_PROBLEM)
        return self.count(failures.from_reply(what, response.status_code, response.headers, body, self._clock.now()))

    def count(self, error: RouterError) -> RouterError:
        self._failures[error.code] = self._failures.get(error.code, 0) + 1
        return error

    def malformed(self, method: str, url: httpx.URL, reason: str) -> RouterError:
        """A reply that makes no sense: counted, retry class."""
        return self.count(failures.malformed(failures.what(method, url), reason))

    def _too_large(self, method: str, url: httpx.URL, limit: int) -> RouterError:
        return self.count(failures.too_large(failures.what(method, url), limit))

    def statistics(self) -> ClientStatistics:
        return ClientStatistics(
            calls=self._calls,
            failures=dict(self._failures),
            bytes_sent=self.bytes_sent,
            bytes_received=self.bytes_received,
            skew=self._skew,
        )

    def _note_date(self, headers: Mapping[str, str]) -> None:
        date = failures.date_of(headers)
        if date is not None:
            self._skew = date - self._clock.now()
            self._on_skew(self._skew)

    async def _read(self, opened: "Opened", limit: int, size: int | None = None) -> bytes:
        """`size`: after so many bytes the end is not waited for."""
        headers, request = opened.response.headers, opened.response.request
        self._note_date(headers)
        raw = bytearray()
        async for chunk in opened:
            raw += chunk
            if len(raw) > limit:
                raise self._too_large(request.method, request.url, limit)
            if len(raw) == size:
                break
        return self._unpacked(request.method, request.url, headers, bytes(raw), limit)

    def _unpacked(self, method: str, url: httpx.URL, headers: Mapping[str, str], raw: bytes, limit: int) -> bytes:
        try:
            return unpack(raw, headers.get("content-encoding", ""), limit)
        except ContentTooLarge:
            raise self._too_large(method, url, limit) from None
        except ContentError as error:
            raise self.malformed(method, url, str(error)) from None


class Opened:
    """A reply whose body is read by iterating: bytes as they travel. Raises RouterError when the connection breaks.

    `kept`: the next `aclose` is not meant for it.
    """

    def __init__(self, transport: Transport, response: httpx.Response) -> None:
        self.response = response
        self.kept = False
        self._transport = transport
        self._raw = response.aiter_raw()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        try:
            chunk = await anext(self._raw)
        except httpx.TransportError as error:
            raise self._transport.lost(self.response.request.method, self.response.request.url, error) from error
        self._transport.bytes_received += len(chunk)
        return chunk

    async def aclose(self) -> None:
        if self.kept:
            self.kept = False
            return
        with trio.move_on_after(1, shield=True):
            await self.response.aclose()
            # httpx iterates by generators inside generators, and only the end of all of them closes all of them.
            with suppress(httpx.TransportError, httpx.StreamError):
                async for _ in self._raw:
                    pass


@lru_cache(64)
def _parsed(url: str) -> httpx.URL:
    """Two of them are called a hundred times a second."""
    return httpx.URL(url)
