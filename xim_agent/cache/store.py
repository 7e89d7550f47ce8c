"""The cache directory: what lies where, and the few ways in which it changes. Everything blocks."""

import logging
import os
import stat
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from xim_agent import files
from xim_agent.cache import claim, codec, tree
from xim_agent.cache.index import Entry, Index
from xim_agent.cache.inventory import Evict, Inventory, Model
from xim_agent.cache.inventory import Partial as PartialBytes
from xim_agent.cache.manifest import DIGEST, MARKER, MAX_MANIFEST, Manifest, ManifestRefused, check
from xim_agent.cache.partial import Partial
from xim_agent.cache.sweep import FOLDERS, sweep

log = logging.getLogger("xim_agent.cache")

DAMAGED_MANIFEST = "manifest-"  # in the quarantine, for `cache verify`


@dataclass
class Known:
    """A manifest on disk."""

    name: str
    revision: str
    size: int
    blobs: frozenset[str]


@dataclass
class Store:
    """Open for one process at a time: `lock` and `home` are held by flock until `close` or the end of the process."""

    root: Path
    home: int
    lock: int
    index: Index
    known: dict[str, Known] = field(default_factory=dict)
    ready: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: Path) -> "Store":
        """Takes the lock and adopts the tree.

        Raises AgentError `cache_in_use`, `cache_format`, `cache_foreign`, OSError, sqlite3.Error; then nothing stays
        open.
        """
        claim.check_ours(root := directory.expanduser().resolve(), FOLDERS)
        made = [path for path in (root, *root.parents) if not os.path.lexists(path)]
        root.mkdir(mode=0o750, parents=True, exist_ok=True)
        for path in made:
            files.sync_directory(path.parent)
        for name in FOLDERS:
            tree.make_directory(root / name)
        with ExitStack() as opened:
            home = claim.hold(root)
            opened.callback(os.close, home)
            lock = claim.lock(root / "lock")
            opened.callback(os.close, lock)
            claim.check_format(root / claim.MARK)
            store = cls(root, home, lock, Index(root / "index.sqlite"))
            opened.callback(store.index.close)
            store._adopt()
            opened.pop_all()
        return store

    def close(self) -> None:
        self.index.close()
        os.close(self.lock)
        os.close(self.home)

    # -- adoption ------------------------------------------------------------------------------------------------

    def _adopt(self) -> None:
        sweep(self.root)
        for path in (self.root / "manifests").iterdir():
            data = self.load_manifest(path.stem)
            if data is not None:
                self._adopt_manifest(path.stem, data)
        for model in _directories(self.root / "ready"):
            for revision in _directories(model):
                self._adopt_ready(revision)
        for path in (self.root / "partial").iterdir():
            if path.name not in self.known:
                tree.remove(path)
        self._adopt_index()
        self.forget_empty()

    def _adopt_manifest(self, digest: str, data: bytes) -> None:
        """Whoever can write here can name a file by its digest, so that the name proves nothing."""
        try:
            self._learn(digest, check(data))
        except ManifestRefused as e:
            log.warning("stored manifest is refused", extra={"manifest": digest, "error": e.message})
            tree.remove(self._manifest(digest))

    def _adopt_ready(self, path: Path) -> None:
        try:
            digest = (tree.read(path / MARKER, 64) or b"").decode(errors="replace")
        except (OSError, tree.Foreign):
            digest = ""
        if DIGEST.fullmatch(digest) and digest not in self.ready:
            self.ready[digest] = path
        else:
            name = sha256(os.fsencode(path)).hexdigest()[:32]  # its own could be too long, or hide in a listing
            self._retire(path, f"unmarked-{name}")

    def _adopt_index(self) -> None:
        found = []
        for digest in self.known.keys() - self.index.entries().keys():
            known, ready = self.known[digest], self.ready.get(digest)
            used = (ready or self._manifest(digest)).stat().st_mtime
            found.append(
                Entry(digest, ready.parent.name if ready else "", known.name, known.revision, known.size, used)
            )
        self.index.adopt(self.known.keys() | self.ready.keys(), found)

    # -- manifests -----------------------------------------------------------------------------------------------

    def _manifest(self, digest: str) -> Path:
        return self.root / "manifests" / f"{digest}.json"

    def load_manifest(self, digest: str) -> bytes | None:
        """The bytes with this SHA-256; what else has that name is removed."""
        path = self._manifest(digest)
        try:
            data = tree.read(path, MAX_MANIFEST)
        except (tree.Foreign, IsADirectoryError):
            tree.remove(path)
            return None
        if data is not None and sha256(data).hexdigest() != digest:
            log.warning("stored manifest is damaged, it is fetched again when needed", extra={"manifest": digest})
            tree.rename(path, self.root / "quarantine" / f"{DAMAGED_MANIFEST}{digest}")
            return None
        return data

    def save_manifest(self, digest: str, data: bytes, manifest: Manifest) -> None:
        if digest not in self.known:
            tree.publish(self._manifest(digest), data, 0o640)
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
        tree.remove(self._manifest(digest))
        self.known.pop(digest, None)
        self.index.remove(digest)

    # -- blobs ---------------------------------------------------------------------------------------------------

    def blob(self, digest: str) -> Path:
        return self.root / "blobs" / digest[:2] / digest

    def has_blob(self, digest: str) -> bool:
        return tree.is_plain(self.blob(digest), own=False)

    def read_blob(self, digest: str, memory: memoryview) -> bool:
        """Whether `memory` holds its bytes now, verified. What else has the name goes: it would break the bound."""
        with suppress(tree.Foreign, IsADirectoryError):
            if tree.read_into(self.blob(digest), memory) and codec.verified(memory, digest):
                return True
        if os.path.lexists(self.blob(digest)):
            log.warning("stored chunk is damaged, it is fetched again", extra={"blob": digest})
            self.drop_blob(digest)
        return False

    def write_blob(self, digest: str, data: bytes | bytearray | memoryview) -> None:
        path = self.blob(digest)
        tree.make_directory(path.parent)
        tree.publish(path, data, 0o640)

    def drop_blob(self, digest: str) -> None:
        tree.remove(self.blob(digest))

    # -- partial and ready ---------------------------------------------------------------------------------------

    def partial(self, digest: str, manifest: Manifest) -> Partial:
        return Partial(self.root / "partial" / digest, manifest)

    def has_partial(self, digest: str) -> bool:
        return (self.root / "partial" / digest).is_dir()

    def drop_partial(self, digest: str) -> None:
        tree.remove(self.root / "partial" / digest)

    def whole_ready(self, digest: str, manifest: Manifest) -> Path | None:
        """The ready directory if it has the files of the manifest at their sizes and nothing else.

        One that was damaged, or where somebody put a link or one file more, is retired. What the files hold is not
        read: that takes as long as making them again (`cache verify` does it).
        """
        path = self.ready.get(digest)
        if path is None:
            return None
        found = tree.content(path)
        found.pop(MARKER, None)
        sizes = {name: info.st_size for name, info in found.items() if stat.S_ISREG(info.st_mode)}
        if len(sizes) == len(found) and sizes == {f.path: f.size for f in manifest.files}:
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
        tree.make_directory(target.parent)
        if os.path.lexists(target):
            target = target.with_name(f"{revision}~{digest[:8]}")  # no revision contains ~
        tree.rename(sealed, target)
        for directory in (target, target.parent, target.parent.parent, partial.root):
            tree.sync(directory)
        self.ready[digest] = target
        self.drop_partial(digest)
        return target

    def _retire(self, path: Path, name: str) -> Path:
        """Out of `ready` by one rename, so that what is there is never half a model."""
        grave = self.root / "quarantine" / name
        tree.remove(grave)
        tree.rename(path, grave)
        tree.sync(grave.parent)
        tree.sync(path.parent)
        tree.remove_if_empty(path.parent)
        return grave

    # -- bound ---------------------------------------------------------------------------------------------------

    def evict(self, step: Evict) -> None:
        if step.what == "quarantine":
            for path in (self.root / "quarantine").iterdir():
                tree.remove(path)
        elif step.what == "ready":
            if step.key in self.ready:  # else an operator was faster
                tree.remove(self._retire(self.ready.pop(step.key), f"evicted-{step.key}"))
        elif step.what == "partial":
            self.drop_partial(step.key)
        elif step.what == "compile":
            tree.remove(self.root / "compile" / step.key)
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
        own = [self.root, *(self.root / f for f in FOLDERS if f != "manifests")]
        own += _directories(self.root / "blobs") + _directories(self.root / "ready")
        total = files.disk_bytes(self.root / "manifests")
        for directory in own:
            with suppress(FileNotFoundError):  # an operator was faster
                total += directory.lstat().st_blocks * 512
        return total + sum(files.disk_bytes(p) for p in self.root.iterdir() if p.name not in FOLDERS)


def _directories(path: Path) -> list[Path]:
    return [p for p in path.iterdir() if p.is_dir() and not p.is_symlink()]
