"""The way to the cache: the running agent's control socket where an agent holds it, the cache's lock otherwise."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import trio

from xim_agent.cache import claim
from xim_agent.cache.admin import Commands
from xim_agent.cache.control import calls
from xim_agent.cache.listing import FORMAT
from xim_agent.cache.service import Cache
from xim_agent.clock import SystemClock
from xim_agent.config.fields import Config
from xim_agent.control import client
from xim_agent.errors import AgentError, Exit
from xim_agent.health import Health

GB = 10**9
# An agent that begins or ends has the lock without a socket for a moment.
PATIENCE = 3.0
AGAIN = 0.2

Report = Callable[[Any], None]


async def reach(config: Config, name: str, arguments: Mapping[str, Any], report: Report) -> Any:
    """What `name` gives. Where there is no cache, `cache/ls` is empty; nothing is created.

    Raises AgentError as the call does, and `cache_absent`, `cache_denied`, `cache_held`, `agent_…` (see the client).
    """
    directory = config.model_cache_path
    try:
        owner = _first(directory / claim.LOCK, directory / claim.MARK)
    except FileNotFoundError:
        return _absent(config, name)
    except NotADirectoryError as e:
        raise AgentError(
            "cache_directory",
            f"the model cache {directory} is no directory",
            hint="name the agent's with --model-cache-path or XEROTIER_AGENT_MODEL_CACHE_PATH",
            exit_code=Exit.STATE,
        ) from e
    except OSError as e:
        raise denied("cache_denied", f"the model cache {directory}", e) from e
    with as_owner(owner):
        return await _ask(config, name, arguments, report)


def _first(*paths: Path) -> os.stat_result:
    """Of the first that is there: somebody may have removed the lock."""
    found = [path for path in paths[:-1] if os.path.lexists(path)]
    return (found or paths[-1:])[0].lstat()


async def _ask(config: Config, name: str, arguments: Mapping[str, Any], report: Report) -> Any:
    directory = config.model_cache_path
    give_up = trio.current_time() + PATIENCE
    while True:
        try:
            return await _here(config, name, arguments, report)
        except AgentError as e:
            if isinstance(e.__cause__, PermissionError) and e.code == "cache_directory":
                raise denied("cache_denied", f"the model cache {directory}", e.__cause__) from e.__cause__
            if e.code != "cache_in_use":
                raise
        holder = claim.holder(directory / claim.LOCK)
        if holder.says not in ("", claim.COMMAND):
            try:
                return await client.call(Path(holder.says), holder.pid, name, arguments, report)
            except AgentError as e:
                if e.code != "agent_unreachable" or trio.current_time() > give_up:
                    raise
        elif trio.current_time() > give_up:
            _held(directory, holder)
        await trio.sleep(AGAIN)


async def _here(config: Config, name: str, arguments: Mapping[str, Any], report: Report) -> Any:
    """Under the cache's lock. Raises AgentError `cache_in_use` while another process has it."""
    clock = SystemClock()
    async with Cache(
        directory=config.model_cache_path,
        max_bytes=int(config.model_cache_max_size_gb * GB),
        downloads=1,
        source=_Nowhere(),
        allow_unsafe=False,
        clock=clock,
        health=Health(clock.now),
        patience=0.0,  # `_ask` has its own: a person waits
    ) as cache:
        claim.announce(cache.store.lock, claim.COMMAND)
        return await calls(Commands(cache, agent=False))[name](arguments, report)


class _Nowhere:
    """No command fetches: one that asks has a bug."""

    async def manifest(self, sha256_hex: str) -> NoReturn:
        raise RuntimeError(f"a command fetches the manifest {sha256_hex}")

    def blob(self, sha256_hex: str, offset: int) -> NoReturn:
        raise RuntimeError(f"a command fetches the chunk {sha256_hex}")


@contextmanager
def as_owner(lock: os.stat_result) -> Iterator[None]:
    """Root acts as the agent's user: what it writes the agent can write, too, and what that user plants gains nothing.

    Inside, no library can be loaded from a one-file program's own directory, which is root's.
    """
    if os.geteuid() != 0 or lock.st_uid == 0:
        yield
        return
    groups, group = os.getgroups(), os.getegid()
    os.setgroups([])
    os.setegid(lock.st_gid)
    os.seteuid(lock.st_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


def _absent(config: Config, name: str) -> dict[str, Any]:
    directory = str(config.model_cache_path)
    if name != "cache/ls":
        raise AgentError(
            "cache_absent",
            f"there is no model cache in {directory}",
            hint="name the agent's with --model-cache-path or XEROTIER_AGENT_MODEL_CACHE_PATH",
            exit_code=Exit.MISSING,
        )
    bound = int(config.model_cache_max_size_gb * GB)
    empty: dict[str, Any] = {"format": FORMAT, "directory": directory, "bound": bound, "used": 0, "reserve": None}
    return empty | {"disk_free": None, "disk_size": None, "tiers": {}, "models": []}


def denied(code: str, what: str, error: OSError) -> AgentError:
    return AgentError(
        code,
        f"uid {os.geteuid()} cannot use {what}: {error.strerror or error}",
        hint="run this as the agent's user or as root",
        exit_code=Exit.STATE,
    )


def _held(directory: Path, holder: claim.Holder) -> NoReturn:
    if holder.says == claim.COMMAND:
        what, hint = "another `cache` command", "wait for it"
    else:
        what, hint = "an agent without a control socket", "it is an older agent or one that just starts: restart it"
    raise AgentError(
        "cache_held",
        f"process {holder.pid}, {what}, holds the model cache {directory}",
        hint=f"{hint}, or end it: `kill {holder.pid}`",
        exit_code=Exit.ALREADY_RUNNING,
    )
