"""What the tree cannot say: ids, last use, proofs. Lost or damaged, it starts empty and the tree fills it again."""

import logging
import sqlite3
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from xim_agent import files
from xim_agent.cache import tree

log = logging.getLogger("xim_agent.cache")

_SCHEMA = """CREATE TABLE models(
  manifest TEXT PRIMARY KEY, id TEXT NOT NULL, name TEXT NOT NULL, revision TEXT NOT NULL,
  size INTEGER NOT NULL, used REAL NOT NULL, verified INTEGER NOT NULL)"""
_CONTENTS = [("table", "models", _SCHEMA), ("index", "sqlite_autoindex_models_1", None)]
_LIMIT = 4 * 1024 * 1024  # bytes; a model takes about 300


@dataclass(frozen=True)
class Entry:
    """`size`: bytes of the files; `used`: Unix seconds of the last use.

    `verified`: 1 when the files that the chunks make had the digests of the manifest once.
    """

    manifest: str
    id: str
    name: str
    revision: str
    size: int
    used: float
    verified: int = 0


class Index:
    """An SQLite database that is read once and written whole: SQLite itself never opens a file here. It would write
    through a second name of its journal, and deletes whatever file a planted journal names as its super-journal.

    All methods block and come from one thread at a time. Those that change it raise OSError, tree.Foreign; the change
    is then on the disk with the next one that succeeds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db = _new()
        try:
            data = tree.read(path, _LIMIT)
        except tree.Foreign as e:
            log.warning("what the cache did not make is removed", extra={"path": str(path), "error": e.message})
            tree.remove(path)
            data = None
        if data:
            try:
                entries = _entries_of(data)
            except (sqlite3.Error, OverflowError, UnicodeDecodeError, msgspec.ValidationError) as e:
                log.warning("cache index is damaged, made anew from the tree", extra={"error": str(e)[:200]})
                return
            for entry in entries:
                self._insert(entry)

    def close(self) -> None:
        self._db.close()

    def entries(self) -> dict[str, Entry]:
        return {entry.manifest: entry for entry in _entries(self._db)}

    def add(self, entry: Entry) -> None:
        """Adds or replaces."""
        self._insert(entry)
        self._save()

    def _insert(self, entry: Entry) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO models VALUES (:manifest, :id, :name, :revision, :size, :used, :verified)",
            asdict(entry),
        )

    def verified(self, manifest: str) -> bool:
        found = self._db.execute("SELECT verified=1 FROM models WHERE manifest=?", (manifest,)).fetchone()
        return bool(found and found[0])

    def touch(self, manifest: str, used: float) -> None:
        """On the disk with the next other change, or with `save`."""
        self._db.execute("UPDATE models SET used=? WHERE manifest=?", (used, manifest))

    def remove(self, manifest: str) -> None:
        self._db.execute("DELETE FROM models WHERE manifest=?", (manifest,))
        self.save()

    def adopt(self, known: AbstractSet[str], found: Iterable[Entry]) -> None:
        """Adds what was found; all but `known` go. A full disk only puts the writing off: no reason not to start."""
        before = self.entries()
        for entry in found:
            self._insert(entry)
        others = self.entries().keys() - known
        self._db.executemany("DELETE FROM models WHERE manifest=?", [(other,) for other in others])
        if self.entries() == before:
            return
        self.save()

    def save(self) -> None:
        """Puts it off on a full disk: what removes something must not fail for want of room."""
        try:
            self._save()
        except OSError as e:
            if not files.is_full(e):
                raise
            log.warning("the disk is full, the cache index is written later")

    def _save(self) -> None:
        tree.publish(self._path, self._db.serialize(), 0o640)


def _new() -> sqlite3.Connection:
    db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    db.execute(_SCHEMA)
    return db


def _entries(db: sqlite3.Connection) -> list[Entry]:
    rows = db.execute("SELECT manifest, id, name, revision, size, used, verified FROM models")
    return [Entry(*row) for row in rows]


def _entries_of(data: bytes) -> list[Entry]:
    """Nothing of it runs: a view or a trigger could run for ever. Raises sqlite3.Error, and what is no Entry raises."""
    db = sqlite3.connect(":memory:", isolation_level=None)
    try:
        db.deserialize(data)
        if db.execute("SELECT type, name, sql FROM sqlite_master").fetchmany(3) != _CONTENTS:
            raise sqlite3.DatabaseError("not our schema")
        if db.execute("PRAGMA quick_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("quick_check failed")
        return [msgspec.convert(asdict(entry), Entry) for entry in _entries(db)]
    finally:
        db.close()
