"""Whoever can write into the cache: nothing outside it is written, and what is served is the model or nothing."""

import errno
import gc
import os
import shutil
import sqlite3
import struct
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import trio
from fakes.hostile import PLANTS, Canary, Local, cache_of, plant, uproot
from fakes.models import done_in
from hypothesis import given
from hypothesis import strategies as st

from xim_agent.cache.admin import Commands
from xim_agent.cache.manifest import Chunk, File, Manifest
from xim_agent.cache.partial import Partial
from xim_agent.cache.service import Cache, named
from xim_agent.errors import AgentError, Exit
from xim_agent.mesh.messages import ModelRef, Progress
from xim_agent.router.publish import PublishedModel

FOLDERS = ("blobs", "manifests", "ready", "partial", "quarantine", "compile")
SQLITE = ("index.sqlite", "index.sqlite-journal", "index.sqlite-wal", "index.sqlite-shm")
PARTIAL = "partial/{d}", "partial/{d}/files", "partial/{d}/files/model.safetensors", "partial/{d}/files/sub"
PLACES = (
    *FOLDERS,
    *("FORMAT", "lock", *SQLITE, ".tmp-x"),
    *("blobs/{b2}", "blobs/{b2}/{b}", "blobs/zz", "blobs/{b2}/.tmp-x", "manifests/{d}.json", "manifests/x"),
    *("ready/tiny", "ready/tiny/r1", "ready/tiny/r1/config.json", "ready/tiny/r1/sub", "ready/tiny/r1/more.py"),
    *("ready/tiny/r1/.xim-manifest", "ready/x", "ready/tiny/x"),
    *PARTIAL,
    *("partial/{d}/journal", "partial/{d}/files/more.py", "partial/{d}/more", "partial/x"),
    *("quarantine/x", "quarantine/damaged-{d}", "quarantine/evicted-{d}", "compile/0.1", "compile/x"),
)
STATES = ("whole", "cut")
Filled = dict[str, Path]


def ignore(_: Progress) -> None:
    pass


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    (root / "model.safetensors").write_bytes(bytes(range(256)) * 30)
    (root / "config.json").write_bytes(b'{"a": 1}')
    (root / "sub").mkdir()
    (root / "sub" / "vocab.txt").write_bytes(b"a\nb\n" * 5000)
    return root


@pytest.fixture(scope="module")
def filled(published: tuple[Path, PublishedModel], tmp_path_factory: pytest.TempPathFactory) -> Filled:
    """Caches: `whole` has ready copy and chunks, `cut` all but one chunk of a partial."""
    data, p = published
    model = ModelRef(p.id, p.name, p.revision, f"sha256:{p.manifest_sha256}", p.size_bytes)
    made = {state: tmp_path_factory.mktemp("filled") / state for state in STATES}

    async def fill() -> None:
        async with cache_of(made["whole"], Local(data)) as cache:
            await cache.ensure(model, ignore)
        with trio.CancelScope() as scope:
            source = Local(data)

            async def gate(blob: str) -> None:
                if len(source.asked) == 3:
                    while len(done_in(made["cut"])) < 2:  # noqa: ASYNC110 -- written by other threads
                        await trio.sleep(0.001)
                    scope.cancel()
                    await trio.sleep_forever()

            source.gate = gate
            async with cache_of(made["cut"], source) as cache:
                await cache.ensure(model, ignore)

    trio.run(fill)
    return made


@pytest.fixture
def canary(tmp_path: Path) -> Canary:
    return Canary(tmp_path / "outside")


def expected(place: str, kind: str) -> set[str | None]:
    """What opening says; None: nothing, since what was planted is gone or was rightly there."""
    if place in FOLDERS:
        return {None} if kind == "directory" else {"cache_foreign"}
    if kind == "directory" and place in ("FORMAT", "lock", "index.sqlite"):
        return {"cache_directory"}
    if place == "FORMAT" and kind in ("file", "second name"):
        return {"cache_format"}
    if place in ("FORMAT", "lock"):
        return {None} if kind == "file" else {"cache_foreign"}
    return {None}


def cured(error: AgentError) -> str:
    """The code of an error that says what to do next and is no bug."""
    assert error.hint, error.message
    assert error.exit_code != Exit.BUG
    return error.code


