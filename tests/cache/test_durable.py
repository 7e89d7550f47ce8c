"""What a fetch leaves lasts: its operations, recorded below Python, against the rules of a power loss.

Bytes last once their file was synced, a name once its directory was. One worker, so that the order tells who waits for
whom.
"""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fakes.crash import library

_FETCH = """
import sys
from functools import partial
from pathlib import Path
import trio
from fakes.cache_world import Shelf, library
from xim_agent.backoff import Backoff
from xim_agent.cache import download
from xim_agent.cache.service import Cache
from xim_agent.clock import SystemClock
from xim_agent.health import Health

download.WORKERS = 1
book = library(Path(sys.argv[1]) / "books")["d@1"]
shelf = Shelf(book.blobs, {book.digest: book.data}, lambda text: None)

async def main():
    cache = Cache(directory=Path(sys.argv[1]) / "home/agent/cache", max_bytes=10**9, downloads=8, source=shelf,
                  allow_unsafe=False, clock=SystemClock(), health=Health(lambda: 0.0), rand=lambda: 0.5,
                  backoff=partial(Backoff, 0.001, 0.01))
    async with cache:
        await cache.ensure(book.ref, print)

trio.run(main)
"""


@dataclass
class Disk:
    """What a power loss would take now."""

    names: set[str] = field(default_factory=set)
    dirty: set[str] = field(default_factory=set)
    broken: list[str] = field(default_factory=list)

    def apply(self, operation: str, path: str) -> None:
        parent = path.rpartition("/")[0]
        if operation in ("open", "mkdir", "rename"):
            if operation == "rename":
                self._before_rename(path, parent)
            self.names.add(path)
        elif operation in ("write", "truncate"):
            if path.endswith("/journal"):
                self._nothing("journaled", path, {d for d in self.dirty if d.startswith(f"{parent}/files/")})
            else:
                self.dirty.add(path)
        elif operation == "fsync":
            self.dirty.discard(path)
            self.names = {name for name in self.names if name.rpartition("/")[0] != path}
        elif operation == "unlink":
            self.names.discard(path)

    def _before_rename(self, path: str, parent: str) -> None:
        made = {d for d in self.dirty if d.startswith(f"{parent}/.tmp-")}
        if "/ready/" in path:
            made |= {n for n in self.dirty | self.names if "/partial/" in n and "/files/" in n}
        self._nothing("published", path, made)
        self.names = {n for n in self.names if not n.startswith(f"{parent}/.tmp-")}

    def _nothing(self, what: str, path: str, lost: set[str]) -> None:
        if lost:
            self.broken.append(f"{path} is {what} before {sorted(lost)[0]} lasts")


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """Those of the first start and the first fetch of a cache."""
    root = tmp_path_factory.mktemp("durable").resolve()
    shim = {"LD_PRELOAD": str(library(root)), "XIM_FAIL_DIR": str(root / "home"), "XIM_FAIL_LOG": str(root / "log")}
    (root / "home").mkdir()
    path = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    subprocess.run([sys.executable, "-c", _FETCH, str(root)], env=os.environ | shim | path, check=True)
    lines = (line.split(" ", 2) for line in (root / "log").read_text().splitlines())
    return [(operation, what) for _, operation, what in lines]


def test_a_fetch_leaves_nothing_that_a_power_loss_would_take(operations: list[tuple[str, str]]) -> None:
    assert {operation for operation, _ in operations} >= {"open", "mkdir", "write", "fsync", "rename"}
    assert sum("/journal" in what for operation, what in operations if operation == "write") > 5
    disk = Disk()
    for operation, what in operations:
        disk.apply(operation, what)
    lost = {name for name in disk.names if Path(name).exists() and not name.endswith("/lock")}
    assert (disk.broken, lost) == ([], set())
