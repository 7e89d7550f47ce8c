"""A small file system of its own (tmpfs), which can really be full."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[Path]:
    """`size` in bytes, a multiple of the page. It fails where nothing may be mounted, never goes without."""
    path.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"this test needs a small file system, and cannot mount one: {done.stderr}"
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def used(path: Path) -> int:
    """Allocated bytes of the whole file system, files that are open without a name included."""
    info = os.statvfs(path)
    return (info.f_blocks - info.f_bfree) * info.f_frsize


def fill(file: Path, leave: int) -> None:
    """Takes all free blocks but `leave` bytes."""
    with file.open("ab") as out:
        while (size := _free(file.parent) - leave) > 0:
            with suppress(OSError):  # others write meanwhile
                os.posix_fallocate(out.fileno(), out.tell(), size)
                return


def _free(path: Path) -> int:
    info = os.statvfs(path)
    return info.f_bavail * info.f_frsize


class Operations:
    """What this process changes by file operations, in all its threads; `after` is told of each when it is done."""

    NAMES = ("open", "pwrite", "write", "rename", "mkdir", "unlink", "rmdir", "fsync", "fdatasync", "ftruncate")

    def __init__(self, before: Callable[[str, tuple[Any, ...]], None], after: Callable[[], None]) -> None:
        self.before, self.after = before, after

    def __enter__(self) -> Self:
        self._real = {name: getattr(os, name) for name in self.NAMES}
        for name, real in self._real.items():
            setattr(os, name, self._around(name, real))
        return self

    def _around(self, name: str, real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **options)
            self.before(name, args)
            result = real(*args, **options)
            self.after()
            return result

        return call

    def __exit__(self, *_: object) -> None:
        for name, real in self._real.items():
            setattr(os, name, real)
