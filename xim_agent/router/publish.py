"""A directory of model files becomes chunks and a manifest that agents fetch, in constant memory."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from xim_agent import files
from xim_agent.cache import codec
from xim_agent.cache.manifest import (
    CHUNK,
    FORMAT,
    Chunk,
    File,
    Manifest,
    check_component,
    check_path,
    encode,
    is_unsafe,
    parse,
)
from xim_agent.errors import AgentError, Exit

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PublishedModel:
    """`manifest_sha256`: hex; `size_bytes`: of the files; `stored_bytes`: of its chunks, each once.

    `dropped`: paths left out: hidden, linked directories, no regular files, or such that could run code.
    """

    name: str
    revision: str
    id: str
    manifest_sha256: str
    size_bytes: int
    stored_bytes: int
    dropped: tuple[str, ...]


def publish(
    path: Path,
    name: str,
    revision: str | None,
    data_dir: Path,
    *,
    progress: Progress | None = None,
    workers: int = 2,
) -> PublishedModel:
    """Stores the files below `path` in `data_dir`/models. Blocks; may run several times at once, for one model too.

    `revision` None: derived from the content. `progress` is told (bytes done, bytes in all); `workers`: zstd threads.
    The manifest is written last and every file by one rename, so a run that is cut leaves only chunks that the next
    one finds. Links to files are followed. Raises AgentError `model_name`, `model_path`, `model_changed`,
    `publish_io`, `disk_full`, and ManifestRefused, before anything is read where that can be known.
    """
    check_name(name)
    try:
        return _publish(path, name, revision, data_dir / "models", progress, max(1, workers))
    except OSError as e:
        if files.is_full(e):
            hint = "free some, for example with `router model rm` of another model, and publish again"
            message = f"{path} cannot be published: no space is left for {data_dir}"
            raise AgentError("disk_full", message, hint=hint, exit_code=Exit.STATE) from e
        raise AgentError("publish_io", f"{path} cannot be published: {e}", exit_code=Exit.STATE) from e


def _publish(
    path: Path, name: str, revision: str | None, store: Path, progress: Progress | None, workers: int
) -> PublishedModel:
    root = path.expanduser()
    if not root.is_dir():
        raise AgentError("model_path", f"{path} is not a directory", exit_code=Exit.USAGE)
    if store.parent.resolve().is_relative_to(root.resolve()):
        raise AgentError(
            "model_path",
            f"the router's directory {store.parent} lies in {path}: its private keys would be published",
            hint="give a directory with the model's files alone",
            exit_code=Exit.USAGE,
        )
    kept, dropped = _select(root)
    if not kept:
        raise AgentError("model_path", f"{path} holds no file that can be published", exit_code=Exit.USAGE)
    if revision is not None:
        check_component(revision)
    _checked(Manifest(FORMAT, name, "", tuple(File(p, 0, sha256().hexdigest(), ()) for p in kept)))
    blobs = _Blobs(store, sum((root / p).stat().st_size for p in kept), progress, workers)
    entries = tuple(blobs.add(root, p) for p in kept)
    blobs.check_unchanged(root)
    revision = revision or sha256(encode(Manifest(FORMAT, "", "", entries))).hexdigest()[:12]
    manifest = Manifest(FORMAT, name, revision, entries)
    data, digest = _checked(manifest)
    files.publish(store / "manifests" / f"{digest}.json", data, 0o640)
    return PublishedModel(
        name=name,
        revision=revision,
        id=model_id(name),
        manifest_sha256=digest,
        size_bytes=manifest.size,
        stored_bytes=sum(manifest.blobs().values()),
        dropped=tuple(dropped),
    )


def model_id(name: str) -> str:
    """The name as one directory name; with a hash where that loses something, so that no two names share an id."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-")[:100]
    return plain if plain and plain == name else f"{plain or 'model'}-{sha256(name.encode()).hexdigest()[:8]}"


