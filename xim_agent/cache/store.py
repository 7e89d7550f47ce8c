"""The cache directory: what lies where, and the few ways in which it changes. Everything blocks."""

import os
import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import msgspec

from xim_agent import files
from xim_agent.cache import claim
from xim_agent.cache.index import Entry, Index
from xim_agent.cache.inventory import Evict, Inventory, Model
from xim_agent.cache.inventory import Partial as PartialBytes
from xim_agent.cache.manifest import CHUNK, MARKER, Manifest
from xim_agent.cache.partial import Partial

_FOLDERS = ("blobs", "manifests", "ready", "partial", "quarantine", "compile")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass
class Known:
    """A manifest on disk."""

    name: str
    revision: str
    size: int
    blobs: frozenset[str]


@dataclass
class Store:
    """Open for one process at a time: `lock` is held by flock until `close` or the end of the process."""

    root: Path
    lock: int
    index: Index
    known: dict[str, Known] = field(default_factory=dict)
    ready: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: Path) -> "Store":
        """Takes the lock and adopts the tree.

        Raises AgentError `cache_in_use`, `cache_format`, OSError, sqlite3.Error; then nothing stays open.
        """
        root = directory.expanduser().resolve()
        for name in _FOLDERS:
            (root / name).mkdir(mode=0o750, parents=True, exist_ok=True)
            if (root / name).is_symlink():
                raise NotADirectoryError(20, "a link instead of a directory", str(root / name))
        with ExitStack() as opened:
            lock = claim.lock(root / "lock")
            opened.callback(os.close, lock)
            claim.check_format(root / "FORMAT")
            store = cls(root, lock, Index(root / "index.sqlite"))
            opened.callback(store.index.close)
            store._adopt()
            opened.pop_all()
        return store

    def close(self) -> None:
        self.index.close()
        os.close(self.lock)

    # -- adoption ------------------------------------------------------------------------------------------------

    def _adopt(self) -> None:
        for folder in (self.root / "blobs", *_directories(self.root / "blobs"), self.root / "manifests", self.root):
            for left in folder.glob(files.TEMPORARY + "*"):
                files.remove_tree(left)
        for left in (self.root / "quarantine").glob("evicted-*"):
            files.remove_tree(left)
        for path in (self.root / "manifests").glob("*.json"):
            data = self.load_manifest(path.stem)
            if data is not None:
                self._learn(path.stem, msgspec.json.decode(data, type=Manifest))
        for model in _directories(self.root / "ready"):
            for revision in _directories(model):
                self._adopt_ready(revision)
        for path in (self.root / "partial").iterdir():
            if path.name not in self.known:
                files.remove_tree(path)
        self._adopt_index()
        self.forget_empty()

    def _adopt_ready(self, path: Path) -> None:
        try:
            digest = (path / MARKER).read_text()
        except (OSError, UnicodeDecodeError):
            digest = ""
        if _DIGEST.fullmatch(digest) and digest not in self.ready:
            self.ready[digest] = path
        else:
            self._retire(path, f"unmarked-{path.parent.name[:100]}-{path.name[:100]}")

    def _adopt_index(self) -> None:
        entries = self.index.entries()
        for digest in entries.keys() - self.known.keys() - self.ready.keys():
            self.index.remove(digest)
        for digest in self.known.keys() - entries.keys():
            known, ready = self.known[digest], self.ready.get(digest)
            used = (ready or self._manifest(digest)).stat().st_mtime
            self.index.add(
                Entry(digest, ready.parent.name if ready else "", known.name, known.revision, known.size, used)
            )

    # -- manifests -----------------------------------------------------------------------------------------------

    def _manifest(self, digest: str) -> Path:
        return self.root / "manifests" / f"{digest}.json"

    def load_manifest(self, digest: str) -> bytes | None:
        """The bytes with this SHA-256; a file with other bytes is removed."""
        try:
            data = self._manifest(digest).read_bytes()
        except FileNotFoundError:
            return None
        if sha256(data).hexdigest() == digest:
            return data
        self._manifest(digest).unlink(missing_ok=True)
        return None

    def save_manifest(self, digest: str, data: bytes, manifest: Manifest) -> None:
        if digest not in self.known:
            files.publish(self._manifest(digest), data, 0o640)
            self._learn(digest, manifest)

    def _learn(self, digest: str, manifest: Manifest) -> None:
        blobs = frozenset(manifest.blobs())
        self.known[digest] = Known(manifest.model, manifest.revision, manifest.size, blobs)

    def forget_empty(self) -> None:
        """Manifests of which nothing is left on the disk go."""
        present = {p.name for d in _directories(self.root / "blobs") for p in d.iterdir()}
        partials = {p.name for p in (self.root / "partial").iterdir()}
        for digest, known in dict(self.known).items():
            if digest not in self.ready and digest not in partials and not known.blobs & present:
                self.forget(digest)

    def forget(self, digest: str) -> None:
        """The manifest goes; nothing else of the model may be left."""
        self._manifest(digest).unlink(missing_ok=True)
        self.known.pop(digest, None)
        self.index.remove(digest)

    # -- blobs ---------------------------------------------------------------------------------------------------

    def blob(self, digest: str) -> Path:
        return self.root / "blobs" / digest[:2] / digest

    def has_blob(self, digest: str) -> bool:
        return self.blob(digest).is_file()

    def read_blob(self, digest: str) -> bytes | None:
        """The stored bytes, not verified; None when absent."""
        try:
            fd = os.open(self.blob(digest), os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        with os.fdopen(fd, "rb", buffering=0) as file:
            return file.read(CHUNK + 1)

    def write_blob(self, digest: str, data: bytes | bytearray) -> None:
        files.publish(self.blob(digest), data, 0o640)

    def drop_blob(self, digest: str) -> None:
        self.blob(digest).unlink(missing_ok=True)

    # -- partial and ready ---------------------------------------------------------------------------------------

    def partial(self, digest: str, manifest: Manifest) -> Partial:
        return Partial(self.root / "partial" / digest, manifest)

    def drop_partial(self, digest: str) -> None:
        files.remove_tree(self.root / "partial" / digest)

    def whole_ready(self, digest: str, manifest: Manifest) -> Path | None:
        """The ready directory if it has every file at its size; one that was damaged is retired."""
        path = self.ready.get(digest)
        if path is None or all(_size(path / f.path) == f.size for f in manifest.files):
            return path
        self.retire_damaged(digest)
        return None

    def retire_damaged(self, digest: str) -> None:
        """A ready copy that is not what its manifest says goes to the quarantine."""
        self._retire(self.ready[digest], f"damaged-{digest}")
        del self.ready[digest]

    def publish(self, partial: Partial, digest: str, model_id: str, revision: str) -> Path:
        """One rename makes the model ready. A place taken by other content of the same revision is left alone."""
        sealed = partial.seal(digest)
        target = self.root / "ready" / model_id / revision
        target.parent.mkdir(mode=0o750, exist_ok=True)
        if target.exists():
            target = target.with_name(f"{revision}~{digest[:8]}")  # no revision contains ~
        sealed.rename(target)
        for directory in (target.parent, target.parent.parent, partial.root):
            files.sync_directory(directory)
        self.ready[digest] = target
        self.drop_partial(digest)
        return target

    def _retire(self, path: Path, name: str) -> Path:
        """Out of `ready` by one rename, so that what is there is never half a model."""
        grave = self.root / "quarantine" / name
        files.remove_tree(grave)
        path.rename(grave)
        files.sync_directory(grave.parent)
        files.sync_directory(path.parent)
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
        return grave

    # -- bound ---------------------------------------------------------------------------------------------------

    def evict(self, step: Evict) -> None:
        if step.what == "quarantine":
            for path in (self.root / "quarantine").iterdir():
                files.remove_tree(path)
        elif step.what == "ready":
            if step.key in self.ready:  # else an operator was faster
                files.remove_tree(self._retire(self.ready.pop(step.key), f"evicted-{step.key}"))
        elif step.what == "partial":
            self.drop_partial(step.key)
        elif step.what == "compile":
            files.remove_tree(self.root / "compile" / step.key)
        for blob in step.blobs:
            self.drop_blob(blob)

    def scan(self) -> Inventory:
        """What is on the disk now, as allocated; other threads may add and remove meanwhile."""
        blobs = {e.name: files.disk_bytes(Path(e)) for d in _directories(self.root / "blobs") for e in os.scandir(d)}
        entries = self.index.entries()
        models = {}
        for digest in self.known.keys() | self.ready.keys():
            known = self.known.get(digest)
            chunks = known.blobs & blobs.keys() if known else frozenset()
            models[digest] = Model(
                digest,
                used=entries[digest].used if digest in entries else 0.0,
                chunks=chunks,
                complete=known is not None and chunks == known.blobs,
                ready=files.disk_bytes(path) if (path := self.ready.get(digest)) is not None else 0,
            )
        partials = {
            p.name: PartialBytes(files.disk_bytes(p), files.modified(p)) for p in (self.root / "partial").iterdir()
        }
        compiled = {p.name: files.disk_bytes(p) for p in _directories(self.root / "compile")}
        quarantine = sum(files.disk_bytes(p) for p in (self.root / "quarantine").iterdir())
        return Inventory(models, blobs, partials, compiled, quarantine, self._other())

    def _other(self) -> int:
        """Manifests, index, lock and the directories themselves."""
        own = [self.root, *(self.root / f for f in _FOLDERS if f != "manifests")]
        own += _directories(self.root / "blobs") + _directories(self.root / "ready")
        total = sum(d.lstat().st_blocks * 512 for d in own) + files.disk_bytes(self.root / "manifests")
        return total + sum(files.disk_bytes(p) for p in self.root.iterdir() if p.name not in _FOLDERS)


def _directories(path: Path) -> list[Path]:
    return [p for p in path.iterdir() if p.is_dir() and not p.is_symlink()]


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return -1
