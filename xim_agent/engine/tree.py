"""The engine's process tree as /proc shows it: who belongs to it and how busy it is.

Used by the guard after its fork, so nothing here imports anything late (the bundle's files may be gone by then).
"""

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Proc:
    pid: int
    parent: int
    state: str
    cpu_seconds: float  # its own and that of children it has waited for
    started: int  # clock ticks since boot; with the pid it names a process for good


def process(pid: int) -> Proc | None:
    """None when there is no such process (any more)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return None
    f = text[text.rindex(b")") + 2 :].split()  # the name before it may hold spaces and brackets
    return Proc(pid, int(f[1]), f[0].decode(), sum(map(int, f[11:15])) / TICKS, int(f[19]))


def descendants(root: int) -> list[Proc]:
    """Every living process below `root`, no zombies. One walk of /proc: complete only when nobody forks meanwhile."""
    with os.scandir("/proc") as entries:
        found = [p for entry in entries if entry.name.isdigit() and (p := process(int(entry.name)))]
    below: dict[int, list[Proc]] = {}
    for p in found:
        below.setdefault(p.parent, []).append(p)
    tree: list[Proc] = []
    todo = [root]
    while todo:
        children = below.get(todo.pop(), [])
        tree += [p for p in children if p.state not in "ZX"]
        todo += [p.pid for p in children]
    return tree


def cpu_seconds(root: int) -> float:
    """CPU time of `root` and everything below it so far; only its growth means something."""
    own = process(root)
    return sum(p.cpu_seconds for p in descendants(root)) + (own.cpu_seconds if own else 0.0)


class Usage:
    """CPU use of what is below `root`, without itself: of vLLM's API server, the engine core and its workers."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._then: tuple[float, float] | None = None

    def share(self, now: float) -> float:
        """Cores used since the last call, `now` in seconds of a monotonic clock; 0 at the first. Blocking, some ms."""
        used = sum(p.cpu_seconds for p in descendants(self._root))
        then, self._then = self._then, (now, used)
        return (used - then[1]) / (now - then[0]) if then and now > then[0] else 0.0


def send(pids: Iterable[int], signum: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signum)
