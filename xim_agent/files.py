"""File operations that survive kill -9 and power loss, and never follow a link that somebody planted."""

import errno
import fcntl
import os
import secrets
import shutil
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

TEMPORARY = ".tmp-"
_SQLITE_FULL = 13  # sqlite3.SQLITE_FULL, for those who load no SQLite


class Held(Exception):
    """Another process has the lock; `pid` as it wrote it, for the message only."""

    def __init__(self, pid: str) -> None:
        super().__init__(pid)
        self.pid = pid


def lock(path: Path, mode: int) -> int:
    """The descriptor that holds the kernel's lock until it, and every copy of it, is closed.

    Raises Held, OSError (EMLINK where writing would write to a file that has another name too, or is none).
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or info.st_nlink > 1:
        os.close(fd)
        raise OSError(errno.EMLINK, "not a file of its own", str(path))
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        pid = os.pread(fd, 32, 0).decode("ascii", "replace").strip().partition("\n")[0] or "unknown"
        os.close(fd)
        if isinstance(error, BlockingIOError):
            raise Held(pid) from None
        raise
    with suppress(OSError):  # a full disk costs the others the pid in their message, nothing else
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
    return fd


def is_full(error: Exception) -> bool:
    """Whether this says that disk or quota has no room. Of SQLite, too."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == _SQLITE_FULL


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_at(directory: int) -> None:
    """`directory`: a descriptor of any kind, one of O_PATH too."""
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(path: Path, data: bytes | bytearray | memoryview, mode: int) -> None:
    """`path` with exactly `data`, or nothing: temporary file beside it, fsync, rename, fsync of the directory."""
    path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    parent = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        publish_at(parent, path.name, data, mode)
    finally:
        os.close(parent)


def publish_at(directory: int, name: str, data: bytes | bytearray | memoryview, mode: int) -> None:
    """As `publish`. `directory`: a descriptor of it."""
    temporary = TEMPORARY + secrets.token_hex(8)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
    try:
        with os.fdopen(fd, "wb", buffering=0) as file:
            write_all(file.fileno(), data, 0)
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=directory)
        raise
    sync_at(directory)


def write_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """pwrite takes at most 2 GiB at once and may write less."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def disk_bytes(path: Path) -> int:
    """Allocated bytes of a file or a tree, links not followed; what vanishes meanwhile counts nothing."""
    total = 0
    try:
        info = path.lstat()
        total += info.st_blocks * 512
        if stat.S_ISDIR(info.st_mode):
            with os.scandir(path) as entries:
                total += sum(disk_bytes(Path(e.path)) for e in entries)
    except FileNotFoundError:
        return total
    return total


def modified(path: Path) -> float:
    """Unix seconds; 0 when it has vanished."""
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0


def remove_tree(path: Path) -> None:
    """Removes a file or a tree, read-only directories included."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Disk:
    """Bytes; `free`: what we may still write."""

    total: int
    free: int


def disk(path: Path) -> Disk:
    info = os.statvfs(path)
    return Disk(info.f_frsize * info.f_blocks, info.f_frsize * info.f_bavail)
