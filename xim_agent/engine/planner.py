"""Gathers what a plan needs from this machine: launcher, model files, directories, the flags that vLLM knows."""

import fcntl
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import trio

from xim_agent.assignment.plan import EngineTarget
from xim_agent.config.fields import Config
from xim_agent.engine import launcher
from xim_agent.engine.arguments import known_flags
from xim_agent.engine.command import Places, Plan, plan
from xim_agent.engine.environment import child_environment
from xim_agent.engine.guard import Guard
from xim_agent.engine.leftovers import Leftovers
from xim_agent.engine.model import read_model
from xim_agent.engine.process import output_of
from xim_agent.errors import AgentError, Exit
from xim_agent.hardware.report import Hardware

log = logging.getLogger("xim_agent.engine")

LOCK_SECONDS = 20.0  # another agent's guard needs at most 10 to clean up
MAX_SOCKET_PATH = 100


class NoPlace(AgentError):
    """The runtime directory cannot be used now; it may be later."""

    def __init__(self, directory: Path, error: OSError) -> None:
        super().__init__(
            "runtime_directory",
            f"{directory} cannot hold the engine's sockets: {error}",
            hint="free it, or set RUNTIME_DIRECTORY to a short, writable directory",
            exit_code=Exit.STATE,
        )


# Returns when there is something to run on.
Usable = Callable[[], Awaitable[Hardware]]


def always(hardware: Hardware) -> Usable:
    async def usable() -> Hardware:
        await trio.lowlevel.checkpoint()
        return hardware

    return usable


def places(config: Config, runtime: Path, program: str, directory: Path, caches: Path) -> Places:
    """`runtime`: the agent's runtime directory. Nothing is made."""
    socket = str(config.vllm_socket_path or runtime / "engine.sock")
    return Places(program, str(directory), socket, str(runtime / "t"), str(caches))


def flags_of(runtime: Path, program: Path) -> frozenset[str] | None:
    """What this vLLM was asked for earlier; None when it has not been. Raises OSError when it cannot be reached."""
    return launcher.load_flags(runtime / "flags.json", program)


class Planner:
    """`runtime`: 0700, of this agent alone, short: sockets lie in it. `compile_cache`: vLLM's version → a directory."""

    def __init__(
        self, config: Config, hardware: Usable, guard: Guard, runtime: Path, compile_cache: Callable[[str], Path]
    ) -> None:
        self._config, self._hardware, self._guard, self.runtime = config, hardware, guard, runtime
        self._compile_cache = compile_cache
        self.socket = str(config.vllm_socket_path or runtime / "engine.sock")
        self._scratch = runtime / "t"
        self._locked: tuple[int, int] | None = None  # device and inode of the lock that the guard holds

    async def plan(self, target: EngineTarget) -> Plan:
        """Waits while the GPUs that it is for cannot be used.

        Raises AgentError as `command.plan` does, and socket_path_too_long, launcher_missing, model_unreadable,
        engine_place (launcher or compile caches cannot be reached on the disk)."""
        if len(os.fsencode(self.socket)) > MAX_SOCKET_PATH:
            raise AgentError(
                "socket_path_too_long",
                f"{self.socket} is longer than {MAX_SOCKET_PATH} bytes",
                hint="set XEROTIER_AGENT_VLLM_SOCKET_PATH to a shorter path",
                exit_code=Exit.CONFIG,
            )
        program = launcher.find(self._config.vllm_path, os.environ)
        model = await trio.to_thread.run_sync(read_model, target.directory)
        try:
            caches = self._compile_cache(launcher.version(program))
        except OSError as error:
            raise AgentError(
                "engine_place",
                f"vLLM's launcher or its compile caches cannot be reached: {error}",
                hint="look at VLLM_PATH, and at space and permissions of MODEL_CACHE_PATH",
                exit_code=Exit.STATE,
            ) from error
        there = places(self._config, self.runtime, str(program), target.directory, caches)
        known, bitsandbytes = flags_of(self.runtime, program), launcher.has_bitsandbytes(program)
        return plan(self._config, target.assignment, await self._hardware(), model, there, known, bitsandbytes)

    async def learn_flags(self, made: Plan) -> bool:
        """vLLM did not know a flag: asks it, once an installation, for its list. True: plan again, with that list.

        Not asked before, because `vllm serve --help=all` takes 10 to 30 s of CPU on two cores, more than it saves: a
        start that succeeds has proven its flags.
        """
        program = Path(made.argv[0])
        if flags_of(self.runtime, program) is not None:
            return False
        log.info("asking vLLM for the flags it knows")
        command = [str(program), "serve", "--help=all"]
        try:
            text = await output_of(self._guard, command, self.environment(made), Leftovers(self.notes))
        except OSError:  # the next start meets it too, and tells
            return False
        flags = known_flags(text)
        if "--uds" not in flags:
            return False
        launcher.save_flags(self.runtime / "flags.json", program, flags)
        return True

    def environment(self, made: Plan) -> dict[str, str]:
        return child_environment(os.environ, made.env, getattr(sys, "_MEIPASS", None))

    @property
    def notes(self) -> str:
        """Where it is noted what an engine leaves behind."""
        return str(self.runtime / "leftovers.json")

    async def clean(self) -> Leftovers:
        """The place is as if no engine had run here (over a stale socket vLLM does not start). Call with none alive.

        Made again when somebody removed it. Raises AgentError as `own_runtime` does.
        """
        await self.own_runtime()
        try:
            self._scratch.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise NoPlace(self.runtime, error) from error
        if gone := Leftovers.load(self.notes).sweep():
            log.info("swept what an earlier engine left", extra={"paths": gone})
        left = Leftovers(self.notes, [self.socket], [str(self._scratch)])
        left.sweep()
        return left

    async def own_runtime(self) -> None:
        """Takes the lock of the runtime directory, and gives it to the guard, who keeps it until all is clean.

        Waits for the guard of an agent that was killed a moment ago. Done before, and the lock still there: nothing.
        Raises NoPlace, and AgentError `runtime_directory_in_use`.
        """
        path = self.runtime / "engine.lock"
        with suppress(OSError):
            if self._locked == _inode(path.stat()):
                return
        try:
            self.runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise NoPlace(self.runtime, error) from error
        until = trio.current_time() + LOCK_SECONDS
        try:
            while not _locked(lock):
                if trio.current_time() > until:
                    raise AgentError(
                        "runtime_directory_in_use",
                        f"another agent's engine runs in {self.runtime}",
                        hint="give each agent its own CONFIG_PATH or RUNTIME_DIRECTORY",
                        exit_code=Exit.ALREADY_RUNNING,
                    )
                await trio.sleep(0.1)
            await self._guard.hold(lock)
            self._locked = _inode(os.fstat(lock))
        finally:
            os.close(lock)


def _inode(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
