"""A model under construction: its files and the journal of the chunks that are on the disk for good."""

import errno
import os
import re
import stat
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from xim_agent import files
from xim_agent.cache import tree
from xim_agent.cache.codec import Data
from xim_agent.cache.manifest import CHUNK, MARKER, Manifest

_LINE = re.compile(rb"(\d{1,9}) (\d{1,9})")
_PIECE = 1024 * 1024
_MAX_LINE = 20  # bytes


class Partial:
    """`root`/files and `root`/journal. All methods block; `write` may run in several threads at once.

    A journal line is written after the bytes it speaks of are on the disk for good, and is so itself when `write` comes
    back: the chunk may go then. A line that is torn, or whose file is too short, is as good as absent.

    Raises tree.Foreign where a link, or what else is not ours, turns up while it is in use; what is found at its start
    or end is removed.
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self.files = root / "files"
        self.manifest = manifest
        tree.make_directory(root)
        self._journal = root / "journal"
        for path in root.iterdir():
            folder = path == self.files and path.is_dir() and not path.is_symlink()
            journal = path == self._journal and tree.is_plain(path, own=True) and path.stat().st_size <= self._most()
            if not folder and not journal:
                tree.remove(path)
        tree.make_directory(self.files)
        self._tidy()
        self._directories: set[Path] = set()
        self._named: set[int] = set()  # files whose names are on the disk for good
        self._lock = threading.Lock()
        self.done = self._load()

    def _tidy(self) -> None:
        """What is in `files` becomes the model: what the manifest does not name, and what is no plain file, goes."""
        names = {f.path for f in self.manifest.files}
        folders = {p.as_posix() for name in names for p in PurePosixPath(name).parents}
        for here, inner, plain in os.walk(self.files):
            for name in [*inner, *plain]:
                path = Path(here) / name
                relative = path.relative_to(self.files).as_posix()
                if relative in names and tree.is_plain(path, own=True):
                    continue
                if relative not in folders or path.is_symlink() or not path.is_dir():
                    tree.remove(path)

    def _load(self) -> set[tuple[int, int]]:
        """Rewrites the journal where it says more, so that the next line does not continue a torn one."""
        data = tree.read(self._journal, self._most())
        *lines, torn = (data or b"").split(b"\n")
        sizes: dict[int, int] = {}
        done: set[tuple[int, int]] = set()
        for line in lines:
            if (match := _LINE.fullmatch(line)) is None:
                continue
            i, j = int(match[1]), int(match[2])
            if i < len(self.manifest.files) and j < len(self.manifest.files[i].chunks):
                end = j * CHUNK + self.manifest.files[i].chunks[j].size
                if sizes.setdefault(i, self._size(i)) >= end:
                    done.add((i, j))
        if data is None or torn or len(done) < len(lines):
            tree.publish(self._journal, b"".join(b"%d %d\n" % pair for pair in sorted(done)), 0o640)
        return done

    def _most(self) -> int:
        """Bytes of a journal that this wrote: each chunk once in it at the start, once more since, and some torn."""
        return 4096 + 3 * _MAX_LINE * sum(len(file.chunks) for file in self.manifest.files)

    def _size(self, i: int) -> int:
        try:
            info = self._path(i).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return -1
        return info.st_size if stat.S_ISREG(info.st_mode) else -1

    def _path(self, i: int) -> Path:
        return self.files / self.manifest.files[i].path

    def done_blobs(self) -> frozenset[str]:
        """Blobs all of whose places are written."""
        missing = {c.blob for i, j, c in self.manifest.places() if (i, j) not in self.done}
        return frozenset(self.manifest.blobs().keys() - missing)

    def write(self, i: int, j: int, data: Data | Iterator[Data]) -> None:
        """Writes chunk `j` of file `i` (whole, or piece by piece) and journals it, both for good."""
        fd, at = self._open(i), j * CHUNK
        try:
            for piece in data if isinstance(data, Iterator) else (data,):
                files.write_all(fd, piece, at)
                at += len(piece)
            os.fdatasync(fd)
        finally:
            os.close(fd)
        if i not in self._named:
            tree.sync(self._path(i).parent)
            self._named.add(i)
        self._journal_line(b"%d %d\n" % (i, j))
        self.done.add((i, j))

    def _journal_line(self, line: bytes) -> None:
        """The whole line or none of it: on a full disk a part would become one with the next line and tell a lie."""
        fd = tree.open_file(self._journal, os.O_WRONLY | os.O_APPEND, own=True)
        try:
            with self._lock:
                size = os.fstat(fd).st_size
                if os.write(fd, line) < len(line):
                    os.ftruncate(fd, size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._journal))
            os.fdatasync(fd)
        finally:
            os.close(fd)

    def _open(self, i: int) -> int:
        path = self._path(i)
        self._make_directory(path.parent)
        return tree.open_file(path, os.O_RDWR | os.O_CREAT, own=True)

    def _make_directory(self, path: Path) -> None:
        with self._lock:
            for directory in [*reversed(path.relative_to(self.files).parents), path.relative_to(self.files)]:
                full = self.files / directory
                if full in self._directories:
                    continue
                tree.make_directory(full)
                self._directories.add(full)

    def hash_chunk(self, hasher: Any, i: int, j: int) -> None:
        """Feeds what the disk holds of this chunk to `hasher`."""
        fd = tree.open_file(self._path(i), os.O_RDONLY, own=False)
        try:
            offset, left = j * CHUNK, self.manifest.files[i].chunks[j].size
            while left and (piece := os.pread(fd, min(left, _PIECE), offset)):
                hasher.update(piece)
                offset, left = offset + len(piece), left - len(piece)
        finally:
            os.close(fd)

    def whole(self, i: int, hasher: Any) -> bool:
        """Whether file `i` is what the manifest says, `hasher` having seen all its chunks (None: their own digests are
        enough). Creates an empty file.
        """
        file = self.manifest.files[i]
        if not file.chunks and self._size(i) < 0:
            os.close(self._open(i))
        return (hasher is None or hasher.hexdigest() == file.sha256) and self._size(i) == file.size

    def new_hasher(self) -> Any:
        return sha256()

    def seal(self, digest: str) -> Path:
        """Files read-only, marker written, everything durable. The directory is then ready to be renamed into place."""
        self._tidy()
        for i in range(len(self.manifest.files)):
            fd = tree.open_file(self._path(i), os.O_RDONLY, own=True)
            try:
                os.fchmod(fd, 0o440)
                os.fsync(fd)
            finally:
                os.close(fd)
        tree.publish(self.files / MARKER, digest.encode(), 0o440)
        for directory, _, _ in os.walk(self.files, topdown=False):
            tree.sync(Path(directory))
        return self.files
