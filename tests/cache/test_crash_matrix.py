"""kill -9 and power cuts at every file operation of whatever changes the cache.

Nothing is listed here by hand: each scene is run once and recorded, then killed at each of its operations, and cut at
each of them in every way that fakes/power.py knows. After each, the cache starts, has nothing that is complete in name
only, makes the model without asking the network for what it has, stays within the bound, and verifies. A power cut
takes what was in flight, no more.
"""

import os
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from fakes import power
from fakes.cache_world import Book, Seen, Shelf, library, see

from xim_agent import files
from xim_agent.backoff import Backoff
from xim_agent.cache.admin import Commands
from xim_agent.cache.download import WORKERS
from xim_agent.cache.inventory import Evict
from xim_agent.cache.ledger import Cause
from xim_agent.cache.manifest import CHUNK
from xim_agent.cache.plan import Reserves
from xim_agent.cache.service import Cache
from xim_agent.cache.sweep import FOLDERS
from xim_agent.clock import SystemClock
from xim_agent.health import Health

ROOMY = 10_000_000
DOWNLOADS = 2
KEPT, WANTED, LONG = "a@1", "b@1", "e@1"


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Book]:
    return library(tmp_path_factory.mktemp("library"))


@dataclass
class Bench:
    root: Path
    books: dict[str, Book]
    bound: int = ROOMY

    def __post_init__(self) -> None:
        blobs = {d: b for book in self.books.values() for d, b in book.blobs.items()}
        self.shelf = Shelf(blobs, {b.digest: b.data for b in self.books.values()}, lambda line: None)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Cache]:
        async with Cache(
            directory=self.root,
            max_bytes=self.bound,
            downloads=DOWNLOADS,
            source=self.shelf,
            allow_unsafe=False,
            clock=SystemClock(),
            health=Health(now=lambda: 0.0),
            rand=lambda: 0.5,
            backoff=partial(Backoff, 0.0001, 0.001),
            reserves=Reserves(disk=0, compile=0),
        ) as cache:
            yield cache

    async def make(self, cache: Cache, name: str) -> Path:
        return await cache.ensure(self.books[name].ref, lambda progress: None)

    def seen(self) -> Seen:
        for folder in FOLDERS:
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        return see(self.root, self.books, files.disk_bytes(self.root))


Act = Callable[[Bench, Cache], Awaitable[Any]]


@dataclass(frozen=True)
class Scene:
    """`before` in a cache with room for all, `spoil` then changes the tree; `act` under `bound` bytes is what dies.
    `model`: what is made afterwards; `shows` proves that the scene is what it is called.
    """

    act: Act
    before: Act | None = None
    spoil: Callable[[Bench], None] | None = None
    bound: int = ROOMY
    model: str = KEPT
    shows: Callable[[Bench], bool] = lambda bench: True


async def both(bench: Bench, cache: Cache) -> None:
    await bench.make(cache, KEPT)
    await bench.make(cache, WANTED)


async def stored(bench: Bench, cache: Cache) -> None:
    for name in (KEPT, LONG):
        await bench.make(cache, name)
        await cache.evict(Evict("ready", bench.books[name].digest, 0), Cause("operator", 0.0))


async def half(bench: Bench, cache: Cache) -> None:
    with trio.CancelScope() as scope:
        bench.shelf.at_read = lambda number: scope.cancel() if number == 4 else None
        await bench.make(cache, KEPT)
    bench.shelf.at_read = lambda number: None


async def nothing(bench: Bench, cache: Cache) -> None:
    pass


def leftovers(bench: Bench) -> None:
    """Of all that a start tidies up."""
    root = bench.root
    (root / "blobs/ab").mkdir(exist_ok=True)
    for path in ("blobs/ab/.tmp-1", "manifests/.tmp-2", ".tmp-3", f"blobs/ab/{'ab' * 32}", "partial/unknown/journal"):
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_bytes(b"x" * 5000)
    (root / "ready/other/r1").mkdir(parents=True)
    (root / "ready/other/r1/weights").write_bytes(b"x" * 5000)
    (root / "index.sqlite").write_bytes(b"not SQLite")


def damage(bench: Bench) -> None:
    ready = next(bench.root.glob("ready/*/*/own.safetensors"))
    chunk = max(bench.root.glob("blobs/*/*"), key=lambda p: p.stat().st_size)
    for path in (ready, chunk):
        path.chmod(0o600)
        path.write_bytes(path.read_bytes()[:-1] + b"?")


