"""Who may use a cache directory: one process at a time, and only an agent that knows its format."""

import errno
import fcntl
import os
import shlex
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from xim_agent import files
from xim_agent.cache import tree
from xim_agent.errors import AgentError, Exit

FORMAT = "1"
LOCK = "lock"
MARK = "FORMAT"
SILENT_SECONDS = 2.0  # within these a holder has said what it is, unless it is an older agent
COMMAND = "command"  # what holds the lock for a moment is a command of an operator, not an agent


def hold(root: Path) -> int:
    """The descriptor that holds the kernel's lock on the directory itself: whoever deletes or replaces the lock file
    lets no second process in.

    Raises AgentError `cache_in_use`, OSError.
    """
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if isinstance(error, BlockingIOError):
            raise _in_use(root / LOCK, holder(root / LOCK).pid) from None
        raise
    return fd


def _in_use(path: Path, pid: str) -> AgentError:
    since = files.modified(path)
    when = f", since {datetime.fromtimestamp(since, UTC):%Y-%m-%dT%H:%M:%SZ}" if since else ""
    return AgentError(
        "cache_in_use",
        f"the model cache {path.parent} is used by another agent, process {pid}{when}",
        hint="give each agent on this host its own XEROTIER_AGENT_MODEL_CACHE_PATH",
        exit_code=Exit.ALREADY_RUNNING,
    )


def lock(path: Path) -> int:
    """The descriptor that holds the lock, until it is closed or the process ends.

    Raises AgentError `cache_in_use`, `cache_foreign`, OSError.
    """
    try:
        return files.lock(path, 0o640)
    except files.Held as held:
        raise _in_use(path, held.pid) from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO):
            raise tree.Foreign(path, "not a plain file with one name") from None
        raise


@dataclass(frozen=True)
class Holder:
    """Who wrote the lock file last. `says`: the control socket of an agent, `COMMAND`, or nothing yet."""

    pid: str
    says: str


def announce(lock: int, says: str) -> None:
    """Tells those who find the lock held where to ask. `lock`: the descriptor that holds it."""
    os.pwrite(lock, f"{os.getpid()}\n{says}\n".encode(), 0)


def holder(path: Path) -> Holder:
    """Raises AgentError `cache_foreign`, OSError."""
    data = tree.read(path.parent.resolve() / path.name, 4096) or b""
    pid, _, says = data.decode(errors="surrogateescape").partition("\n")
    return Holder(pid.strip() or "unknown", says.strip())


def check_ours(root: Path, folders: Iterable[str]) -> None:
    """What is in `folders` and none of ours is removed when a cache is opened, so that they must have been made by one:
    other programs keep their models in `blobs` and `manifests`, too.

    Raises AgentError `cache_format`, OSError.
    """
    if os.path.lexists(root / MARK) or os.path.lexists(root / LOCK):
        return
    for name in folders:
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(root / name) as entries:
            if next(entries, None) is not None:
                raise AgentError(
                    "cache_format",
                    f"{root} is no model cache of this agent, but something is in its {name}/, which would be removed",
                    hint="name an empty or a new directory with XEROTIER_AGENT_MODEL_CACHE_PATH; if it was a cache and "
                    f"lost its file {MARK}: `echo {FORMAT} > {shlex.quote(str(root / MARK))}`",
                    exit_code=Exit.STATE,
                )


def check_format(path: Path) -> None:
    """Raises AgentError `cache_format`, `cache_foreign`, OSError."""
    data = tree.read(path, 4096)
    if data is None:
        tree.publish(path, FORMAT.encode(), 0o640)
    else:
        known_format(path.parent, data)


def known_format(root: Path, data: bytes) -> None:
    """`data`: of the mark. Raises AgentError `cache_format`."""
    if (found := data.decode(errors="replace").strip()) != FORMAT:
        raise AgentError(
            "cache_format",
            f"{root} has the cache format {found[:20]!r}, this agent knows {FORMAT}",
            hint="use another XEROTIER_AGENT_MODEL_CACHE_PATH or a newer agent",
            exit_code=Exit.STATE,
        )
