"""Where sockets live: a 0700 directory of this agent alone, short enough for a Unix socket address."""

import hashlib
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from xim_agent.errors import AgentError, Exit

# sun_path holds 108 bytes with its final NUL; vLLM and ZeroMQ add names of their own below the directory.
MAX_SOCKET_PATH = 100
_LONGEST_NAME = len("/engine.sock") + 36


def control_name(cache: Path) -> str:
    """Name of the control socket of the agent that has this cache; agents may be given one directory for them all."""
    info = cache.stat()
    return f"control-{hashlib.sha256(f'{info.st_dev}:{info.st_ino}'.encode()).hexdigest()[:8]}.sock"


def runtime_places(config_path: Path, environ: Mapping[str, str]) -> list[Path]:
    """Where the runtime directory may be, in the order in which it is looked for."""
    own = hashlib.sha256(str(config_path.absolute()).encode()).hexdigest()[:12]
    places = []
    if given := environ.get("RUNTIME_DIRECTORY", "").split(":")[0]:
        places.append(Path(given))
    if xdg := environ.get("XDG_RUNTIME_DIR", ""):
        places.append(Path(xdg) / "xerotier-xim-agent" / own)
    return [*places, config_path.absolute() / "run", Path("/tmp") / f"xerotier-{os.getuid()}-{own}"]  # noqa: S108


def short_enough(place: Path) -> bool:
    return len(os.fsencode(place)) + _LONGEST_NAME <= MAX_SOCKET_PATH


def expected_runtime_directory(config_path: Path, environ: Mapping[str, str]) -> Path:
    """What `runtime_directory` gives when each place can be used; nothing is made."""
    return next(filter(short_enough, runtime_places(config_path, environ)))


def runtime_directory(config_path: Path, environ: Mapping[str, str]) -> Path:
    """Makes and returns the first usable of $RUNTIME_DIRECTORY, $XDG_RUNTIME_DIR, the config directory, /tmp.

    Raises AgentError (exit 77) when a place exists but belongs to somebody else.
    """
    places = runtime_places(config_path, environ)
    for place in filter(short_enough, places):
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = place.lstat()
        except OSError:
            continue
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise AgentError(
                "runtime_directory",
                f"{place} belongs to uid {found.st_uid}, not to {os.getuid()}",
                hint=f"remove it, or set RUNTIME_DIRECTORY to a directory of uid {os.getuid()}",
                exit_code=Exit.STATE,
            )
        with suppress(OSError):  # a read-only file system
            if stat.S_IMODE(found.st_mode) != 0o700:
                place.chmod(0o700)
            if os.access(place, os.R_OK | os.W_OK | os.X_OK):
                return place
    raise AgentError(
        "runtime_directory",
        f"no place for the sockets: tried {', '.join(map(str, places))}",
        hint="set XDG_RUNTIME_DIR or RUNTIME_DIRECTORY to a short, writable directory",
        exit_code=Exit.STATE,
    )
