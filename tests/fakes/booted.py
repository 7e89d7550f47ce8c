"""A Debian with a systemd of its own, booted by systemd-nspawn: the only way in which a test may start a systemd."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CGROUPS = Path("/sys/fs/cgroup")
# One name per boot: without cgroups of its own every machine would share one payload group.
ENTER = 'for tree in systemd unified; do echo $$ > /sys/fs/cgroup/$tree/"$0"/cgroup.procs; done; exec "$@"'


class Machine:
    """`root` is the directory that it was booted from, `pid` that of its systemd, `name` that of its cgroups."""

    def __init__(self, root: Path, pid: int, name: str) -> None:
        self.root = root
        self.pid = pid
        self.name = name

    def run(self, *command: str, check: bool = True, text: str = "", seconds: float = 60) -> str:
        """What a command inside prints."""
        done = self.asked(*command, text=text, seconds=seconds)
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def asked(self, *command: str, text: str = "", seconds: float = 60) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["nsenter", "-t", str(self.pid), "-a", "--", *command],
            input=text, capture_output=True, text=True, timeout=seconds, check=False,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "SYSTEMD_PAGER": "cat"},
        )  # fmt: skip

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        lines = self.run("systemctl", "show", "--property=" + ",".join(properties), unit).splitlines()
        return dict(line.split("=", 1) for line in lines)

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(mode)

    def journal(self, unit: str) -> str:
        return self.run("journalctl", "-q", "--no-pager", "-o", "cat", "-u", unit)


def until(what: str, check: Any, seconds: float = 30) -> Any:
    """Polls an outside condition; the bound is a failure with a name, not a synchroniser."""
    end = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        threading.Event().wait(0.05)
    return found


@contextmanager
def booted(root: Path) -> Iterator[Machine]:
    """Boots `root`; at the end nothing of it is left but the files."""
    name = f"xim-{os.getpid()}-{time.monotonic_ns()}"
    for tree in ("systemd", "unified"):
        (CGROUPS / tree / name).mkdir()
    # A test run that is killed takes its machine along.
    command = ["setpriv", "--pdeathsig", "TERM", "systemd-nspawn", "-q", "-D", str(root)]
    command += ["--register=no", "--keep-unit", "--private-network", "-b"]
    with (root.parent / "boot.log").open("wb") as log:
        nspawn = subprocess.Popen(
            ["sh", "-c", ENTER, name, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        machine = Machine(root, until("its systemd", lambda: _child(nspawn.pid)), name)
        state = ("systemctl", "is-system-running")
        ran = lambda: machine.asked(*state).stdout.strip() in ("running", "degraded")  # noqa: E731
        until("it runs", ran)
        yield machine
    finally:
        _end(nspawn)
        for tree in ("systemd", "unified"):
            _remove(CGROUPS / tree / name)


def _child(pid: int) -> int | None:
    with suppress(OSError, ValueError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                return int(child)
    return None


def _end(nspawn: "subprocess.Popen[bytes]") -> None:
    """SIGTERM is a power-off to nspawn; SIGKILL takes the machine along, as its processes are a PID namespace."""
    init = _child(nspawn.pid)
    nspawn.terminate()
    try:
        nspawn.wait(30)
    except subprocess.TimeoutExpired:
        for pid in (init, nspawn.pid):
            if pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        nspawn.wait(10)


def _remove(cgroup: Path) -> None:
    def gone() -> bool:
        for path in sorted((p for p in cgroup.rglob("*") if p.is_dir()), reverse=True):
            with suppress(OSError):
                path.rmdir()
        with suppress(OSError):
            cgroup.rmdir()
        return not cgroup.exists()

    until(f"{cgroup} is empty", gone, 10)