@dataclass
class Bench:
    """One cache in a state, the canary beside it, and a check that what is ready is the model."""

    root: Path
    source: Local
    model: ModelRef
    published: PublishedModel
    canary: Canary
    check: Callable[[Path], None]

    def at(self, place: str) -> Path:
        """`{d}`: the manifest, `{b}`: one blob that is there, or would be."""
        b = next((x.name for x in sorted(self.root.glob("blobs/??/*")) if len(x.name) == 64), "0" * 64)
        return self.root / place.format(d=self.published.manifest_sha256, b=b, b2=b[:2])

    def cache(self, **changes: Any) -> Cache:
        return cache_of(self.root, self.source, **changes)

    async def use(self, cache: Cache) -> None:
        """All that writes: fetch, expand, publish, compile cache, verify, eviction, removal, fetch again."""
        commands = Commands(cache, agent=True)
        self.check(await cache.ensure(self.model, ignore))
        cache.compile_cache_dir("0.1")
        await commands.verify(None, lambda a, b: None)
        await commands.prune(everything=True)
        self.check(await cache.ensure(self.model, ignore))
        await commands.rm("tiny")

    async def outcome(self, **changes: Any) -> str | None:
        """The code of the refusal, which has a cure; None: all went well. What the cache opened it closed."""
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 -- names are numbers
        try:
            async with self.cache(**changes) as cache:
                await self.use(cache)
            return None
        except AgentError as e:
            return cured(e)
        finally:
            assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.fixture
def bench_of(
    filled: Filled, published: Any, model: ModelRef, canary: Canary, model_files: Path, same_tree: Any, tmp_path: Path
) -> Callable[[str], Bench]:
    def make(state: str) -> Bench:
        root = tmp_path / "cache"
        shutil.copytree(filled[state], root)
        source = Local(published[0])
        return Bench(root, source, model, published[1], canary, lambda path: same_tree(path, model_files))

    return make


def exists(path: Path) -> bool:
    return os.path.lexists(path)


async def planted(bench: Bench, place: str, kind: str) -> None:
    path = bench.at(place)
    plant(path, kind, bench.canary)
    before = bench.canary.seen()
    code = await bench.outcome()
    assert code in expected(place, kind)
    if kind != "second name":
        assert bench.canary.seen() == before
    else:  # the name in the cache may go, which is all that may change
        assert bench.canary.content() == bench.canary.content(before)
    if code is not None:
        assert exists(path)
        uproot(path)
        assert await bench.outcome() is None


KINDS = ("link to a directory", "pipe", "second name")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
async def test_what_was_planted_before_the_start_is_refused_or_gone(
    place: str, kind: str, bench_of: Callable[[str], Bench]
) -> None:
    await planted(bench_of("cut" if place.startswith("partial") else "whole"), place, kind)


@pytest.mark.full
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", PLANTS)
@pytest.mark.parametrize("place", PLACES)
async def test_anything_planted_anywhere_before_the_start(
    place: str, kind: str, state: str, bench_of: Callable[[str], Bench]
) -> None:
    await planted(bench_of(state), place, kind)


# -- while it runs ---------------------------------------------------------------------------------------------------

SWAPPED = (
    *FOLDERS,
    *("blobs/{b2}", "blobs/{b2}/{b}", "manifests/{d}.json", "ready/tiny", "ready/tiny/r1", "compile/0.1"),
    *PARTIAL,
    *("partial/{d}/journal", "partial/{d}/files/sub/vocab.txt", "partial/{d}/files/config.json"),
    *("FORMAT", *SQLITE, "quarantine/evicted-{d}", "quarantine/damaged-{d}"),
)
FOUND = {None, "cache_foreign", "cache_io"}
WHEN = ("fetching", "verifying")


