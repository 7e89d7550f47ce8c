"""Who means harm: on the disk (what is planted in the cache, a canary beside it) and on the way to the router."""

import os
import shutil
import socket
import stat
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from xim_agent.cache.transfer import BlobReply, Pieces

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
