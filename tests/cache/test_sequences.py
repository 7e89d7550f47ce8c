"""Random lives of a cache on a small disk against a model of it: bound, what is in use, right bytes, no byte twice.

A life is one process: it opens the cache, takes steps, and closes it or is killed. What fails is printed as the call
that repeats it, to be pasted into an `@example`.
"""

import os
import random
import shutil
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from fakes.cache_world import Book, Seen, Shelf, library, see
from fakes.disk import Operations, fill, used

from xim_agent.backoff import Backoff
from xim_agent.cache.admin import Commands
from xim_agent.cache.download import WORKERS
from xim_agent.cache.plan import CacheRefused, Reserves
from xim_agent.cache.service import Cache
from xim_agent.errors import AgentError
from xim_agent.health import Health

RESERVES = Reserves(disk=1_500_000, compile=60_000)
DOWNLOADS = 2
BOOKS = 40_000  # bytes by which lock, index and its journal may grow outside any plan
ROUGH = 300_000  # bytes of manifest, index, journals and directories, at most
BOUNDS = (800_000, 1_300_000, 1_600_000, 1_800_000, 2_000_000, 2_200_000, 2_500_000, 3_000_000, 18_000_000)
ALL = 45_000_000  # a bound for all models at once
MODELS = ("a@1", "a@2", "b@1", "c@1", "d@1")
DAY = 24 * 3600


@dataclass(frozen=True)
class Make:
    """`switch`: the engine may be stopped for it, and serves it then. At the read of a piece with that number: `cancel`
    the operation, let another program `fill` the disk until the cache says that it waits, or `fail` the connection.
    """

    model: str
    switch: bool = False
    cancel: int | None = None
    fill: int | None = None
    fail: int | None = None


@dataclass(frozen=True)
class Verify:
    pass


@dataclass(frozen=True)
class Remove:
    model: str


@dataclass(frozen=True)
class Prune:
    everything: bool


@dataclass(frozen=True)
class Damage:
    """The file with this number, of what is there and not in use."""

    what: str
    number: int
    cut: bool


@dataclass(frozen=True)
class Compile:
    """vLLM writes into its own cache, within the reserve, or another version's cache is left over."""

    version: str


@dataclass(frozen=True)
class Fill:
    """Another program leaves this much beside the reserve; None: it gives everything back."""

    leave: int | None


@dataclass(frozen=True)
class Later:
    days: float


Step = Make | Verify | Remove | Prune | Damage | Compile | Fill | Later


@dataclass(frozen=True)
class Life:
    """`kill`: number of the file operation in the last step at which the process is killed."""

    bound: int
    steps: tuple[Step, ...]
    lose_index: bool = False
    kill: int | None = None


class Broken(Exception):
    """What must not be."""


class World:
    """Disk, books, and what the model knows of last uses and damage: a log, which survives a process that is killed."""

    def __init__(self, disk: Path, books: dict[str, Book]) -> None:
        self.disk, self.books, self.root = disk, books, disk / "cache"
        self.log = disk.parent / "log"
        self.log.write_text("")
        self.other = disk / "other program"
        self.later = 0.0
        self.lock = threading.RLock()  # for who measures or moves the other program's file

    def now(self) -> float:
        return time.time() + self.later

    def tell(self, line: str) -> None:
        with self.log.open("a") as log:
            log.write(line + "\n")

    def told(self) -> list[list[str]]:
        return [line.split() for line in self.log.read_text().splitlines()]

    def damaged(self, kind: str) -> set[str]:
        """`blob`: digests; `ready`, `partial`: models."""
        found: set[str] = set()
        for word, *rest in self.told():
            if word in ("damaged", "mended") and rest[0] == kind:
                (found.add if word == "damaged" else found.discard)(rest[1])
        return found

    def used(self) -> dict[str, float]:
        """Last uses, of those models of which the index knows them."""
        found: dict[str, float] = {}
        for word, *rest in self.told():
            if word == "used":
                found[rest[0]] = float(rest[1])
            elif word == "forgotten":
                found.pop(rest[0], None)
        return found

    def others_bytes(self) -> int:
        return self.other.stat().st_blocks * 512 if self.other.exists() else 0

    def total(self) -> int:
        with self.lock:
            return used(self.disk) - self.others_bytes()

    def leave(self, leave: int | None) -> None:
        """Another program takes all but this, or gives everything back."""
        with self.lock:
            if leave is None:
                self.other.unlink(missing_ok=True)
            else:
                fill(self.other, leave)

    def see(self) -> Seen:
        return see(self.root, self.books, self.total())

    def name(self, digest: str) -> str:
        return next(n for n, b in self.books.items() if b.digest == digest)