async def swapped(bench: Bench, place: str, kind: str, when: str) -> None:
    done = False

    def swap() -> None:
        nonlocal done
        if not done:
            done = True
            path = bench.at(place)
            if exists(path):
                path.rename(bench.root / "aside")
            plant(path, kind, bench.canary)

    async def gate(_: str) -> None:
        if when == "fetching":
            swap()

    def report(progress: Progress) -> None:
        if when == "verifying" and progress.stage == "verify":
            swap()

    bench.source.gate = gate
    before = bench.canary.content()
    code = None
    try:
        async with bench.cache() as cache:
            bench.check(await cache.ensure(bench.model, report))
            bench.check(await cache.ensure(bench.model, report))
            commands = Commands(cache, agent=True)
            await commands.verify(None, lambda a, b: None)
            await commands.prune(everything=True)
    except AgentError as e:
        code = cured(e)
    assert done
    assert code in FOUND
    assert bench.canary.content() == before
    if place in (*FOLDERS, "FORMAT", "index.sqlite") and exists(bench.at(place)):  # the start refuses some of these
        uproot(bench.at(place))
    assert await bench.outcome() is None
    assert bench.canary.content() == before


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("place", SWAPPED)
async def test_a_link_that_appears_while_it_runs_leads_nowhere(
    place: str, when: str, bench_of: Callable[[str], Bench]
) -> None:
    await swapped(bench_of("cut"), place, "link to a directory", when)


@pytest.mark.full
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("kind", sorted(PLANTS.keys() - {"file"}))  # files that change later are for `cache verify`
@pytest.mark.parametrize("place", SWAPPED)
async def test_anything_may_appear_anywhere_while_it_runs(
    place: str, kind: str, when: str, bench_of: Callable[[str], Bench]
) -> None:
    await swapped(bench_of("cut"), place, kind, when)


# -- what is no link -------------------------------------------------------------------------------------------------


async def test_files_that_are_named_by_their_digest_and_are_no_manifests(bench_of: Callable[[str], Bench]) -> None:
    bench = bench_of("whole")
    good = (bench.at("manifests/{d}.json")).read_bytes()
    evil = good.replace(b'"path":"config.json"', b'"path":"../../../x"')
    assert evil != good
    for data in (b"x", b"[" * 10_000, b"\xff", evil, good + b" "):
        (bench.root / "manifests" / f"{sha256(data).hexdigest()}.json").write_bytes(data)
    async with bench.cache() as cache:
        assert [m.name for m in cache.statistics().models] == ["tiny"]
    assert [p.name for p in (bench.root / "manifests").iterdir()] == [bench.at("manifests/{d}.json").name]


async def test_a_link_of_the_right_size_in_a_ready_copy_is_not_served(bench_of: Callable[[str], Bench]) -> None:
    bench = bench_of("whole")
    target = bench.at("ready/tiny/r1/config.json")
    name = "../../../../outside/directory/inner"
    size = target.stat().st_size
    target.unlink()
    target.symlink_to(name[:size].ljust(size, "x"))
    assert target.lstat().st_size == size
    async with bench.cache() as cache:
        bench.check(await cache.ensure(bench.model, ignore))


NAMES = [b"\xff\xfe", b"a\nb", "\u202e".encode(), b"\x1b[2J", b"-rf", "😀".encode() * 60, b"x" * 255]


@pytest.mark.parametrize("folder", ["", *FOLDERS, "blobs/zz", "ready/tiny", "ready/tiny/r1", "partial/{d}/files"])
async def test_names_that_nobody_can_read(folder: str, bench_of: Callable[[str], Bench]) -> None:
    bench = bench_of("cut" if folder.startswith("partial") else "whole")
    where = os.fsencode(bench.at(folder))
    os.makedirs(where, exist_ok=True)  # noqa: PTH103 -- bytes
    for name in NAMES:
        os.mkdir(os.path.join(where, name))  # noqa: PTH102, PTH118 -- bytes
        os.mkdir(os.path.join(where, name, b"\xff"))  # noqa: PTH102, PTH118 -- bytes
    assert await bench.outcome() is None


async def test_files_of_strange_modes_and_owners(bench_of: Callable[[str], Bench]) -> None:
    bench = bench_of("cut")
    for n, path in enumerate(p for p in bench.root.rglob("*") if p.is_file() and not p.is_symlink()):
        path.chmod((0o000, 0o6777, 0o400)[n % 3] if os.geteuid() == 0 else 0o6777)
    if os.geteuid() == 0:
        for path in bench.root.rglob("*"):
            os.chown(path, 12345, 12345)
    assert await bench.outcome() is None