def made(name: str) -> Callable[[Bench], bool]:
    return lambda bench: bench.seen().ready.get(bench.books[name].digest, False)


SCENES = {
    "fetch": Scene(lambda b, c: b.make(c, KEPT), shows=lambda b: made(KEPT)(b) and bool(b.seen().good)),
    "fetch, chunks not kept": Scene(
        lambda b, c: b.make(c, WANTED),
        bound=700_000,
        model=WANTED,
        shows=lambda b: made(WANTED)(b) and not b.seen().good,
    ),
    "from stored chunks": Scene(
        lambda b, c: b.make(c, KEPT), stored, shows=lambda b: made(KEPT)(b) and not b.shelf.reads
    ),
    "stored chunks are eaten": Scene(
        lambda b, c: b.make(c, LONG),
        stored,
        bound=1_350_000,
        model=LONG,
        shows=lambda b: made(LONG)(b) and not b.seen().good and not b.shelf.reads,
    ),
    "switch with evictions": Scene(
        lambda b, c: b.make(c, WANTED),
        lambda b, c: b.make(c, KEPT),
        bound=800_000,
        model=WANTED,
        shows=lambda b: made(WANTED)(b) and not made(KEPT)(b),
    ),
    "resume": Scene(lambda b, c: b.make(c, KEPT), half, shows=made(KEPT)),
    "rm": Scene(lambda b, c: Commands(c, agent=True).rm(WANTED), both, shows=lambda b: not made(WANTED)(b)),
    "prune": Scene(
        lambda b, c: Commands(c, agent=True).prune(True), both, model=WANTED, shows=lambda b: not b.seen().good
    ),
    "start": Scene(nothing, half, leftovers, shows=lambda b: not list(b.root.rglob("*tmp*"))),
    "verify": Scene(
        lambda b, c: Commands(c, agent=True).verify(None, lambda done, total: None),
        lambda b, c: b.make(c, KEPT),
        damage,
        shows=lambda b: bool(list(b.root.glob("quarantine/*"))),
    ),
}


async def play(bench: Bench, act: Act) -> None:
    async with bench.open() as cache:
        await act(bench, cache)


def start(scene: Scene, books: dict[str, Book], root: Path) -> Bench:
    bench = Bench(root, books)
    trio.run(play, bench, scene.before or nothing)
    if scene.spoil:
        scene.spoil(bench)
    return Bench(root, books, scene.bound)


def lies(bench: Bench) -> list[str]:
    """Lines of journals that a resuming cache would believe, of bytes that are not there."""
    found = []
    for book in bench.books.values():
        root = bench.root / "partial" / book.digest
        text = (root / "journal").read_text() if (root / "journal").exists() else ""
        for line in text.split("\n")[:-1]:
            i, j = map(int, line.split())
            name, chunk = book.manifest.files[i].path, book.manifest.files[i].chunks[j]
            path, end = root / "files" / name, j * CHUNK + chunk.size
            long = path.exists() and path.stat().st_size >= end
            if long and path.read_bytes()[j * CHUNK : end] != book.content[name][j * CHUNK : end]:
                found.append(f"{line} of {name}")
    return found


def recover(bench: Bench, model: str, known: Seen) -> None:
    """`known`: what was wrong before already."""
    book, before = bench.books[model], bench.seen()
    wrong = [d for d, right in before.ready.items() if not right and known.ready.get(d, True)]
    assert not wrong, "a ready copy is complete in name only"
    assert before.bad <= known.bad, "a chunk is complete in name only"
    assert not lies(bench)
    missing = frozenset() if before.sized.get(book.digest) else frozenset(book.blobs) - before.has(book.digest)
    over = max(bench.bound, before.total)

    async def again() -> None:
        async with bench.open() as cache:
            path = await bench.make(cache, model)
            found = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} - {".xim-manifest"}
            assert found == set(book.content)
            assert files.disk_bytes(bench.root) <= over, "above the bound"
            result = await Commands(cache, agent=True).verify(None, lambda done, total: None)
            assert known.bad or not all(known.ready.values()) or not result["damaged"], result
            await bench.make(cache, model)
            assert all((path / name).read_bytes() == data for name, data in book.content.items())

    trio.run(again)
    if not known.bad:
        assert bench.shelf.served.keys() <= missing, "fetched what was there"
        assert all(bench.shelf.served[b] <= len(book.blobs[b]) for b in book.blobs), "fetched twice"
    assert not list(bench.root.rglob(".tmp-*"))


