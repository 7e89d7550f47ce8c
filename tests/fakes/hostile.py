"""Who means harm: on the disk (what is planted in the cache, a canary beside it) and on the way to the router."""

import os
import shutil
import socket
import stat
import struct
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import trio

from xim_agent.backoff import Backoff
from xim_agent.cache.service import Cache
from xim_agent.cache.transfer import BlobReply, BlobSource, Pieces
from xim_agent.clock import SystemClock
from xim_agent.health import Health

# -- the disk --------------------------------------------------------------------------------------------------------


@dataclass
class Canary:
    """Files that nobody may touch. `seen` is all that `stat` and reading tell of them."""

    root: Path

    def __post_init__(self) -> None:
        self.directory, self.file = self.root / "directory", self.root / "file"
        self.directory.mkdir(parents=True)
        self.file.write_bytes(b"precious " * 100)
        (self.directory / "inner").write_bytes(b"inner")
        (self.directory / "config.json").write_bytes(b"not yours")
        self.file.chmod(0o604)

    def seen(self) -> dict[str, tuple[object, ...]]:
        found = {}
        for path in (self.root, *self.root.rglob("*")):
            info = path.lstat()
            content = sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(info.st_mode) else None
            found[str(path)] = (info.st_mode, info.st_uid, info.st_nlink, info.st_size, info.st_mtime_ns, content)
        return found

    def content(self, seen: dict[str, tuple[object, ...]] | None = None) -> dict[str, tuple[object, ...]]:
        """Without link counts."""
        return {path: (*info[:2], *info[3:]) for path, info in (seen or self.seen()).items()}


def uproot(path: Path) -> None:
    """Whatever has this name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


PLANTS: dict[str, Callable[[Path, Canary], None]] = {
    "link to a directory": lambda p, c: p.symlink_to(c.directory),
    "link to a file": lambda p, c: p.symlink_to(c.file),
    "dangling link": lambda p, c: p.symlink_to(c.directory / "new"),
    "link to itself": lambda p, c: p.symlink_to(p),
    "link to a device": lambda p, c: p.symlink_to("/dev/zero"),
    "pipe": lambda p, c: os.mkfifo(p),
    "socket": lambda p, c: listen(p),
    "second name": lambda p, c: os.link(c.file, p),
    "directory": lambda p, c: (p / "deep").mkdir(parents=True),
    "file": lambda p, c: void(p.write_bytes(b"junk")),
}
if os.geteuid() == 0:
    PLANTS["device"] = lambda p, c: os.mknod(p, 0o666 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero


def listen(path: Path) -> None:
    """A socket's name may have 107 bytes, so it is made elsewhere."""
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as made:
        made.bind(f"{short}/s")
        os.link(f"{short}/s", path)


def void(_: object) -> None:
    pass


def plant(path: Path, kind: str, canary: Canary) -> None:
    """In place of what is there. The snapshot of the canary has to be taken afterwards: a second name shows in it."""
    uproot(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    PLANTS[kind](path, canary)


def cache_of(directory: Path, source: BlobSource, **changes: Any) -> Cache:
    """One that hardly waits between attempts."""
    return Cache(
        **{
            "directory": directory,
            "max_bytes": 10**8,
            "downloads": 8,
            "source": source,
            "allow_unsafe": False,
            "clock": SystemClock(),
            "health": Health(now=lambda: 0.0),
            "rand": lambda: 0.5,
            "backoff": partial(Backoff, 0.001, 0.01),
        }
        | changes
    )


# -- a router in memory ----------------------------------------------------------------------------------------------


@dataclass
class Bytes:
    """A `BlobReply` of what is given, in one piece."""

    data: bytes
    start: int
    total: int | None
    status: int = 206

    async def _pieces(self) -> AsyncIterator[bytes]:
        yield self.data

    def chunks(self) -> Pieces:
        return self._pieces()  # type: ignore[return-value]


@dataclass
class Local:
    """`BlobSource` over the directory of a router. `gate` is told of each blob before it is given."""

    data: Path
    gate: Callable[[str], Awaitable[None]] | None = None
    asked: list[str] = field(default_factory=list)
    manifests: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)

    async def manifest(self, sha256_hex: str) -> bytes:
        known = self.manifests.get(sha256_hex)
        return known if known is not None else (self.data / "models/manifests" / f"{sha256_hex}.json").read_bytes()

    @asynccontextmanager
    async def blob(self, sha256_hex: str, offset: int) -> AsyncIterator[BlobReply]:
        self.asked.append(sha256_hex)
        if self.gate is not None:
            await self.gate(sha256_hex)
        data = self.blobs.get(sha256_hex)
        if data is None:
            data = (self.data / "models/blobs" / sha256_hex[:2] / sha256_hex).read_bytes()
        yield Bytes(data[offset:], offset, len(data))


# -- a router on loopback, down to single bytes ----------------------------------------------------------------------


@dataclass
class Asked:
    """One request for a blob. `data`: the right answer to one without Range, `offset` where its Range begins."""

    digest: str
    headers: dict[str, str]
    data: bytes
    stream: trio.SocketStream

    @property
    def offset(self) -> int:
        return int(self.headers.get("range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            await self.stream.send_all(piece)

    async def reply(self, status: int, body: bytes, **headers: object) -> None:
        """`content_range=…` for Content-Range; `content_length` unless it is given, None for none."""
        given = {"content_length": len(body)} | headers
        lines = [f"{name.replace('_', '-')}: {value}" for name, value in given.items() if value is not None]
        await self.send("\r\n".join([f"HTTP/1.1 {status} x", *lines, "", ""]).encode() + body)

    async def honest(self, **headers: object) -> None:
        span = f"bytes {self.offset}-{len(self.data) - 1}/{len(self.data)}"
        partial = {"content_range": span} if self.offset else {}
        await self.reply(206 if self.offset else 200, self.data[self.offset :], **partial, **headers)

    def reset(self) -> None:
        """The connection ends with RST instead of FIN when it is closed."""
        self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


Lie = Callable[[Asked], Awaitable[None]]


@dataclass
class Liar:
    """Serves the models in `data`, one request a connection. `lies[digest]` answer the next requests for that blob;
    `always[digest]` all that come later.
    """

    data: Path
    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    lies: dict[str, list[Lie]] = field(default_factory=lambda: defaultdict(list))
    always: dict[str, Lie] = field(default_factory=dict)

    async def serve(self, nursery: trio.Nursery) -> None:
        listeners = await nursery.start(partial(trio.serve_tcp, self._handle, 0, host="127.0.0.1"))
        self.url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"

    def times(self, digest: str) -> int:
        return sum(asked.digest == digest for asked in self.asked)

    async def _handle(self, stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):  # the client had enough
            async with stream:
                await self._answer(stream)

    async def _answer(self, stream: trio.SocketStream) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            if not (piece := await stream.receive_some()):
                return
            head += piece
        first, *lines = head.decode().split("\r\n\r\n")[0].split("\r\n")
        kind, digest = first.split(" ")[1].split("/")[-2:]
        place = f"manifests/{digest}.json" if kind == "manifests" else f"blobs/{digest[:2]}/{digest}"
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        asked = Asked(digest, headers, (self.data / "models" / place).read_bytes(), stream)
        self.asked.append(asked)
        lies = self.lies[digest]
        await (lies.pop(0) if lies else self.always.get(digest, Asked.honest))(asked)
