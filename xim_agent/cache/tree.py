"""Paths of which no part may be a link: what somebody planted in the cache is neither followed nor written through.

All paths are absolute and resolved. Each call walks down from the root by descriptors, so that a directory that is
swapped for a link meanwhile leads nowhere either. Everything blocks.
"""

import errno
import os
import shlex
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from xim_agent import files
from xim_agent.errors import AgentError, Exit

_STEP = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
CURE = "check owner, modes and disk of that directory"  # hint where the disk refuses
_LINKS = (errno.ELOOP, errno.ENOTDIR)


def cure(error: BaseException, directory: Path) -> str:
    """The command that helps, where one does: a hint. `directory`: of the cache."""
    place = shlex.quote(str(directory))
    if isinstance(error, PermissionError):
        return f"`chown -R {os.geteuid()} {place} && chmod -R u+rwX {place}`"
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return f"make it writable: a unit of systemd with ReadWritePaths={place}, a container with a volume there"
    return CURE


class Foreign(AgentError):
    """The cache did not make this: a link, a special file, a file with a second name. It is left as it is."""

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        super().__init__(
            "cache_foreign",
            f"{str(path)!r} is {what}, which the cache never makes: nothing is read or written there",
            hint=f"remove it (`rm {shlex.quote(str(path))}`), or move the whole cache with "
            "XEROTIER_AGENT_MODEL_CACHE_PATH if it was to lie elsewhere; find out who else may write to it",
            exit_code=Exit.STATE,
        )


@contextmanager
def directory(path: Path) -> Iterator[int]:
    """A descriptor for `dir_fd`. Raises Foreign, OSError with the whole path."""
    fd = os.open("/", _STEP)
    try:
        for n, part in enumerate(path.parts[1:], 2):
            try:
                inner = os.open(part, _STEP, dir_fd=fd)
            except OSError as e:
                here = Path(*path.parts[:n])
                if e.errno in _LINKS:
                    raise Foreign(here, "not a directory") from None
                raise OSError(e.errno, e.strerror, str(here)) from None
            os.close(fd)
            fd = inner
        yield fd
    finally:
        os.close(fd)


def make_directory(path: Path) -> None:
    """Its parent exists; it may exist too. One that is made survives a power loss. Raises Foreign, OSError."""
    with directory(path.parent) as parent, suppress(FileExistsError):
        os.mkdir(path.name, 0o750, dir_fd=parent)
        files.sync_at(parent)
    with directory(path):
        pass


def open_file(path: Path, flags: int, *, own: bool) -> int:
    """A plain file, made with mode 0600 where `flags` say so. `own`: it must have no second name, since a hard link
    to somebody else's file would be written through. Never waits for the other end of a pipe. Raises Foreign, OSError.
    """
    with directory(path.parent) as parent:
        try:
            fd = os.open(path.name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600, dir_fd=parent)
        except OSError as e:
            if e.errno in (errno.ELOOP, errno.ENXIO):
                raise Foreign(path, "a link or a special file") from None
            raise OSError(e.errno, e.strerror, str(path)) from None
    try:
        info = os.fstat(fd)
        if stat.S_ISDIR(info.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(info.st_mode):
            raise Foreign(path, "a special file")
        if own and info.st_nlink > 1:
            raise Foreign(path, "a file with a second name (hard link)")
    except BaseException:
        os.close(fd)
        raise
    return fd


def read(path: Path, limit: int) -> bytes | None:
    """The whole file; None when it is absent. Raises Foreign (also for more than `limit` bytes), OSError."""
    try:
        fd = open_file(path, os.O_RDONLY, own=False)
    except FileNotFoundError:
        return None
    with os.fdopen(fd, "rb", buffering=0) as file:
        left = os.fstat(fd).st_size
        if left > limit:
            raise Foreign(path, f"a file of more than {limit} bytes")
        pieces = []
        while left and (piece := file.read(left)):
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)


def read_into(path: Path, memory: memoryview) -> bool:
    """Whether the file is there and fills the memory, no more and no less. Raises Foreign, OSError."""
    try:
        fd = open_file(path, os.O_RDONLY, own=False)
    except FileNotFoundError:
        return False
    with os.fdopen(fd, "rb", buffering=0) as file:
        if os.fstat(fd).st_size != len(memory):
            return False
        filled = 0
        while filled < len(memory) and (n := file.readinto(memory[filled:])):
            filled += n
    return filled == len(memory)


def publish(path: Path, data: bytes | bytearray | memoryview, mode: int) -> None:
    """As `files.publish`, in a directory that exists; whatever has the name is replaced, a directory excepted."""
    with directory(path.parent) as parent:
        files.publish_at(parent, path.name, data, mode)


def rename(source: Path, target: Path) -> None:
    with directory(source.parent) as old, directory(target.parent) as new:
        os.rename(source.name, target.name, src_dir_fd=old, dst_dir_fd=new)


def sync(path: Path) -> None:
    with directory(path) as fd:
        files.sync_at(fd)


def remove(path: Path) -> None:
    """A file, a link (not what it names) or a tree; absent is well. Raises Foreign, OSError."""
    with suppress(FileNotFoundError), directory(path.parent) as parent:
        if stat.S_ISDIR(os.stat(path.name, dir_fd=parent, follow_symlinks=False).st_mode):
            shutil.rmtree(path.name, dir_fd=parent)
        else:
            os.unlink(path.name, dir_fd=parent)


def remove_if_empty(path: Path) -> None:
    """A directory; one with anything in it stays. Raises Foreign, OSError."""
    with directory(path.parent) as parent:
        try:
            os.rmdir(path.name, dir_fd=parent)
        except OSError as e:
            if e.errno != errno.ENOTEMPTY:
                raise


def is_plain(path: Path, *, own: bool) -> bool:
    """Whether this is a file, and (`own`) has no second name; its directory is taken as it is."""
    try:
        info = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(info.st_mode) and (info.st_nlink == 1 or not own)


def content(path: Path) -> dict[str, os.stat_result]:
    """All there is below a directory but real directories, by relative path; links are not followed."""
    found = {}
    for here, folders, names in os.walk(path):
        for name in (*folders, *names):
            each = Path(here) / name
            with suppress(FileNotFoundError):
                info = each.lstat()
                if not stat.S_ISDIR(info.st_mode):
                    found[each.relative_to(path).as_posix()] = info
    return found