@dataclass
class Watcher:
    """Looks at every file operation: the bound, the reserve, what is in use. A kill is one of them too."""

    world: World
    bound: int
    ceiling: int
    kill: int | None = None
    armed: bool = False
    count: int = 0
    in_use: Path | None = None
    signature: dict[str, tuple[int, int]] = field(default_factory=dict)
    floor: int = 0
    slack: int = 0  # where the bound was lowered, the books may grow before what is above it has gone
    others_move: bool = False
    broken: str = ""
    opening: bool = True

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        if self.armed and self.kill is not None:
            self.count += 1
            if self.count == self.kill:
                os.kill(os.getpid(), signal.SIGKILL)

    def after(self) -> None:
        total = self.world.total()
        if total > max(self.bound, self.ceiling) + self.slack:
            self.broken = self.broken or f"{total} bytes, allowed are {self.bound}, {self.ceiling} were there"
        if not self.opening:
            self.ceiling = min(self.ceiling, total)
        info = os.statvfs(self.world.disk)
        free, reserve = info.f_bavail * info.f_frsize, max(RESERVES.disk, info.f_blocks * info.f_frsize // 50)
        # Others may have left less than the reserve: the books may grow all the same, nothing else may.
        self.floor = max(self.floor, min(free, reserve) - BOOKS)
        if free < self.floor and not self.opening and not self.others_move:
            self.broken = self.broken or f"{free} bytes free, the reserve is {reserve}"
        if self.in_use is not None and self._sign(self.in_use) != self.signature:
            self.broken = self.broken or f"{self.in_use} is in use and was touched"

    def use(self, path: Path | None) -> None:
        self.in_use = path
        self.signature = self._sign(path) if path else {}

    @staticmethod
    def _sign(path: Path) -> dict[str, tuple[int, int]]:
        try:
            return {str(p): ((i := p.lstat()).st_size, i.st_mtime_ns) for p in path.rglob("*") if p.is_file()}
        except FileNotFoundError:
            return {}

    def again(self) -> None:
        """Others changed the disk."""
        self.opening = False
        total = self.world.total()
        self.ceiling, self.slack = max(self.bound, total), BOOKS if total > self.bound else 0
        self.floor = 0
        self.others_move = False


class Player:
    """One life."""

    def __init__(self, world: World, life: Life, watcher: Watcher) -> None:
        self.world, self.life, self.watcher = world, life, watcher
        everything = {d: b for book in world.books.values() for d, b in book.blobs.items()}
        manifests = {b.digest: b.data for b in world.books.values()}
        self.shelf = Shelf(everything, manifests, world.tell)
        self.serving: str | None = None

    async def run(self) -> None:
        world = self.world
        async with Cache(
            directory=world.root,
            max_bytes=self.life.bound,
            downloads=DOWNLOADS,
            source=self.shelf,
            allow_unsafe=False,
            clock=world,
            health=Health(now=lambda: 0.0),
            rand=lambda: 0.5,
            backoff=partial(Backoff, 0.0001, 0.001),
            reserves=RESERVES,
            full_disk_look=0.002,
        ) as self.cache:
            self.cache.compile_cache_dir("1.0")
            for n, step in enumerate(self.life.steps):
                self.watcher.again()
                self.watcher.armed = n == len(self.life.steps) - 1
                await self.take(step)
                if self.watcher.broken:
                    raise Broken(f"{step}: {self.watcher.broken}")
                self.whole(step)
        if self.serving is not None:  # what is in use is used until the end
            world.tell(f"used {self.serving} {world.now()}")

    def unpin(self, name: str) -> None:
        """Its last use is now; a process that is killed may not come to write that down."""
        self.cache.unpin(self.world.books[name].ref)
        doomed = self.watcher.kill is not None
        self.world.tell(f"forgotten {name}" if doomed else f"used {name} {self.world.now()}")

    async def take(self, step: Step) -> None:
        before = self.world.see()
        if isinstance(step, Make):
            await self.make(step, before)
        elif isinstance(step, Verify):
            await self.verify(before)
        elif isinstance(step, Remove):
            await self.remove(step, before)
        elif isinstance(step, Prune):
            await self.prune(step, before)
        else:
            self.others(step)
        known = self.world.see().known
        for name in self.world.used():
            if self.world.books[name].digest not in known:
                self.world.tell(f"forgotten {name}")

    def whole(self, step: Step) -> None:
        """After every step: nothing is complete in name only, but what was damaged from outside."""
        seen = self.world.see()
        wrong = [self.world.name(d) for d, right in seen.ready.items() if not right]
        assert set(wrong) <= self.world.damaged("ready"), f"{step}: {wrong} ready and wrong"
        assert seen.bad <= self.world.damaged("blob"), f"{step}: wrong chunks"
        if self.serving is not None:
            assert self.world.books[self.serving].digest in seen.ready, f"{step}: {self.serving} is in use and gone"

    # -- an operation ------------------------------------------------------------------------------------------------

    async def make(self, step: Make, before: Seen) -> None:
        world, cache, book = self.world, self.cache, self.world.books[step.model]
        ready = before.sized.get(book.digest, False)
        missing = frozenset() if ready else frozenset(book.blobs) - before.has(book.digest)
        world.tell("make")
        self.shelf.served.clear()
        self.shelf.reads = 0
        self.shelf.failing = frozenset([step.fail] if step.fail else [])
        drained: list[bool] = []

        async def release() -> None:
            assert self.serving is not None
            drained.append(True)
            self.unpin(self.serving)
            self.serving = None
            self.watcher.use(None)

        serving = self.serving
        outcome = "cancelled"
        with trio.CancelScope() as scope, self.disturbed(step, scope), trio.fail_after(60):
            try:
                path = await cache.ensure(book.ref, lambda p: None, release if step.switch and serving else None)
                outcome = "ready"
            except CacheRefused as e:
                outcome = "refused"
                self.fits_not(book, before, e)
        after = world.see()
        self.fetched(step, book, missing, outcome)
        roomy = outcome == "ready" and step.fill is None and self.roomy(book, before)
        self.evicted(step, before, after, serving, bool(drained))
        if roomy:
            assert not drained, f"{step}: drained, where there was room"
            assert before.good <= after.good, f"{step}: chunks evicted, where there was room"
            assert before.ready.keys() - after.ready.keys() <= {book.digest}, f"{step}: evicted, where there was room"
        if outcome == "ready":
            assert after.sized[book.digest], f"{step}: not ready"
            world.tell(f"mended partial {step.model}")
            if not ready:
                world.tell(f"mended ready {step.model}")
            world.tell(f"used {step.model} {world.now()}")
            if step.switch:
                if self.serving is not None and self.serving != step.model:
                    self.unpin(self.serving)
                cache.pin(book.ref)
                self.serving = step.model
                self.watcher.use(path)
        if outcome == "refused" and self.serving is None:
            assert after.total <= self.life.bound, f"{step}: refused, and the bound does not hold"

    @contextmanager
    def disturbed(self, step: Make, scope: trio.CancelScope) -> Iterator[None]:
        world, watcher = self.world, self.watcher

        def at_read(number: int) -> None:
            if number == step.cancel:
                scope.cancel()
            if number == step.fill:
                watcher.others_move = True
                world.leave(0)

        def waits() -> None:
            if any(c.code == "cache_disk_full" for c in self.cache.health.conditions()):
                world.leave(None)

        self.shelf.at_read, self.cache.health.on_change = at_read, waits
        try:
            yield
        finally:
            self.shelf.at_read, self.cache.health.on_change = lambda number: None, lambda: None
            if step.fill is not None:
                world.leave(None)

    def fetched(self, step: Make, book: Book, missing: frozenset[str], outcome: str) -> None:
        """What the network was asked for is what was missing, no byte of it twice."""
        served, rotten = self.shelf.served, step.model in self.world.damaged("partial")
        if rotten:
            missing = frozenset(book.blobs)
        assert served.keys() <= missing, f"{step}: fetched what was there: {served.keys() - missing}"
        for blob, amount in served.items():
            assert amount <= len(book.blobs[blob]) or rotten, f"{step}: {blob} fetched twice"
        if outcome == "ready" and not rotten:
            assert served.keys() == missing, f"{step}: not fetched: {missing - served.keys()}"
        if outcome == "refused":
            assert not served, f"{step}: refused after the first byte"

    def room(self) -> int:
        """Bytes that there are for models."""
        info = os.statvfs(self.world.disk)
        size = info.f_blocks * info.f_frsize
        disk = size - self.world.others_bytes() - max(RESERVES.disk, size // 50)
        return min(self.life.bound, disk) - RESERVES.compile

    def roomy(self, book: Book, before: Seen) -> bool:
        return before.total + book.allocated + sum(len(b) + 8192 for b in book.blobs.values()) + ROUGH <= self.room()

    def fits_not(self, book: Book, before: Seen, error: CacheRefused) -> None:
        """A refusal is right: with all gone that may go, the files alone do not fit."""
        held = [self.serving] if self.serving and self.serving != book.ref.name else []
        fixed = sum(self.world.books[m].allocated for m in held) + _size(self.world.root / "compile")
        stored = before.good | before.bad  # may be others' as well
        own = sum(len(book.blobs[b]) + 8192 for b in book.blobs.keys() & stored)
        assert book.allocated + fixed + own + ROUGH > self.room(), f"refused, and it fits: {error.message}"

    # -- the order of eviction ---------------------------------------------------------------------------------------

    def evicted(self, step: Make, before: Seen, after: Seen, serving: str | None, drained: bool) -> None:
        """What goes later went only where nothing was left of what goes first."""
        world, target = self.world, self.world.books[step.model].digest
        keep = {target} | {world.books[name].digest for name in (serving, self.serving) if name}
        gone_ready = before.ready.keys() - after.ready.keys() - {target}
        models = {n for n, b in world.books.items() if b.digest in before.known} - {step.model}
        gone_blobs = frozenset(b for n in models for b in world.books[n].blobs) & before.good - after.good
        gone_blobs -= world.books[step.model].blobs.keys()
        if gone_ready or gone_blobs:
            assert not after.quarantine or not before.quarantine, f"{step}: the quarantine goes first"
            assert _size(world.root / "compile/0.9") == 0, f"{step}: old compile caches go before models"
        if gone_blobs:
            left = after.ready.keys() - keep
            assert not left, f"{step}: chunks went before the ready copies {[world.name(d) for d in left]}"
        if serving is not None and serving != step.model and not drained:
            own = self.only(serving, before) - world.books[step.model].blobs.keys()
            if not step.switch:
                assert own <= after.good, f"{step}: chunks of {serving}, which is in use and cannot be drained, went"
            elif any(self.only(n, before) & gone_blobs for n in models - {serving}):
                assert not own & after.good, f"{step}: chunks went before the second copy of {serving}"
        self.by_age(step, before, after, gone_blobs, keep)

    def by_age(self, step: Make, before: Seen, after: Seen, gone: frozenset[str], keep: set[str]) -> None:
        ages = {n: age for n, age in self.world.used().items() if self.world.books[n].digest in before.known}
        others = [n for n in ages if self.world.books[n].digest not in keep]
        only = {n: self.only(n, before) - self.world.books[step.model].blobs.keys() for n in others}
        for name in others:
            if only[name] & gone:
                older = [o for o in others if ages[o] < ages[name] and only[o] & after.good]
                assert not older, f"{step}: chunks of {name} went before those of {older}, which were used before"

    def only(self, name: str, seen: Seen) -> frozenset[str]:
        """Its chunks that no other known model has."""
        others = [b.blobs for n, b in self.world.books.items() if n != name and b.digest in seen.known]
        return (frozenset(self.world.books[name].blobs) & seen.good).difference(*others)

    # -- commands ----------------------------------------------------------------------------------------------------

    async def verify(self, before: Seen) -> None:
        if self.serving in self.world.damaged("ready"):
            return  # it stays, and an error says so
        await Commands(self.cache, agent=True).verify(None, lambda done, total: None)
        after = self.world.see()
        assert (after.good, after.bad) == (before.good, frozenset())
        assert after.ready == {d: ok for d, ok in before.ready.items() if ok}
        for name in self.world.damaged("ready"):
            self.world.tell(f"mended ready {name}")

    async def remove(self, step: Remove, before: Seen) -> None:
        book = self.world.books[step.model]
        present = book.digest in before.known or book.digest in before.ready
        if step.model == self.serving or not present:
            with pytest.raises(AgentError) as e:
                await Commands(self.cache, agent=True).rm(step.model)
            assert e.value.code == ("model_in_use" if present else "model_unknown")
            assert self.world.see() == before
            return
        await Commands(self.cache, agent=True).rm(step.model)
        after = self.world.see()
        assert before.good - after.good == self.only(step.model, before), "its own chunks go, no others"
        assert before.ready.keys() - after.ready.keys() <= {book.digest}
        assert not {book.digest} & (after.ready.keys() | after.done.keys() | after.known)

    async def prune(self, step: Prune, before: Seen) -> None:
        await Commands(self.cache, agent=True).prune(step.everything)
        after = self.world.see()
        assert not after.quarantine
        for name, book in self.world.books.items():
            kept = name == self.serving or not step.everything
            if kept and before.sized.get(book.digest) and name not in self.world.damaged("ready"):
                here = after.sized.get(book.digest) or book.blobs.keys() <= after.good | after.bad
                assert here, f"prune cost a download of {name}"
            elif step.everything and not kept:
                assert book.digest not in after.ready.keys() | after.done.keys()

    # -- others ------------------------------------------------------------------------------------------------------

    def others(self, step: Step) -> None:
        world = self.world
        if isinstance(step, Later):
            world.later += step.days * DAY
        elif isinstance(step, Fill):
            world.leave(None)
            if step.leave is not None:
                info = os.statvfs(world.disk)
                world.leave(step.leave + max(RESERVES.disk, info.f_blocks * info.f_frsize // 50))
        elif isinstance(step, Compile):
            folder = world.root / "compile" / step.version
            folder.mkdir(exist_ok=True)
            if world.total() + 40_000 < self.life.bound:
                (folder / "kernel").write_bytes(bytes(30_000))
        elif isinstance(step, Damage):
            self.damage(step)
        self.watcher.again()

    def damage(self, step: Damage) -> None:
        world = self.world
        if step.what == "blob":
            found = sorted((world.root / "blobs").glob("*/*"))
        else:
            inner = "ready/*/*/*" if step.what == "ready" else "partial/*/files/*"
            used = str(self.watcher.in_use or "-")
            found = sorted(p for p in world.root.glob(inner) if p.is_file() and not str(p).startswith(used))
        found = [p for p in found if p.stat().st_size > 10 and p.name != ".xim-manifest"]
        if not found:
            return
        path = found[step.number % len(found)]
        data = path.read_bytes()
        path.chmod(0o600)
        path.write_bytes(data[:-5] if step.cut else data[:3] + bytes([data[3] ^ 1]) + data[4:])
        if step.what == "blob":
            world.tell(f"damaged blob {path.name}")
        elif step.what == "ready":
            world.tell(f"damaged ready {world.name((path.parent / '.xim-manifest').read_text())}")
        else:
            world.tell(f"damaged partial {world.name(path.relative_to(world.root / 'partial').parts[0])}")


def _size(path: Path) -> int:
    return sum(p.lstat().st_blocks * 512 for p in path.rglob("*"))


# -- lives ----------------------------------------------------------------------------------------------------------


def live(world: World, life: Life) -> None:
    """One after another; a life that is to be killed is a process of its own."""
    for index in world.root.glob("index.sqlite") if life.lose_index else []:
        index.unlink()
        for name in world.books:
            world.tell(f"forgotten {name}")
    before = world.total()
    ceiling = max(life.bound, before + BOOKS)  # where the bound was lowered; the index comes back
    watcher = Watcher(world, life.bound, ceiling, life.kill, armed=not life.steps)
    if life.kill is None:
        with Operations(watcher.before, watcher.after):
            trio.run(Player(world, life, watcher).run)
        assert not watcher.broken, watcher.broken
        return
    code = forked(world, partial(trio.run, Player(world, life, watcher).run), watcher)
    assert code in (0, -signal.SIGKILL), world.log.with_name("said").read_text()
    world.later += sum(step.days for step in life.steps if isinstance(step, Later)) * DAY
    if code and life.steps:
        killed(world, life.steps[-1], life.bound if before <= life.bound else before + BOOKS)


def forked(world: World, call: Any, watcher: Watcher) -> int:
    """Exit code, -9 when it was killed."""
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            with Operations(watcher.before, watcher.after):
                call()
            code = 0
        except (Exception, BaseExceptionGroup):
            world.log.with_name("said").write_text(traceback.format_exc())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(world: World, step: Step, allowed: int) -> None:
    """What it left: nothing that is complete in name only, and all that had arrived but what was in flight."""
    seen = world.see()
    wrong = {world.name(d) for d, right in seen.ready.items() if not right}
    assert wrong <= world.damaged("ready"), f"killed in {step}: {wrong} ready and wrong"
    assert seen.bad <= world.damaged("blob"), f"killed in {step}: wrong chunks"
    assert seen.total <= allowed, f"killed in {step}: {seen.total} bytes, allowed are {allowed}"
    if not isinstance(step, Make):
        return
    world.tell(f"forgotten {step.model}")  # it may have come to its end
    book, served = world.books[step.model], Counter[str]()
    for word, *rest in world.told():
        if word == "make":
            served.clear()
        elif word == "served":
            served[rest[0]] += int(rest[1])
    whole = {b for b, amount in served.items() if amount >= len(book.blobs[b])}
    lost = whole - seen.has(book.digest)
    if book.digest not in seen.ready and step.model not in world.damaged("partial"):
        assert len(lost) <= DOWNLOADS + WORKERS, f"killed in {step}: {len(lost)} chunks had arrived and are gone"


def play(disk: Path, books: dict[str, Book], lives: tuple[Life, ...]) -> None:
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    world = World(disk, books)
    for life in lives:
        live(world, life)
    # At the end whatever happened can be made good: with room for all, every model becomes right.
    world.leave(None)
    last = tuple(Make(model) for model in MODELS)
    live(world, Life(ALL, (Verify(), *last, Verify())))


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Book]:
    return library(tmp_path_factory.mktemp("library"))


def some_step(rand: random.Random) -> Step:
    seldom = lambda: rand.choice([*[None] * 12, 1, 2, 4, 7, 11])  # noqa: E731
    others: list[Callable[[], Step]] = [
        Verify,
        lambda: Remove(rand.choice(MODELS)),
        lambda: Prune(rand.random() < 0.3),
        lambda: Damage(rand.choice(["blob", "ready", "partial"]), rand.randrange(30), rand.random() < 0.5),
        lambda: Damage("blob", rand.randrange(30), rand.random() < 0.5),
        lambda: Compile(rand.choice(["0.9", "1.0"])),
        lambda: Fill(rand.choice([None, None, 0, 300_000, 900_000, 3_000_000])),
        lambda: Later(rand.choice([0.5, 2.0])),
    ]
    if rand.random() < 0.4:
        return rand.choice(others)()
    return Make(rand.choice(MODELS), rand.random() < 0.7, cancel=seldom(), fill=seldom(), fail=seldom())


def some_lives(seed: int) -> tuple[Life, ...]:
    """One that is killed is so in the middle of an operation, or when it opens the cache."""
    rand, lives = random.Random(seed), []
    for _ in range(rand.randint(2, 4)):
        steps = tuple(some_step(rand) for _ in range(rand.randint(2, 7)))
        kill = rand.randint(1, 150) if rand.random() < 0.5 else None
        if kill is not None:
            steps = (*steps, Make(rand.choice(MODELS), rand.random() < 0.7)) if rand.random() < 0.9 else ()
        lives.append(Life(rand.choice(BOUNDS), steps, rand.random() < 0.15, kill))
    return tuple(lives)


def shorter(lives: tuple[Life, ...]) -> Iterator[tuple[Life, ...]]:
    for n, life in enumerate(lives):
        yield lives[:n] + lives[n + 1 :]
        for k in range(len(life.steps)):
            yield (*lives[:n], replace(life, steps=life.steps[:k] + life.steps[k + 1 :]), *lives[n + 1 :])


def check(disk: Path, books: dict[str, Book], seed: int) -> None:
    """What fails is made as short as it can be, then told as the call that repeats it."""
    lives, error = some_lives(seed), None
    while (found := trouble(disk, books, lives)) is not None:
        error = found
        lives = next((each for each in shorter(lives) if each and trouble(disk, books, each) is not None), ())
        if lives:
            told = lives
    if error is not None:
        raise AssertionError(f"seed {seed}; to repeat it:\nplay(tmpfs, books, {told})") from error


def trouble(disk: Path, books: dict[str, Book], lives: tuple[Life, ...]) -> BaseException | None:
    try:
        play(disk, books, lives)
    except (Exception, BaseExceptionGroup) as e:
        return e
    return None


@pytest.mark.parametrize("part", range(4))
def test_random_lives(tmpfs: Path, books: dict[str, Book], part: int) -> None:
    for seed in range(8 * part, 8 * part + 8):
        check(tmpfs, books, seed)


def test_a_lowered_bound_leaves_room_for_the_index(tmpfs: Path, books: dict[str, Book]) -> None:
    """Found by many lives: what did not fit any more went, to the last byte, and the next use was written above it."""
    first = (Make("b@1", fill=1), Make("a@2", switch=True))
    then = (Make("c@1", switch=True), Make("d@1", switch=True, cancel=4))
    play(tmpfs, books, (Life(2_500_000, first, kill=99), Life(800_000, then)))


@pytest.mark.full
@pytest.mark.parametrize("part", range(60))
def test_many_random_lives(tmpfs: Path, books: dict[str, Book], part: int) -> None:
    for seed in range(1000 + 20 * part, 1020 + 20 * part):
        check(tmpfs, books, seed)