async def test_heaps_of_junk_go_and_the_bound_holds(
    bench_of: Callable[[str], Bench], disk_usage: Callable[[Path], int]
) -> None:
    bench = bench_of("whole")
    for folder in ("blobs", "blobs/zz", "blobs/{b2}", "manifests", "ready", "ready/tiny", "partial", "compile"):
        here = bench.at(folder)
        here.mkdir(exist_ok=True)
        for n in range(500):
            (here / f"junk{n}").write_bytes(b"x" * 5000)
    async with bench.cache(max_bytes=2_000_000) as cache:
        assert disk_usage(bench.root) < 2_000_000
        bench.check(await cache.ensure(bench.model, ignore))
        assert cache.statistics().bytes_used == disk_usage(bench.root)
    assert not list(bench.root.rglob("junk*"))


@pytest.mark.full
async def test_a_hundred_thousand_entries_of_junk(bench_of: Callable[[str], Bench]) -> None:
    bench = bench_of("whole")
    for n in range(100_000):
        (bench.root / "blobs" / f"{n}").touch()
    assert await bench.outcome() is None
    assert not list((bench.root / "blobs").glob("?????"))


# -- the index -------------------------------------------------------------------------------------------------------


def super_journal(index: Path, names: Path) -> None:
    """A hot journal whose last record (SQLite's file format, 3.1) says that `names` goes with it."""
    magic = bytes.fromhex("d9d505f920a163d7")
    name, pages = os.fsencode(names), index.stat().st_size // 4096
    header = magic + struct.pack(">5I", 0, 0, pages, 512, 4096)
    record = struct.pack(">I", 2**30 // 4096 + 1) + name + struct.pack(">2I", len(name), sum(name)) + magic
    index.with_name("index.sqlite-journal").write_bytes(header.ljust(512, b"\0") + record)


def test_sqlite_itself_does_delete_what_a_journal_names(tmp_path: Path, canary: Canary) -> None:
    """If this fails one day, the index may be an ordinary database again."""
    with closing(sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)) as db:
        db.execute("CREATE TABLE t(x)")
    super_journal(tmp_path / "index.sqlite", canary.file)
    with closing(sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)) as db:
        db.execute("SELECT * FROM t")
    assert not canary.file.exists()


async def test_a_journal_in_the_cache_that_names_a_file_does_not_delete_it(bench_of: Callable[[str], Bench]) -> None:
    bench = bench_of("whole")
    super_journal(bench.root / "index.sqlite", bench.canary.file)
    before = bench.canary.seen()
    assert await bench.outcome() is None
    assert bench.canary.seen() == before


INDEX = {
    "a view that never ends": """
        ALTER TABLE models RENAME TO other;
        CREATE VIEW models AS WITH RECURSIVE n(manifest) AS (SELECT 1 UNION ALL SELECT manifest + 1 FROM n)
        SELECT manifest, 'a' id, 'a' name, 'a' revision, 1 size, 1.0 used, 0 verified FROM n""",
    "a trigger": "CREATE TRIGGER t BEFORE INSERT ON models BEGIN DELETE FROM models; END",
    "text for a time": "UPDATE models SET used = 'long ago'",
    "bytes for a name": "UPDATE models SET name = x'00ff', id = x'00ff'",
    "a name that is no text": "UPDATE models SET name = CAST(x'ff' AS TEXT)",
    "wal": "PRAGMA journal_mode=WAL",
    "models that are not there": """
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2000)
        INSERT INTO models SELECT 'x' || i, '', '', '', -1, 9e999, 7 FROM n""",
    "nothing": "DELETE FROM models",
}


@pytest.mark.parametrize("script", INDEX.values(), ids=INDEX)
async def test_an_index_that_somebody_else_wrote(script: str, bench_of: Callable[[str], Bench]) -> None:
    bench = bench_of("whole")
    with closing(sqlite3.connect(bench.root / "index.sqlite", isolation_level=None)) as db:
        db.executescript(script)
    with trio.fail_after(60):
        async with bench.cache() as cache:
            assert [(m.id, m.name, m.revision) for m in cache.statistics().models] == [("tiny", "tiny", "r1")]
            await Commands(cache, agent=True).ls()
        assert await bench.outcome() is None


