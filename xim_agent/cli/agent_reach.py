"""The running agent of this host, found by its model cache; asked over its control socket."""

import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import trio

from xim_agent.cache import claim
from xim_agent.cli import cache_reach
from xim_agent.config.fields import Config
from xim_agent.control import client
from xim_agent.errors import AgentError, Exit

_WHICH = "name the agent's cache with --model-cache-path or XEROTIER_AGENT_MODEL_CACHE_PATH"


async def reach(config: Config, name: str, arguments: Mapping[str, Any], report: Callable[[Any], None]) -> Any:
    """What `name` gives.

    Raises AgentError as the call does, `agent_absent` (exit 1), `agent_denied` (77), `agent_…` (see the client).
    """
    lock = config.model_cache_path / claim.LOCK
    try:
        with cache_reach.as_owner(lock.lstat()):
            return await _ask(lock, name, arguments, report)
    except (FileNotFoundError, NotADirectoryError):
        raise _absent(
            f"no agent has ever used the model cache {lock.parent}", f"start one with `run`, or {_WHICH}"
        ) from None
    except PermissionError as e:
        raise cache_reach.denied("agent_denied", f"the model cache {lock.parent}", e) from None


async def _ask(lock: Path, name: str, arguments: Mapping[str, Any], report: Callable[[Any], None]) -> Any:
    give_up = trio.current_time() + cache_reach.PATIENCE
    while True:
        holder = claim.holder(lock)
        if holder.says not in ("", claim.COMMAND):
            break
        if trio.current_time() > give_up:
            raise _absent(f"no agent runs with the model cache {lock.parent}", f"start it with `run`, or {_WHICH}")
        await trio.sleep(cache_reach.AGAIN)
    socket = Path(holder.says)
    try:
        return await client.call(socket, holder.pid, name, arguments, report)
    except AgentError as e:
        if e.code != "agent_unreachable":
            raise
        raise _unreachable(socket, holder.pid, e) from e


def _unreachable(socket: Path, pid: str, error: AgentError) -> AgentError:
    why = error.__cause__
    while why is not None and not isinstance(why, OSError):
        why = why.__cause__ or why.__context__
    number = why.errno if isinstance(why, OSError) else None
    if number in (errno.EACCES, errno.EPERM):
        return cache_reach.denied(
            "agent_denied", f"the control socket {socket}", PermissionError(number, os.strerror(number))
        )
    if number == errno.ECONNREFUSED:
        what = f"no agent runs: process {pid} was killed and left its control socket {socket} behind"
        return _absent(what, "start it with `run`, which takes the socket's place")
    if number == errno.ENOENT:
        what = f"no agent runs here: the last one, process {pid}, has ended and its control socket {socket} is gone"
        return _absent(what, "start it with `run`; if it runs in a container, ask in there")
    return error


def _absent(what: str, hint: str) -> AgentError:
    return AgentError("agent_absent", what, hint=hint, exit_code=Exit.MISSING)
