"""A memory cgroup of our own, of version 2 or 1, where this machine lets us make one."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


def _made(limit: int) -> Path | None:
    own = dict(reversed(line.split(":", 2)[1:]) for line in Path("/proc/self/cgroup").read_text().splitlines())
    paths = {controllers: path.lstrip("/") for path, controllers in own.items()}
    v2, v1 = paths.get(""), paths.get("memory")
    places = [(base / path, "memory.max") for base in (ROOT, ROOT / "unified") for path in ("", v2) if path is not None]
    places += [(ROOT / "memory" / path, "memory.limit_in_bytes") for path in (v1, "") if path is not None]
    for parent, file in places:
        if not (parent / "cgroup.procs").exists():  # a mount point's tmpfs
            continue
        made = parent / f"xim-test-{os.getpid()}-{time.monotonic_ns()}"
        try:
            made.mkdir()
        except OSError:
            continue
        try:
            with (made / file).open("r+") as control:
                control.write(str(limit))
        except OSError:  # no memory controller down here
            made.rmdir()
            continue
        for swap in ("memory.swap.max", "memory.memsw.limit_in_bytes"):
            with suppress(OSError), (made / swap).open("r+") as control:
                control.write("0" if swap == "memory.swap.max" else str(limit))
        return made
    return None


@contextmanager
def memory_limit(limit: int) -> Iterator[list[str]]:
    """What to put before a command so that it runs within `limit` bytes; empty where no cgroup can be made."""
    made = _made(limit)
    try:
        yield ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(made / "cgroup.procs")] if made else []
    finally:
        for _ in range(100 if made else 0):
            with suppress(OSError):  # until the last process has been reaped
                made.rmdir()  # type: ignore[union-attr]
                break
            time.sleep(0.05)
