"""Kills agents and routers at a chosen operation, and reads off afterwards what is left (failpoints.c, zygote.py)."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
KILLED = -9


def library(directory: Path) -> Path:
    """The compiled failpoints.c; `build/test` sees to it that there is a compiler."""
    made = directory / "failpoints.so"
    if not made.exists():
        source = HERE / "failpoints.c"
        flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wno-nonnull-compare", "-U_FORTIFY_SOURCE"]
        with tempfile.NamedTemporaryFile(dir=directory, delete=False) as fresh:
            subprocess.run(["gcc", *flags, "-o", fresh.name, str(source), "-ldl"], check=True)
        Path(fresh.name).rename(made)
    return made


@dataclass(frozen=True)
class Point:
    """One operation, and what happens at it: `before`, `after`, `torn` or an errno."""

    at: int
    operation: str
    how: str

    def __str__(self) -> str:
        return f"{self.how} {self.at}, {self.operation}"


def points(log: Path) -> list[Point]:
    """Every point of a run that was logged. Before one of several operations of a kind is after the one before it."""
    found, last = [], ""
    for line in log.read_text().splitlines():
        number, operation, what = line.split(" ", 2)
        name = f"{operation} {Path(what).name}"
        hows = [*(["before"] if name != last else []), "after", *(["torn"] if operation in ("write", "send") else [])]
        found += [Point(int(number), name, how) for how in hows]
        last = name
    return found


@dataclass
class Zygote:
    """`start` and `wait` take what zygote.py takes; `errors` is where its children write their last words."""

    process: subprocess.Popen[str]
    errors: Path
    routers: set[int] = field(default_factory=set)

    def _ask(self, **task: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def start_router(self, data: Path, port: int, **fail: Any) -> int:
        pid = int(self._ask(do="start", what="router", data=str(data), port=port, **fail)["pid"])
        self.routers.add(pid)
        return pid

    def end_router(self, pid: int) -> bool:
        """Whether it was dead already."""
        self.routers.discard(pid)
        return bool(self._ask(do="kill", pid=pid)["dead"])

    def agent(self, state: Path, join_key: str | None, **fail: Any) -> int:
        """Runs one to its end: exit code, -9 when it was killed."""
        pid = self._ask(do="start", what="agent", state=str(state), join_key=join_key, **fail)["pid"]
        return int(self._ask(do="wait", pid=pid)["code"])

    def said(self) -> str:
        return self.errors.read_text(errors="replace")[-2000:]


@dataclass
class Frozen:
    """The same with the executable: slower, and from its very start."""

    exe: str
    directory: Path
    routers: dict[int, tuple[subprocess.Popen[bytes], list[psutil.Process]]] = field(default_factory=dict)

    def _env(self, counted: Path, fail: dict[str, Any]) -> dict[str, str]:
        words = {f"XIM_FAIL_{name.upper()}": str(value) for name, value in fail.items()}
        home = {"HOME": str(self.directory), "XIM_FAIL_DIR": str(counted), "LD_PRELOAD": str(library(self.directory))}
        return {name: value for name, value in os.environ.items() if not name.startswith("X")} | home | words

    def start_router(self, data: Path, port: int, **fail: Any) -> int:
        command = [self.exe, "router", "serve", "--listen", f"127.0.0.1:{port}", "--data", str(data)]
        with self.errors.open("ab") as errors:
            popen = subprocess.Popen(command, env=self._env(data, fail), stderr=subprocess.PIPE)
            assert popen.stderr is not None
            while (line := popen.stderr.readline()) and b"listening" not in line:
                errors.write(line)
        family = psutil.Process(popen.pid).children(recursive=True) if popen.poll() is None else []
        self.routers[popen.pid] = popen, family
        return popen.pid

    def end_router(self, pid: int) -> bool:
        popen, family = self.routers.pop(pid)
        dead = popen.poll() is not None
        popen.kill()  # the program behind the bootloader dies with it
        popen.communicate()
        psutil.wait_procs(family, 10)
        return dead

    def agent(self, state: Path, join_key: str | None, **fail: Any) -> int:
        env = {**self._env(state, fail), "XEROTIER_AGENT_CONFIG_PATH": str(state)}
        env |= {"XEROTIER_AGENT_JOIN_KEY": join_key} if join_key else {}
        with self.errors.open("ab") as errors:
            code = subprocess.run([self.exe, "enroll"], env=env, stderr=errors, check=False).returncode
        return KILLED if code == 128 - KILLED else code  # so the bootloader tells it

    @property
    def errors(self) -> Path:
        return self.directory / "frozen.log"

    def said(self) -> str:
        return self.errors.read_text(errors="replace")[-2000:]


@contextmanager
def frozen(exe: Path, directory: Path) -> Iterator[Frozen]:
    made = Frozen(str(exe), directory)
    try:
        yield made
    finally:
        for pid in list(made.routers):
            made.end_router(pid)


@contextmanager
def zygote(directory: Path) -> Iterator[Zygote]:
    errors = directory / "zygote.log"
    env = {**os.environ, "LD_PRELOAD": str(library(directory)), "PYTHONPATH": str(HERE.parent)}
    with errors.open("w") as stderr:
        command = [sys.executable, "-m", "fakes.zygote"]
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
        made = Zygote(process, errors)
        try:
            yield made
        finally:
            for pid in list(made.routers):
                made.end_router(pid)
            assert process.stdin is not None
            process.stdin.close()
            process.wait(10)
            assert process.stdout is not None
            process.stdout.close()
