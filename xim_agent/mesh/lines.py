"""Connections to the router for the calls of which there are a hundred a second.

httpx and httpcore use 0.7 ms of CPU for such a call, several times what all else of it needs. So they open a
connection, with all that belongs to that (name, proxy, TLS, time limits), and do its first call; the reply is then left
open, which keeps the connection from everybody else, and the next calls go over its stream directly. A reply with
anything odd goes to httpcore, from its first byte on.
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpcore
import httpx
import trio

from xim_agent.mesh import exchange

READ = 64 * 1024


class Line:
    """One connection to the server of `url`. `close` ends it, and the reply to its first call with it."""

    def __init__(self, url: httpx.URL, first: httpx.Response, close: Callable[[], Awaitable[None]]) -> None:
        self.place = url.scheme, url.netloc
        self.used = trio.current_time()
        self.whole = True  # nothing of a call is left on it
        self.close = close
        self._stream: httpcore.AsyncNetworkStream = first.extensions["network_stream"]

    @property
    def ended(self) -> bool:
        """By the other side: nothing else can come without a request."""
        return bool(self._stream.get_extra_info("is_readable"))

    async def ask(self, request: bytes, silence: float, limit: int) -> tuple[dict[str, str], bytes] | list[bytes]:
        """Headers and body of a plain reply with at most `limit` bytes of body, else what came of it, for `odd`.

        `silence` as of a call. Raises httpx.TransportError. `whole` is false unless it came to its end.
        """
        self.whole = False
        with _named_as_in_httpx():
            with suppress(httpcore.WriteError):  # the reply to half a request may be there all the same
                await self._stream.write(request, silence)
            came = [await self._stream.read(READ, silence)]
            found = exchange.plain(came[0])
            if found is None or found[2] - found[1] > limit:
                return came
            headers, begin, end = found
            missing = end - len(came[0])
            while missing > 0:
                came.append(await self._stream.read(READ, silence))
                missing -= len(came[-1])
                if not came[-1]:
                    return came
        self.whole = not missing
        self.used = trio.current_time()
        return headers, b"".join(came)[begin:end]

    async def odd(self, request: httpx.Request, came: list[bytes]) -> httpx.Response:
        """The reply that began with `came`, as httpx would have it. Raises httpx.TransportError."""
        url = request.url
        origin = httpcore.Origin(url.raw_scheme, url.raw_host, url.port or (443 if url.scheme == "https" else 80))
        transport = httpx.AsyncHTTPTransport(verify=False, trust_env=False)
        heard: Any = httpcore.AsyncHTTP11Connection(origin, _Heard(self._stream, came))
        transport._pool = heard
        response = await transport.handle_async_request(request)
        response.request = request
        return response


class _Heard(httpcore.AsyncNetworkStream):
    """A stream of which some was read before; its request was sent before too."""

    def __init__(self, stream: httpcore.AsyncNetworkStream, came: list[bytes]) -> None:
        self._stream = stream
        self._came = came

    async def read(self, *size: Any, **limit: Any) -> bytes:
        if self._came:
            await trio.lowlevel.checkpoint()
            return self._came.pop(0)
        return await self._stream.read(*size, **limit)

    async def write(self, *_: Any, **__: Any) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await self._stream.aclose()

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class Lines:
    """Those between two calls, the one that has waited longest first."""

    def __init__(self, most_idle_seconds: float) -> None:
        self._most = most_idle_seconds
        self._idle: list[Line] = []

    async def take(self, url: httpx.URL) -> Line | None:
        while self._idle:
            line = self._idle.pop(0)
            fresh = trio.current_time() - line.used < self._most
            if fresh and line.place == (url.scheme, url.netloc) and not line.ended:
                return line
            await line.close()
        return None

    async def give_back(self, line: Line) -> None:
        """Closes it when something of a call is left on it; within a second, also when cancelled."""
        if line.whole:
            self._idle.append(line)
        else:
            await line.close()

    async def aclose(self) -> None:
        while self._idle:
            await self._idle.pop().close()


@contextmanager
def _named_as_in_httpx() -> Iterator[None]:
    """httpx has the same errors under the same names."""
    try:
        yield
    except (httpcore.NetworkError, httpcore.TimeoutException) as error:
        raise getattr(httpx, type(error).__name__)(str(error)) from error