@pytest.mark.parametrize("data", [b"", b"\0" * 4096, None], ids=["empty", "zeros", "endless"])
async def test_an_index_that_is_none(data: bytes | None, bench_of: Callable[[str], Bench]) -> None:
    bench = bench_of("whole")
    with (bench.root / "index.sqlite").open("wb") as file:
        file.truncate(10**12) if data is None else file.write(data)
    with peak_below(50):
        async with bench.cache() as cache:
            assert [m.name for m in cache.statistics().models] == ["tiny"]


# -- what stops or swells --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["blobs/{b2}/{b}", "ready/tiny/r1/config.json"])
async def test_a_pipe_that_appears_does_not_hold_up_verify(place: str, bench_of: Callable[[str], Bench]) -> None:
    bench = bench_of("whole")
    async with bench.cache() as cache:
        plant(bench.at(place), "pipe", bench.canary)
        found = await Commands(cache, agent=True).verify(None, lambda a, b: None)
        assert len(found["damaged"]) == 1


async def test_an_endless_journal_is_not_read(bench_of: Callable[[str], Bench]) -> None:
    bench = bench_of("cut")
    with bench.at("partial/{d}/journal").open("wb") as file:
        file.truncate(10**12)
    with peak_below(50):
        assert await bench.outcome() is None


# Where the stack ends in the middle of a `with`, what that had opened is closed by the collector, which tells.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("place", ["", "quarantine/x", "compile/x"])
async def test_a_tree_without_a_bottom_is_refused(place: str, bench_of: Callable[[str], Bench]) -> None:
    bench = bench_of("whole")
    top = bench.at(place)
    top.mkdir(exist_ok=True)
    here = os.open(top, os.O_PATH)
    for _ in range(700):
        os.mkdir("x", dir_fd=here)
        inner = os.open("x", os.O_PATH, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    assert await bench.outcome() == "cache_directory"
    gc.collect()
    await trio.run_process(["rm", "-r", top / "x"])
    assert await bench.outcome() is None


@contextmanager
def peak_below(mebibytes: int) -> Iterator[None]:
    """Of memory that Python allocates, which is where a file or a line that is read goes."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < mebibytes * 2**20
    finally:
        tracemalloc.stop()


SMALL = Manifest(
    1, "m", "r", tuple(File(f"f{i}", n, "0" * 64, (Chunk("0" * 64, n, n, "raw"),)) for i, n in enumerate((5, 6, 7)))
)
LINES = st.lists(
    st.binary(max_size=12)
    | st.sampled_from([b"0 0", b"1 0", b"2 0", b"0 1", b"3 0", b"0 0 0", b" 0 0", b"-1 0", b"00 0", b"0x0 0", b"0 0\r"])
    | st.tuples(st.integers(-1, 10**12), st.integers(-1, 10**12)).map(lambda pair: b"%d %d" % pair)
).map(b"\n".join)


@given(LINES, st.lists(st.integers(0, 8), min_size=3, max_size=3))
def test_a_journal_says_nothing_but_chunks_whose_bytes_are_there(data: bytes, sizes: list[int]) -> None:
    with tempfile.TemporaryDirectory() as made:
        root = Path(made) / "p"
        (root / "files").mkdir(parents=True)
        (root / "journal").write_bytes(data)
        for i, size in enumerate(sizes):
            (root / f"files/f{i}").write_bytes(bytes(size))
        lines = data.split(b"\n")[:-1]  # the last one is torn
        done = {(i, 0) for i, size in enumerate(sizes) if size >= 5 + i and {b"%d 0" % i, b"0%d 0" % i} & set(lines)}
        assert Partial(root, SMALL).done == done
        assert (root / "journal").read_bytes()[-1:] in (b"", b"\n")  # what is written next is no part of a torn line
        assert Partial(root, SMALL).done == done


def test_a_directory_of_another_user_is_named_with_its_cure() -> None:
    with pytest.raises(AgentError) as caught, named("cache_directory", Path("/a b")):
        raise PermissionError(errno.EACCES, "Permission denied", "blobs")
    assert caught.value.hint == f"`chown -R {os.geteuid()} '/a b' && chmod -R u+rwX '/a b'`"


def test_a_directory_that_is_read_only_for_this_process_is_named_with_its_cure() -> None:
    with pytest.raises(AgentError) as caught, named("cache_directory", Path("/a b")):
        raise OSError(errno.EROFS, "Read-only file system", "lock")
    assert "ReadWritePaths='/a b'" in caught.value.hint
