"""An index that is older or newer than the tree, or damaged anywhere: the tree is what counts."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xim_agent.cache.index import Entry, Index

ENTRIES = {
    e.manifest: e for e in (Entry(f"{n:064x}", f"id{n}", f"name{n}", "r1", 1000 * n, 5.0 + n, n % 2) for n in range(9))
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("index") / "index.sqlite"
    index = Index(path)
    for entry in ENTRIES.values():
        index.add(entry)
    index.close()
    return path.read_bytes()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "index.sqlite"


def read(path: Path, data: bytes) -> dict[str, Entry]:
    path.write_bytes(data)
    index = Index(path)
    found = index.entries()
    index.add(ENTRIES[f"{3:064x}"])  # it goes on from there
    index.close()
    again = Index(path)
    assert again.entries() == found | {f"{3:064x}": ENTRIES[f"{3:064x}"]}
    again.close()
    return found


def test_what_is_written_is_read(path: Path, whole: bytes) -> None:
    assert read(path, whole) == ENTRIES


def test_what_was_verified_is_known_by_its_manifest(path: Path, whole: bytes) -> None:
    path.write_bytes(whole)
    index = Index(path)
    assert [index.verified(f"{n:064x}") for n in range(10)] == [n % 2 == 1 and n < 9 for n in range(10)]
    index.close()


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 16_000), junk=st.binary(min_size=1, max_size=300), cut=st.booleans())
def test_damage_anywhere_costs_entries_at_most(path: Path, whole: bytes, at: int, junk: bytes, cut: bool) -> None:
    """SQLite has no checksums: what stands in a cell may be another text, and a digest that no manifest has goes."""
    at %= len(whole)
    data = whole[:at] if cut else whole[:at] + junk + whole[at + len(junk) :]
    for entry in read(path, data).values():
        assert isinstance(entry.manifest, str)
        assert isinstance(entry.used, float)
        assert isinstance(entry.size, int)


def test_the_tree_decides_what_is_known(path: Path, whole: bytes) -> None:
    """`adopt`: from a copy of before, what has come since is added with the tree's times, and what has gone goes."""
    path.write_bytes(whole)
    index = Index(path)
    new = Entry("f" * 64, "", "new", "r2", 5, 7.5)
    kept = [f"{n:064x}" for n in (1, 4)]
    index.adopt({*kept, new.manifest}, [new])
    for each in (index, Index(path)):
        assert each.entries() == {digest: ENTRIES[digest] for digest in kept} | {new.manifest: new}
        each.close()
