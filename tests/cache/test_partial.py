"""The journal, and the pipeline on a disk that fails."""

import errno
import resource
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from xim_agent.backoff import Backoff
from xim_agent.cache.download import Fetch
from xim_agent.cache.manifest import CHUNK, Chunk, File, Manifest, ManifestRefused
from xim_agent.cache.partial import Partial
from xim_agent.cache.store import Store
from xim_agent.cache.transfer import Counters
from xim_agent.errors import AgentError


def chunk(data: bytes, size: int | None = None) -> Chunk:
    return Chunk(sha256(data).hexdigest(), len(data), size or len(data), "raw")


BIG = bytes(CHUNK)
MANIFEST = Manifest(
    1,
    "m",
    "r",
    (
        File("a/big", CHUNK + 3, sha256(BIG + b"end").hexdigest(), (chunk(BIG), chunk(b"end"))),
        File("small", 5, sha256(b"small").hexdigest(), (chunk(b"small"),)),
        File("empty", 0, sha256(b"").hexdigest(), ()),
    ),
)


def test_the_journal_survives_and_torn_lines_do_not_count(tmp_path: Path) -> None:
    partial = Partial(tmp_path / "p", MANIFEST)
    partial.write(0, 0, BIG)
    partial.write(1, 0, b"small")
    journal = tmp_path / "p/journal"
    with journal.open("ab") as file:
        file.write(b"0 7\n9 0\nx\n\0\0\0\n0 1")
    again = Partial(tmp_path / "p", MANIFEST)
    assert again.done == {(0, 0), (1, 0)}
    assert again.done_blobs() == {chunk(BIG).blob, chunk(b"small").blob}
    again.write(0, 1, b"end")
    assert Partial(tmp_path / "p", MANIFEST).done == {(0, 0), (0, 1), (1, 0)}


def test_a_line_that_the_disk_takes_half_of_is_taken_back(tmp_path: Path) -> None:
    """Else it would become one with the next line and name another chunk. A limit of file sizes is the disk."""
    partial = Partial(tmp_path / "p", MANIFEST)
    journal = tmp_path / "p/journal"
    journal.write_bytes(b"x" * 99 + b"\n")
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (102, was[1]))
    try:
        with pytest.raises(OSError, match="No space left"):
            partial.write(1, 0, b"small")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)
    assert journal.stat().st_size == 100
    assert partial.done == set()
    partial.write(1, 0, b"small")
    assert Partial(tmp_path / "p", MANIFEST).done == {(1, 0)}


def test_a_line_whose_bytes_are_gone_does_not_count(tmp_path: Path) -> None:
    partial = Partial(tmp_path / "p", MANIFEST)
    partial.write(0, 1, b"end")
    partial.write(1, 0, b"small")
    (tmp_path / "p/files/small").unlink()
    with (tmp_path / "p/files/a/big").open("r+b") as file:
        file.truncate(CHUNK + 2)
    assert Partial(tmp_path / "p", MANIFEST).done == set()


def test_what_a_crash_left_half_written_goes(tmp_path: Path) -> None:
    partial = Partial(tmp_path / "p", MANIFEST)
    partial.write(1, 0, b"small")
    for left in ("p/.tmp-1", "p/files/.tmp-2"):
        (tmp_path / left).write_bytes(b"half")
    assert Partial(tmp_path / "p", MANIFEST).done == {(1, 0)}
    assert {p.name for p in (tmp_path / "p").rglob("*")} == {"files", "journal", "small"}


def test_a_chunk_may_come_in_pieces_and_is_done_with_the_last(tmp_path: Path) -> None:
    def pieces(fail: bool) -> Iterator[bytes]:
        yield b"sm"
        yield b"al"
        if fail:
            raise OSError(errno.EIO, "broken")
        yield b"l"

    partial = Partial(tmp_path / "p", MANIFEST)
    with pytest.raises(OSError, match="broken"):
        partial.write(1, 0, pieces(fail=True))
    assert Partial(tmp_path / "p", MANIFEST).done == partial.done == set()
    partial.write(1, 0, pieces(fail=False))
    assert (tmp_path / "p/files/small").read_bytes() == b"small"
    assert Partial(tmp_path / "p", MANIFEST).done == {(1, 0)}


@pytest.fixture
def make_fetch(tmp_path: Path) -> Any:
    store = Store.open(tmp_path / "cache")
    rooms: list[bool] = []

    async def room() -> None:
        rooms.append(True)

    def make(
        kind: Callable[[Path, Manifest], Partial] = Partial, manifest: Manifest = MANIFEST
    ) -> tuple[Fetch, list[bool]]:
        for data in (BIG, b"end", b"small"):
            store.write_blob(sha256(data).hexdigest(), data)
        partial = kind(tmp_path / "p", manifest)
        options: dict[str, Any] = {"downloads": 2, "counters": Counters(), "report": lambda p: None, "backoff": Backoff}
        options |= {"rand": lambda: 0.5, "trouble": lambda t: None, "room": room}
        return Fetch(store, None, partial, **options), rooms  # type: ignore[arg-type]

    yield make
    store.close()


async def test_a_full_disk_is_waited_out(make_fetch: Any) -> None:
    class Full(Partial):
        left = 3

        def write(self, i: int, j: int, data: bytes | bytearray) -> None:
            if self.left:
                self.left -= 1
                raise OSError(errno.ENOSPC, "no space")
            super().write(i, j, data)

    fetch, rooms = make_fetch(Full)
    await fetch.expand(keep=True)
    assert len(rooms) == 3
    assert (fetch.partial.files / "small").read_bytes() == b"small"


async def test_another_disk_error_is_named_and_ends_the_operation(make_fetch: Any) -> None:
    class Broken(Partial):
        def write(self, i: int, j: int, data: bytes | bytearray) -> None:
            raise OSError(errno.EIO, "broken")

    fetch, rooms = make_fetch(Broken)
    with pytest.raises(AgentError, match="broken") as e:
        await fetch.expand(keep=True)
    assert (e.value.code, rooms) == ("cache_io", [])


async def test_a_file_of_another_digest_is_refused(make_fetch: Any) -> None:
    wrong = File("small", 5, sha256(b"other").hexdigest(), (chunk(b"small"),))
    fetch, _ = make_fetch(manifest=Manifest(1, "m", "r", (wrong,)))
    with pytest.raises(ManifestRefused, match="small") as e:
        await fetch.expand(keep=True)
    assert e.value.code == "file_digest"


async def test_a_chunk_that_decodes_to_another_size_is_refused_by_name(make_fetch: Any) -> None:
    lie = Chunk(chunk(b"small").blob, 5, 5, "zstd")
    fetch, _ = make_fetch(manifest=Manifest(1, "m", "r", (File("small", 5, sha256(b"small").hexdigest(), (lie,)),)))
    with pytest.raises(ManifestRefused, match=lie.blob) as e:
        await fetch.expand(keep=True)
    assert e.value.code == "chunk_undecodable"
