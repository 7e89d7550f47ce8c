"""Who may use a cache directory: one process at a time, and only an agent that knows its format."""

from pathlib import Path

from xim_agent import files
from xim_agent.errors import AgentError, Exit

FORMAT = "1"


def lock(path: Path) -> int:
    """The descriptor that holds the lock, until it is closed or the process ends. Raises AgentError `cache_in_use`."""
    try:
        return files.lock(path, 0o640)
    except files.Held as held:
        raise AgentError(
            "cache_in_use",
            f"the model cache {path.parent} is used by another agent, process {held.pid}",
            hint="give each agent on this host its own XEROTIER_AGENT_MODEL_CACHE_PATH",
            exit_code=Exit.ALREADY_RUNNING,
        ) from None


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
