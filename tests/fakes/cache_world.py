"""A few models in memory, a source that counts each byte, and what lies in a cache as somebody else would read it."""

import os
import random
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import msgspec
import trio

from xim_agent.cache.manifest import CHUNK, Manifest
from xim_agent.mesh.messages import ModelRef
from xim_agent.outcome import RouterError
from xim_agent.router.publish import publish

PIECE = 32 * 1024


@dataclass(frozen=True)
class Book:
    """One revision as it was published."""

    ref: ModelRef
    data: bytes
    manifest: Manifest
    blobs: dict[str, bytes]
    content: dict[str, bytes]

    @property
    def digest(self) -> str:
        return self.ref.manifest[7:]

    @property
    def allocated(self) -> int:
        """Bytes that its files take, at most."""
        return sum(len(c) + 2 * 4096 for c in self.content.values()) + 100_000


def _contents() -> dict[str, dict[str, bytes]]:
    rand = random.Random(5)
    soft = [rand.randbytes(3000) * 30 for _ in range(3)]
    hard = [rand.randbytes(40_000 + 10_000 * i) for i in range(8)]
    shared = {"shared.safetensors": hard[0], "soft.json": soft[0]}
    return {
        "a@1": {**shared, "own.safetensors": hard[1], "config.json": b"1"},
        "a@2": {**shared, "own.safetensors": hard[2], "config.json": b"2"},
        "b@1": {f"{i}.safetensors": hard[i] for i in range(3, 8)} | {"shared.safetensors": hard[0]},
        "c@1": {"two.safetensors": bytes(CHUNK) + hard[4], "one.safetensors": hard[4], "empty": b""},
        "d@1": {f"{'deep/' * i}{i}/{j}.json": soft[1 + j % 2] + bytes([i]) for i in range(3) for j in range(4)}
        | {"again.json": soft[1] + bytes([0])},
        "e@1": {f"{i}.safetensors": rand.randbytes(30_000) for i in range(20)},
    }


def library(root: Path) -> dict[str, Book]:
    """By MODEL@REV. a@1, a@2, b@1 and c@1 have chunks in common, c@1 has a file of two chunks, d@1 many directories,
    e@1 many chunks."""
    books = {}
    for name, content in _contents().items():
        source, (model, revision) = root / name, name.split("@")
        for path, data in content.items():
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            (source / path).write_bytes(data)
        p = publish(source, model, revision, root / "data")
        store = root / "data/models"
        data = (store / "manifests" / f"{p.manifest_sha256}.json").read_bytes()
        manifest = msgspec.json.decode(data, type=Manifest)
        blobs = {b: next(store.rglob(b)).read_bytes() for b in manifest.blobs()}
        ref = ModelRef(p.id, p.name, p.revision, f"sha256:{p.manifest_sha256}", p.size_bytes)
        books[name] = Book(ref, data, manifest, blobs, content)
    return books


class _Reply:
    status = 200

    def __init__(self, source: "Shelf", digest: str, start: int) -> None:
        self.source, self.digest, self.start, self.total = source, digest, start, len(source.blobs[digest])

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        for offset in range(self.start, self.total, PIECE):
            await trio.lowlevel.checkpoint()
            self.source.reads += 1
            self.source.at_read(self.source.reads)
            if self.source.reads in self.source.failing:
                raise RouterError("connection_lost", "cut by the test")
            piece = self.source.blobs[self.digest][offset : offset + PIECE]
            self.source.served[self.digest] += len(piece)
            self.source.tell(f"served {self.digest} {len(piece)}")
            yield piece


@dataclass
class Shelf:
    """`BlobSource` from memory. `served`: bytes by blob; `failing`: numbers of the reads at which a connection dies."""

    blobs: dict[str, bytes]
    manifests: dict[str, bytes]
    tell: Callable[[str], None]
    at_read: Callable[[int], None] = lambda number: None
    reads: int = 0
    served: Counter[str] = field(default_factory=Counter)
    failing: frozenset[int] = frozenset()

    async def manifest(self, sha256_hex: str) -> bytes:
        await trio.lowlevel.checkpoint()
        return self.manifests[sha256_hex]

    @asynccontextmanager
    async def blob(self, sha256_hex: str, offset: int) -> AsyncIterator[_Reply]:
        yield _Reply(self, sha256_hex, offset)


# -- what lies there -------------------------------------------------------------------------------------------------

_hashes: dict[tuple[int, ...], str] = {}


def file_hash(path: Path) -> str:
    info = path.lstat()
    # Copies keep the time of the change of what they are copies of, and get numbers of files that are gone.
    key = info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns
    if key not in _hashes:
        _hashes[key] = sha256(path.read_bytes()).hexdigest()
    return _hashes[key]


@dataclass(frozen=True)
class Seen:
    """By manifest: `ready` whether all files are right, `sized` whether their names and sizes are; `done`: blobs whose
    bytes are all in the partial and in its journal. `good` and `bad`: blobs in the store.
    """

    ready: dict[str, bool]
    sized: dict[str, bool]
    done: dict[str, frozenset[str]]
    good: frozenset[str]
    bad: frozenset[str]
    known: frozenset[str]
    quarantine: bool
    total: int

    def has(self, digest: str) -> frozenset[str]:
        """Blobs that no network is needed for."""
        return self.good | self.done.get(digest, frozenset())


def see(root: Path, books: dict[str, Book], total: int) -> Seen:
    by_digest = {b.digest: b for b in books.values()}
    blobs = [p for p in (root / "blobs").glob("*/*") if not p.name.startswith(".tmp-")]
    good = frozenset(p.name for p in blobs if file_hash(p) == p.name)
    ready, sized = {}, {}
    for marker in (root / "ready").glob("*/*/.xim-manifest"):
        digest, folder = marker.read_text(), marker.parent
        found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file() and p != marker}
        content = by_digest[digest].content
        sized[digest] = {n: p.stat().st_size for n, p in found.items()} == {n: len(c) for n, c in content.items()}
        wanted = {f.path: f.sha256 for f in by_digest[digest].manifest.files}
        ready[digest] = {n: file_hash(p) for n, p in found.items()} == wanted
    done = {p.name: _done(p, by_digest[p.name]) for p in (root / "partial").iterdir() if p.name in by_digest}
    return Seen(
        ready,
        sized,
        done,
        good,
        frozenset(p.name for p in blobs) - good,
        frozenset(p.stem for p in (root / "manifests").glob("*.json")),
        any((root / "quarantine").iterdir()),
        total,
    )


def _done(partial: Path, book: Book) -> frozenset[str]:
    journal = partial / "journal"
    lines = set(journal.read_text().split("\n")[:-1]) if journal.exists() else set()
    missing = set()
    for i, j, chunk in book.manifest.places():
        path = partial / "files" / book.manifest.files[i].path
        wanted = book.content[book.manifest.files[i].path][j * CHUNK :][: chunk.size]
        if f"{i} {j}" not in lines or not path.exists() or _piece(path, j, chunk.size) != wanted:
            missing.add(chunk.blob)
    return frozenset(book.blobs) - missing


def _piece(path: Path, j: int, size: int) -> bytes:
    with path.open("rb") as file:
        return os.pread(file.fileno(), size, j * CHUNK)
