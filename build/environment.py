"""Virtual environments that are made once: shared by agent-env, engine-env and freeze."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 said before the imports below would fail
    sys.exit(f"Python 3.11 or newer is needed; {sys.executable} is {sys.version.split()[0]}")

import fcntl
import hashlib
import json
import os
import subprocess
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def digest(paths: Iterable[Path]) -> str:
    """One hash over names and contents; order does not matter, directories are walked."""
    total = hashlib.sha256()
    files = {f for p in paths for f in (p.rglob("*") if p.is_dir() else [p]) if f.is_file()}
    for path in sorted(f for f in files if "__pycache__" not in f.parts):
        total.update(f"{path.relative_to(ROOT)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(command: list[str], **env: str) -> None:
    """Runs it with its output on our stderr; ends this program when it fails."""
    done = subprocess.run(command, stdout=sys.stderr, cwd=ROOT, env={**os.environ, **env}, check=False)
    if done.returncode:
        sys.exit(f"failed with {done.returncode}: {' '.join(command)}")


def _stamp(directory: Path, packages: list[str], key: str) -> dict[str, Any]:
    return {"packages": packages, "key": key, "python": sys.version.split()[0], "directory": str(directory)}


def made_of(directory: Path) -> dict[str, Any]:
    """The stamp of a complete environment, else empty."""
    try:
        return dict(json.loads((directory / "installed.json").read_text()))
    except (FileNotFoundError, ValueError):
        return {}


def ensure(
    directory: Path,
    packages: list[str],
    *,
    key: str = "",
    flags: Callable[[], list[str]] = list,
    afterwards: Callable[[], None] = lambda: None,
) -> None:
    """A virtual environment with `packages`.

    Its file installed.json says what is in it; when that and `key` are what is wanted, nothing is done. One process at
    a time works on a directory; an interrupted installation leaves no stamp and is taken up again by the next call.
    `flags` (for pip) are asked for only when something is installed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if made_of(directory) == _stamp(directory, packages, key):
            say(f"{directory.name}: complete, nothing to install")
            return
        say(f"{directory.name}: installing {' '.join(packages)}")
        try:
            import ensurepip  # noqa: F401
        except ImportError:
            sys.exit("Python's venv module is incomplete; on Debian and Ubuntu: apt install python3-venv")
        (directory / "installed.json").unlink(missing_ok=True)
        run([sys.executable, "-m", "venv", str(directory)])
        quiet = [] if sys.stderr.isatty() else ["-qq"]
        pip = [str(directory / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", *quiet]
        run([*pip, *flags(), *packages])
        afterwards()
        (directory / "installed.json").write_text(json.dumps(_stamp(directory, packages, key)))
