"""Directories that the agent needs: who owns them, whether it could write there. Blocking; changes nothing."""

import errno
import os
import shlex
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from xim_agent.cache.plan import Limits
from xim_agent.doctor.report import Finding, failure, from_error, ok, warning
from xim_agent.errors import AgentError, Exit

GB = 10**9
# File systems without files that have no name: there the kernel's word must do.
_NAMELESS = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)
_FOREIGN = "it belongs to"
# More than fits into an inode, so that the disk is asked for room.
_PAGE = b"\0" * 4096


def why_unwritable(directory: Path) -> str:
    """Empty when files can be made there. Tried with a file that never gets a name, so that nothing is left of it."""
    try:
        fd = os.open(directory, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in _NAMELESS:
            return error.strerror or str(error)
        return "" if os.access(directory, os.W_OK | os.X_OK) else "Permission denied"
    try:
        os.write(fd, _PAGE)
        return ""
    except OSError as error:
        return error.strerror or str(error)
    finally:
        os.close(fd)


def nearest(path: Path) -> Path:
    """The path, or what there is of it. Raises OSError when that cannot be found out."""
    for place in (path, *path.parents):
        try:
            place.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        return place
    return Path("/")


def state(directory: Path, load: Callable[[], object]) -> Finding:
    """`load` raises AgentError for a state directory that cannot be used, as the agent's own store does."""
    me, quoted = os.geteuid(), shlex.quote(str(directory))
    make = f"`install -d -m 700 -o {me} {quoted}`"
    try:
        there = nearest(directory)
        load()
        if there != directory:
            if why := why_unwritable(there):
                text = f"{directory} does not exist and uid {me} cannot make it in {there}: {why}"
                return failure("state", text, make, Exit.STATE)
            return ok("state", f"{directory} does not exist yet; the first start makes it")
        if why := why_unwritable(directory):
            cure = f"`chown -R {me} {quoted} && chmod -R u+rwX {quoted}`, or make room and the file system writable"
            return failure("state", f"uid {me} cannot write to {directory}: {why}", cure, Exit.STATE)
        info = directory.stat()
    except AgentError as error:
        return from_error("state", error)
    except OSError as error:
        return failure("state", f"cannot look at {directory}: {error.strerror}", f"`namei -l {quoted}`", Exit.STATE)
    return ok("state", f"{directory}, of uid {info.st_uid}, mode {stat.S_IMODE(info.st_mode):o}")


def sockets(engine: Path | None, places: Sequence[Path], fits: Callable[[Path], bool], longest: int) -> Finding:
    """The runtime directory that a start would choose: the first of `places` that is short (`fits`) and can be used.

    `engine`: the engine's socket where the operator has named it; `longest` in bytes, of a path.
    """
    if engine is not None:
        rename = "set XEROTIER_AGENT_VLLM_SOCKET_PATH to a short path in a writable directory"
        if (size := len(os.fsencode(engine))) > longest:
            return failure("sockets", f"the socket path {engine} has {size} bytes, {longest} are possible", rename)
        if why := why_unwritable(engine.parent):  # vLLM makes no directory
            return failure("sockets", f"there can be no socket {engine}: {why}", rename)
    wrong = {
        place: _unusable(place) if fits(place) else f"it leaves no room for names in {longest} bytes"
        for place in places
    }
    chosen = next((place for place, why in wrong.items() if not why or why.startswith(_FOREIGN)), None)
    if chosen is None:
        text = "no place for the sockets: " + "; ".join(f"{place}: {why}" for place, why in wrong.items())
        cure = "set XDG_RUNTIME_DIR or RUNTIME_DIRECTORY to a short, writable directory"
        return failure("sockets", text, cure, Exit.STATE)
    if wrong[chosen]:  # the agent does not go on to the next one then: that a stranger was there first is no accident
        cure = f"remove it, or set RUNTIME_DIRECTORY to a directory of uid {os.geteuid()}"
        return failure("sockets", f"{chosen}: {wrong[chosen]}", cure, Exit.STATE)
    if chosen != places[0]:
        text = f"{places[0]}: {wrong[places[0]]}; {chosen} is used instead"
        return warning("sockets", text, "set RUNTIME_DIRECTORY or XDG_RUNTIME_DIR to a short, writable directory")
    return ok("sockets", f"in {chosen}, paths of at most {longest} bytes")


def _unusable(directory: Path) -> str:
    """Why it cannot hold our sockets; empty when it can, or can be made."""
    try:
        there = nearest(directory)
        if there != directory:
            return f"it cannot be made in {there}: {why}" if (why := why_unwritable(there)) else ""
        info = directory.lstat()
    except OSError as error:
        return error.strerror or str(error)
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
        return f"{_FOREIGN} uid {info.st_uid}, not to {os.geteuid()}"
    return why_unwritable(directory)


def cache(directory: Path, limits: Limits, used: int, elsewhere: tuple[str, ...]) -> Finding:
    """`used` and `elsewhere` (parts on other file systems) as the cache tells; both empty when there is none yet."""
    quoted = shlex.quote(str(directory))
    there = nearest(directory)
    if why := why_unwritable(there):
        owner = f"`chown -R {os.geteuid()} {quoted}`"
        if there != directory:
            owner = f"`install -d -o {os.geteuid()} {quoted}`"
        text = f"uid {os.geteuid()} cannot write to {there}: {why}"
        return failure("cache", text, f"{owner}, or make room and the file system writable", Exit.STATE)
    if elsewhere:
        text = f"{', '.join(elsewhere)} in {directory} lie on another file system; files are moved between them"
        return failure("cache", text, "mount one file system at the directory itself", Exit.STATE)
    room = limits.disk_free + used - limits.reserve
    size = f"{_gb(used)} of {_gb(limits.bound)} used, {_gb(limits.disk_free)} free on its disk"
    move = "set XEROTIER_AGENT_MODEL_CACHE_PATH to a larger disk, free space"
    if room <= 0:
        text = f"{directory}: {size}, of which {_gb(limits.reserve)} are left to others: there is room for no model"
        return failure("cache", text, move, Exit.STATE)
    if room < limits.bound:
        text = f"{directory}: {size}: it can grow to {_gb(room)} only, because {_gb(limits.reserve)} are left to others"
        cure = f"{move}, or set XEROTIER_AGENT_MODEL_CACHE_MAX_SIZE_GB={max(1, room // GB)}"
        return warning("cache", text, cure)
    return ok("cache", f"{directory}: {size}")


def _gb(size: int) -> str:
    return f"{size / GB:.1f} GB"
