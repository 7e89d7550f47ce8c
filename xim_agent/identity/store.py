"""`enrollment.json` on disk: private, replaced atomically, one agent at a time (wire-protocol §3.5)."""

import errno
import os
import shlex
import stat
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import trio

from xim_agent import files
from xim_agent.errors import AgentError, Exit
from xim_agent.identity.claims import TokenRefused
from xim_agent.identity.jose import JoseError
from xim_agent.identity.rotation import FORMAT, State
from xim_agent.log import hide

FILE = "enrollment.json"
LOCK = "enrollment.lock"
MAX_BYTES = 4 * 1024 * 1024
_AND_ENROLL = "and start with a new join key"


class _Version(msgspec.Struct):
    version: int


class StateStore:
    """The state directory, locked until `close`.

    The lock is a flock, so it goes with the process, however that ends; who is given a copy of the descriptor `lock`
    (or is forked later without exec) keeps the directory locked for as long.
    """

    def __init__(self, directory: Path, lock: int) -> None:
        self.directory = directory
        self.path = directory / FILE
        self.lock = lock

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Makes the directory (0700) when it is missing, and locks it.

        Raises AgentError `already_running` (exit 14, with the other's pid), or `state_mode`, `state_owner`,
        `state_unreadable` (exit 77). Nothing in an existing directory is changed.
        """
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check(directory, directory.stat(), "700")
            return cls(directory, files.lock(directory / LOCK, 0o600))
        except files.Held as held:
            raise AgentError(
                "already_running",
                f"another agent with pid {held.pid} uses {directory}",
                hint="stop it, or give this one its own directory with XEROTIER_AGENT_CONFIG_PATH",
                exit_code=Exit.ALREADY_RUNNING,
            ) from None
        except OSError as error:
            raise _unusable("state_unreadable", f"cannot use {directory}", directory, error) from None

    @classmethod
    def look(cls, directory: Path) -> State | None:
        """What is there; nothing is made or locked. A directory that is missing holds no state.

        Raises AgentError as `open` and `load`, but for the lock.
        """
        try:
            _check(directory, directory.stat(), "700")
            if not directory.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "it is no directory", str(directory))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unusable("state_unreadable", f"cannot use {directory}", directory, error) from None
        return cls(directory, -1).load()

    def close(self) -> None:
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def load(self) -> State | None:
        """None when there is no state yet. Raises AgentError, exit 77, with the cure as hint; changes nothing."""
        try:
            # Not waiting for the other end of a pipe, should it be one.
            fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unreadable(error) from None
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, "it is no regular file", str(self.path))
            _check(self.path, status, "600")
            return self._decode(os.read(fd, MAX_BYTES))
        except OSError as error:
            raise self._unreadable(error) from None
        finally:
            os.close(fd)

    def _unreadable(self, error: OSError) -> AgentError:
        return _unusable("state_unreadable", f"cannot use {self.path}", self.directory, error)

    def _unwritable(self, path: Path, error: OSError) -> AgentError:
        return _unusable("state_write_failed", f"cannot write {path}", self.directory, error)

    def _decode(self, data: bytes) -> State:
        path = shlex.quote(str(self.path))
        try:
            version = msgspec.json.decode(data, type=_Version).version
            if version == FORMAT:
                state = msgspec.json.decode(data, type=State)
                state.check()
                hide(state.key, kind="private key")
                return state
            reason = f"its format {version} is {'older' if version < FORMAT else 'newer'} than this agent's ({FORMAT})"
            code = "state_version"
            hint = f"run the version of the agent that wrote it, or `mv {path} {path}.format{version}` {_AND_ENROLL}"
        except (msgspec.MsgspecError, UnicodeDecodeError, JoseError, TokenRefused) as error:
            reason = f"it is damaged: {error}"
            code = "state_corrupt"
            hint = f"restore it from a backup, or `mv {path} {path}.damaged` {_AND_ENROLL}"
        raise AgentError(code, f"{self.path} cannot be used: {reason}", hint=hint, exit_code=Exit.STATE)

    async def save(self, state: State) -> None:
        """Durable when it returns. Raises AgentError `state_write_failed`, exit 77; the old state is whole then.

        Cancellation waits for the write: afterwards the file holds either the old state or the new one.
        """
        hide(state.key, kind="private key")
        await trio.to_thread.run_sync(self._save, _encoded(state))

    def _save(self, data: bytes) -> None:
        temporary = self.directory / f"{FILE}.new"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                os.fchmod(fd, 0o600)
                file.write(data)
                file.flush()
                os.fsync(fd)
            temporary.replace(self.path)
            self._sync_directory()
        except OSError as error:
            with suppress(OSError):  # what is half written must not fill the disk further
                temporary.unlink()
            raise self._unwritable(self.path, error) from None

    async def set_aside(self, suffix: str, instead: State | None) -> Path:
        """Keeps the state, which is of no use any more, under a name of its own, and returns its path.

        `instead` takes its place; None: nothing does. A crash leaves the old state, beside its copy or not.
        """
        return await trio.to_thread.run_sync(self._set_aside, suffix, instead)

    def _set_aside(self, suffix: str, instead: State | None) -> Path:
        names = (f"{FILE}.{suffix}", *(f"{FILE}.{suffix}.{n}" for n in range(2, 1000)))
        target = self.directory / next(name for name in names if not (self.directory / name).exists())
        try:
            target.hardlink_to(self.path)
            if instead is None:
                self.path.unlink()
            self._sync_directory()
        except FileNotFoundError:
            return target
        except OSError as error:
            raise self._unwritable(target, error) from None
        if instead is not None:
            self._save(_encoded(instead))
        return target

    def _sync_directory(self) -> None:
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _encoded(state: State) -> bytes:
    return msgspec.json.format(msgspec.json.encode(state))


def _check(path: Path, status: os.stat_result, mode: str) -> None:
    """Refuses what others could read or have written: it holds the private key."""
    quoted = shlex.quote(str(path))
    if status.st_uid != os.geteuid():
        message = f"{path} belongs to uid {status.st_uid}, this process runs as {os.geteuid()}"
        hint = f"`chown -R {os.geteuid()} {quoted}`, or run the agent as uid {status.st_uid}"
        raise AgentError("state_owner", message, hint=hint, exit_code=Exit.STATE)
    if stat.S_IMODE(status.st_mode) & 0o077:
        message = f"{path} has mode {stat.S_IMODE(status.st_mode):o}: others could reach the private key"
        raise AgentError("state_mode", message, hint=f"`chmod {mode} {quoted}`", exit_code=Exit.STATE)


def _unusable(code: str, what: str, directory: Path, error: OSError) -> AgentError:
    """`directory`: of the state; the error may name a file in it."""
    return AgentError(code, f"{what}: {error.strerror}", hint=_cure(directory, error), exit_code=Exit.STATE)


def _cure(directory: Path, error: OSError) -> str:
    """The command that helps, as far as one can know it from here."""
    known = next(p for p in (directory, *directory.absolute().parents) if _is_there(p))
    mount = next(p for p in (known, *known.absolute().parents) if p.is_mount() or p == p.parent)
    quoted, there, uid = shlex.quote(str(directory)), shlex.quote(str(known)), os.geteuid()
    file = Path(error.filename) if isinstance(error.filename, str) else directory
    if known == directory:
        owner = f"`chown -R {uid} {quoted} && chmod -R u+rwX {quoted}`"
    else:  # never chown what is above
        owner = f"`install -d -m 700 -o {uid} {quoted}`; which directory is closed to uid {uid}: `namei -l {quoted}`"
    return {
        errno.EACCES: owner,
        errno.EPERM: owner,
        errno.EROFS: f"`mount -o remount,rw {shlex.quote(str(mount))}` (a unit of systemd: ReadWritePaths={quoted}; "
        "a container: a volume), or set XEROTIER_AGENT_CONFIG_PATH elsewhere",
        errno.ENOSPC: f"free space on the file system of {mount}: `df -h {there}`, `du -xh {shlex.quote(str(mount))}`",
        errno.EDQUOT: f"free some of the quota of uid {uid}: `quota`, `du -xh {there}`",
        errno.ELOOP: f"{file} is a symbolic link, which is not followed: `{_without_link(file)}`",
        errno.EISDIR: f"{file} is no regular file: `mv {shlex.quote(str(file))} {shlex.quote(f'{file}.aside')}`",
        errno.ENOTDIR: f"{known} is no directory: `mv {there} {there}.aside`",
        errno.EEXIST: f"{known} is no directory: `mv {there} {there}.aside`",
    }.get(error.errno or 0, f"see `ls -ld {there}`; the file system may be damaged: `dmesg | tail`")


def _without_link(file: Path) -> str:
    """The state itself is worth keeping; a lock or what was half written is not."""
    quoted = shlex.quote(str(file))
    return f"cp --remove-destination $(readlink -f {quoted}) {quoted}" if file.name == FILE else f"rm {quoted}"


def _is_there(path: Path) -> bool:
    with suppress(OSError):
        path.lstat()
        return True
    return False
