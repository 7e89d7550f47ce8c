"""Who may use a cache directory: one process at a time, and only an agent that knows its format."""

import fcntl
import os
from pathlib import Path

from xim_agent.cache import files
from xim_agent.errors import AgentError, Exit

FORMAT = "1"


def lock(path: Path) -> int:
    """The descriptor that holds the lock, until it is closed or the process ends. Raises AgentError `cache_in_use`."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
        os.close(fd)
        raise AgentError(
            "cache_in_use",
            f"the model cache {path.parent} is used by another agent, process {holder or 'unknown'}",
            hint="give each agent on this host its own XEROTIER_AGENT_MODEL_CACHE_PATH",
            exit_code=Exit.ALREADY_RUNNING,
        ) from e
    os.ftruncate(fd, 0)
    os.pwrite(fd, b"%d\n" % os.getpid(), 0)
    return fd


def check_format(path: Path) -> None:
    if not path.exists():
        files.publish(path, FORMAT.encode(), 0o640)
    elif (found := path.read_text(errors="replace").strip()) != FORMAT:
        raise AgentError(
            "cache_format",
            f"{path.parent} has the cache format {found[:20]!r}, this agent knows {FORMAT}",
            hint="use another XEROTIER_AGENT_MODEL_CACHE_PATH or a newer agent",
            exit_code=Exit.STATE,
        )