def killed(bench: Bench, scene: Scene, at: int, torn: bool) -> bool:
    """Runs the scene in a process of its own. Whether the point was reached."""
    pid = os.fork()
    if pid == 0:
        try:
            with power.killer(at, torn):
                trio.run(play, bench, scene.act)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def recorded(scene: Scene, bench: Bench) -> list[power.Call]:
    with power.Recorder(bench.root) as recorder:
        trio.run(play, bench, scene.act)
    assert scene.shows(bench), "the scene is not what it is called"
    return recorder.calls


def matrix(scene: Scene, books: dict[str, Book], root: Path, most: int | None) -> None:
    """All points, or `most` of kills and of cuts each, spread evenly."""
    first = start(scene, books, root / "before")
    known = first.seen()
    shutil.copytree(root / "before", root / "whole")
    calls = recorded(scene, Bench(root / "whole", books, scene.bound))
    points = [(n, torn) for n, call in enumerate(calls, 1) for torn in (False, *([True] if "write" in call[0] else []))]
    reached = 0
    for at, torn in spread(points, most):
        bench = fresh(root, books, scene)
        shutil.copytree(root / "before", bench.root)
        reached += killed(bench, scene, at, torn)
        checked(bench, scene, known, f"killed at {at}{' (torn)' if torn else ''}, {calls[at - 1]!r:.90}")
    assert reached >= 0.8 * len(spread(points, most)), f"{reached} of {len(points)} points were reached"
    for what, tree, whole in spread(list(power.cuts(root / "before", calls)), most):
        bench = fresh(root, books, scene)
        power.make(whole, bench.root)
        was = bench.seen()
        bench = fresh(root, books, scene)
        power.make(tree, bench.root)
        digest = books[scene.model].digest
        lost = was.has(digest) - bench.seen().has(digest)
        assert digest in bench.seen().ready or len(lost) <= DOWNLOADS + WORKERS, f"{what}: lost {lost}"
        checked(bench, scene, known, what)


def spread(points: list[Any], most: int | None) -> list[Any]:
    return points[:: max(1, -(-len(points) // most))] if most else points


def fresh(root: Path, books: dict[str, Book], scene: Scene) -> Bench:
    shutil.rmtree(root / "case", ignore_errors=True)
    return Bench(root / "case", books, scene.bound)


def checked(bench: Bench, scene: Scene, known: Seen, what: str) -> None:
    try:
        recover(bench, scene.model, known)
    except (Exception, BaseExceptionGroup) as error:
        raise AssertionError(what) from error


@pytest.mark.parametrize("name", SCENES)
def test_kills_and_power_cuts(books: dict[str, Book], tmp_path: Path, name: str) -> None:
    matrix(SCENES[name], books, tmp_path, 20)


@pytest.mark.full
@pytest.mark.parametrize("name", SCENES)
def test_every_kill_and_power_cut(books: dict[str, Book], tmp_path: Path, name: str) -> None:
    matrix(SCENES[name], books, tmp_path, None)


async def test_an_index_from_another_time_costs_no_download(books: dict[str, Book], tmp_path: Path) -> None:
    """Put back from a copy: of before the second model, of before the first one went, of a third cache, or none."""
    bench = Bench(tmp_path / "cache", books)
    index = bench.root / "index.sqlite"
    async with bench.open() as cache:
        await bench.make(cache, KEPT)
        first = index.read_bytes()
        await bench.make(cache, WANTED)
        both = index.read_bytes()
        await Commands(cache, agent=True).rm(KEPT)
        await bench.make(cache, LONG)
    bench.shelf.served.clear()
    for data in (first, both, b"", None):
        index.unlink()
        if data is not None:
            index.write_bytes(data)
        async with bench.open() as cache:
            assert cache.store.index.entries().keys() == {books[WANTED].digest, books[LONG].digest}
            used = {n: cache.store.index.entries()[books[n].digest].used for n in (WANTED, LONG)}
            assert used[WANTED] <= used[LONG], "the order of uses comes from the tree where nothing else tells it"
            for name in (WANTED, LONG):
                await bench.make(cache, name)
    assert not bench.shelf.served
