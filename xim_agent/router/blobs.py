"""Manifests and chunks for agents: plain files named by their SHA-256. Authorization is the caller's."""

import os
import re
from pathlib import Path

import trio
import zstandard
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from xim_agent.cache.manifest import DIGEST

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.IGNORECASE)
_PIECE = 256 * 1024
_ENCODE_ABOVE = 1024


async def manifest_endpoint(request: Request) -> Response:
    """`GET …/manifests/{sha256}`: the manifest, as zstd where the agent accepts that."""
    digest = request.path_params["sha256"]
    path = _models(request) / "manifests" / f"{digest}.json"
    if not DIGEST.fullmatch(digest) or not await trio.to_thread.run_sync(path.is_file):
        return _not_found("manifest", digest)
    data = await trio.to_thread.run_sync(path.read_bytes)
    headers = {"ETag": f'"{digest}"', "Vary": "Accept-Encoding"}
    if len(data) > _ENCODE_ABOVE and _accepts_zstd(request):
        data = await trio.to_thread.run_sync(zstandard.ZstdCompressor(level=3).compress, data)
        headers |= {"Content-Encoding": "zstd", "ETag": f'"{digest}-zstd"'}
    return Response(data, headers=headers, media_type="application/json")


async def blob_endpoint(request: Request) -> Response:
    """`GET …/blobs/{sha256}`: the stored bytes of one chunk; 206 and 416 for one range, 304 where the agent has it."""
    digest = request.path_params["sha256"]
    path = _models(request) / "blobs" / digest[:2] / digest
    if not DIGEST.fullmatch(digest) or not await trio.to_thread.run_sync(path.is_file):
        return _not_found("blob", digest)
    try:
        size = (await trio.to_thread.run_sync(path.stat)).st_size
    except FileNotFoundError:
        return _not_found("blob", digest)
    etag = f'"{digest}"'
    headers = {"ETag": etag, "Accept-Ranges": "bytes", "Cache-Control": "private, max-age=31536000, immutable"}
    if {etag, "*"} & {t.strip().removeprefix("W/") for t in request.headers.get("if-none-match", "").split(",")}:
        return Response(status_code=304, headers=headers)
    if request.method != "GET" or request.headers.get("if-range", etag) != etag:
        return _File(path, 0, size, 200, headers)
    span = _span(request.headers.get("range", ""), size)
    if span is None:
        return _File(path, 0, size, 200, headers)
    start, end = span
    if start >= end:
        return Response(status_code=416, headers={**headers, "Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    return _File(path, start, end, 206, headers)


def _models(request: Request) -> Path:
    return Path(request.app.state.data_dir) / "models"


def _not_found(kind: str, digest: str) -> Response:
    return JSONResponse(
        {"status": 404, "code": f"{kind}_unknown", "title": "Not Found", "detail": f"no {kind} {digest[:80]}"},
        status_code=404,
        media_type="application/problem+json",
    )


def _accepts_zstd(request: Request) -> bool:
    for part in request.headers.get("accept-encoding", "").split(","):
        name, _, weight = part.strip().partition(";")
        if name.strip().lower() == "zstd":
            return not re.fullmatch(r"\s*q=0(\.0*)?\s*", weight)
    return False


def _span(header: str, size: int) -> tuple[int, int] | None:
    """[start, end) of a single range, start ≥ end when it cannot be satisfied; None: no range that we serve."""
    match = _RANGE.fullmatch(header.replace(" ", ""))
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        return (max(0, size - int(match[2])), size) if int(match[2]) else (size, size)
    start = int(match[1])
    if match[2] and int(match[2]) < start:
        return None
    return start, min(int(match[2]) + 1, size) if match[2] else size


class _File(Response):
    """Bytes [start, end) of a file, read in pieces off the event loop."""

    def __init__(self, path: Path, start: int, end: int, status: int, headers: dict[str, str]) -> None:
        super().__init__(status_code=status, media_type="application/octet-stream", headers=headers)
        self._path, self._start, self._end = path, start, end
        self.headers["content-length"] = str(end - start)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # its model was removed just now
            await _not_found("blob", self._path.name)(scope, receive, send)
            return
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            at = self._start if scope["method"] != "HEAD" else self._end
            while at < self._end:
                piece = await trio.to_thread.run_sync(os.pread, fd, min(_PIECE, self._end - at), at)
                if not piece:
                    raise OSError(5, "the chunk became shorter while it was sent", str(self._path))
                at += len(piece)
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            os.close(fd)
