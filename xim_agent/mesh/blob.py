"""Download of one stored chunk of a model: the only call that follows redirects."""

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import httpx

from xim_agent.mesh.transport import Opened, Transport
from xim_agent.outcome import RouterError

SILENCE_SECONDS = 30.0
MAX_REDIRECTS = 5
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)")


class BlobReply:
    """Stored bytes from `start` on; `total` is the whole chunk's size where the reply tells it. `status` 200 or 206."""

    def __init__(self, opened: Opened, start: int, total: int | None) -> None:
        self.status = opened.response.status_code
        self.start = start
        self.total = total
        self._opened = opened

    def chunks(self) -> Opened:
        """As they come. Raises RouterError when the connection breaks, ends too early or is silent for 30 s."""
        return self._opened


@asynccontextmanager
async def open_blob(
    transport: Transport, url: httpx.URL, credentials: Mapping[str, str], offset: int
) -> AsyncIterator[BlobReply]:
    """`credentials`: headers for this origin only. Raises RouterError; at most 5 redirects, none from https to http."""
    origin = url
    headers = {"accept-encoding": "identity"} | ({"range": f"bytes={offset}-"} if offset else {})
    for _ in range(MAX_REDIRECTS + 1):
        if (url.scheme, url.host, url.port) != (origin.scheme, origin.host, origin.port):
            credentials = {}
        async with transport.open("GET", url, {**headers, **credentials}, None, SILENCE_SECONDS) as opened:
            response = opened.response
            if response.has_redirect_location:
                url = _redirect(transport, response)
                continue
            if response.status_code not in (200, 206):
                raise await transport.refusal(opened)
            if response.headers.get("content-encoding", "identity") != "identity":
                raise transport.malformed("GET", url, "a blob has no Content-Encoding")
            start, total = _extent(transport, response)
            yield BlobReply(opened, start, total)
            return
    raise transport.count(RouterError("too_many_redirects", f"GET {origin}: more than {MAX_REDIRECTS} redirects"))


def _redirect(transport: Transport, response: httpx.Response) -> httpx.URL:
    url = response.request.url
    try:
        target = url.join(response.headers["location"])
    except (httpx.InvalidURL, ValueError) as error:
        raise transport.malformed("GET", url, f"location: {error}") from None
    if target.scheme not in ("http", "https") or (url.scheme == "https" and target.scheme == "http"):
        message = f"GET {url.copy_with(query=None)}: redirected from {url.scheme} to {target.scheme}"
        raise transport.count(RouterError("redirect_refused", message))
    return target


def _extent(transport: Transport, response: httpx.Response) -> tuple[int, int | None]:
    """(start, total) of a 200 or 206."""
    if response.status_code == 200:
        length = response.headers.get("content-length", "")
        return 0, int(length) if length.isdecimal() else None
    match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
    if match is None:
        raise transport.malformed("GET", response.request.url, "206 without a readable Content-Range")
    return int(match[1]), None if match[2] == "*" else int(match[2])