def check_name(name: str) -> None:
    """Raises AgentError `model_name`. `@` separates a name from its revision."""
    if not 1 <= len(name) <= 200 or not name.isprintable() or "@" in name or name != name.strip():
        raise AgentError(
            "model_name",
            f"{name[:200]!r} is no model name",
            hint="1 to 200 printable characters, no @, no space at either end",
            exit_code=Exit.USAGE,
        )


def _checked(manifest: Manifest) -> tuple[bytes, str]:
    """Its bytes and their SHA-256 (hex). Raises ManifestRefused where an agent would."""
    data = encode(manifest)
    digest = sha256(data).hexdigest()
    model, revision = manifest.model, manifest.revision
    parse(data, digest=digest, model=model, revision=revision, size_bytes=None, allow_unsafe=False)
    return data, digest


def _fail(error: OSError) -> None:
    raise error


def _select(root: Path) -> tuple[list[str], list[str]]:
    """(paths to publish, paths left out), sorted. Raises ManifestRefused for a name that agents would refuse."""
    kept, dropped = [], []
    for directory, folders, names in os.walk(root, onerror=_fail):
        here = Path(directory)
        for folder in list(folders):
            if folder.startswith(".") or (here / folder).is_symlink():
                folders.remove(folder)
                dropped.append((here / folder).relative_to(root).as_posix() + "/")
        for name in names:
            relative = (here / name).relative_to(root).as_posix()
            if name.startswith(".") or is_unsafe(name) or not (here / name).is_file():
                dropped.append(relative)
            else:
                check_path(relative)
                kept.append(relative)
    return sorted(kept), sorted(dropped)


def _has(path: Path, digest: str) -> bool:
    """Whether the chunk is there and whole: agents that refused a damaged one were told to publish again."""
    try:
        return codec.verified(path.read_bytes(), digest)
    except FileNotFoundError:
        return False


class _Blobs:
    """Chunks on their way into the store."""

    def __init__(self, root: Path, total: int, progress: Progress | None, workers: int) -> None:
        self._root, self._total, self._progress, self._workers = root, total, progress, workers
        self._done = 0
        self._buffer = bytearray(CHUNK)
        self._seen: dict[str, tuple[int, ...]] = {}

    def add(self, root: Path, relative: str) -> File:
        whole, chunks = sha256(), []
        with (root / relative).open("rb", buffering=0) as file:
            info = os.fstat(file.fileno())
            self._seen[relative] = _state(info)
            while data := self._read(file.fileno()):
                whole.update(data)
                chunks.append(self._chunk(data))
                self._done += len(data)
                data.release()
                if self._progress:
                    self._progress(self._done, self._total)
        if sum(c.size for c in chunks) != info.st_size:
            raise _changed(relative)
        return File(relative, info.st_size, whole.hexdigest(), tuple(chunks))

    def check_unchanged(self, root: Path) -> None:
        """Raises AgentError `model_changed` when a file is no longer what was read."""
        for relative, state in self._seen.items():
            if _state((root / relative).stat()) != state:
                raise _changed(relative)

    def _read(self, fd: int) -> memoryview:
        """The next whole chunk, the last one shorter, empty at the end."""
        view, filled = memoryview(self._buffer), 0
        while filled < CHUNK and (n := os.readv(fd, [view[filled:]])):
            filled += n
        return view[:filled]

    def _chunk(self, data: memoryview) -> Chunk:
        name, stored = codec.choose(data, self._workers)
        digest = sha256(stored).hexdigest()
        path = self._root / "blobs" / digest[:2] / digest
        if not _has(path, digest):
            files.publish(path, stored, 0o640)
        return Chunk(digest, len(stored), len(data), name)


def _state(info: os.stat_result) -> tuple[int, ...]:
    """Other numbers after any write, also one that sets the times back."""
    return (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


def _changed(relative: str) -> AgentError:
    message = f"{relative} changed while it was published"
    return AgentError("model_changed", message, hint="publish it again when nothing writes to it", exit_code=Exit.STATE)
