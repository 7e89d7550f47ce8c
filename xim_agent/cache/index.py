"""What the tree cannot say: ids, last use, pins. Lost or damaged, it starts empty and the tree fills it again."""

import logging
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from xim_agent.cache import tree

log = logging.getLogger("xim_agent.cache")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS models(
  manifest TEXT PRIMARY KEY, id TEXT NOT NULL, name TEXT NOT NULL, revision TEXT NOT NULL,
  size INTEGER NOT NULL, used REAL NOT NULL, pinned INTEGER NOT NULL DEFAULT 0)
"""
# SQLITE_ERROR: our SQL is right, so the schema is not ours. Without a code: quick_check found something.
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)


@dataclass(frozen=True)
class Entry:
    """`size`: bytes of the files; `used`: Unix seconds of the last use."""

    manifest: str
    id: str
    name: str
    revision: str
    size: int
    used: float
    pinned: int = 0


class Index:
    """All methods block and come from one thread at a time. They raise sqlite3.Error where the disk fails."""

    def __init__(self, path: Path) -> None:
        files = [path.with_name(path.name + suffix) for suffix in ("", "-journal", "-wal", "-shm")]
        for file in files:  # SQLite follows a link to its database, and writes through second names of all of them
            if file.is_symlink() or (file.exists() and not file.is_dir() and not tree.is_plain(file, own=True)):
                log.warning("what the cache did not make is removed", extra={"path": str(file)})
                tree.remove(file)
        try:
            self._db = self._connect(path)
        except sqlite3.DatabaseError as e:
            if getattr(e, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF not in _DAMAGE:
                raise
            log.warning("cache index is damaged, made anew from the tree", extra={"error": str(e)})
            for file in files:
                tree.remove(file)
            self._db = self._connect(path)

    @staticmethod
    def _connect(path: Path) -> sqlite3.Connection:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            if db.execute("PRAGMA quick_check").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("quick_check failed")
            db.execute(_SCHEMA)
            db.execute("SELECT manifest, id, name, revision, size, used, pinned FROM models LIMIT 1")
        except BaseException:
            db.close()
            raise
        return db

    def close(self) -> None:
        self._db.close()

    def entries(self) -> dict[str, Entry]:
        rows = self._db.execute("SELECT manifest, id, name, revision, size, used, pinned FROM models")
        return {r[0]: Entry(*r) for r in rows}

    def add(self, entry: Entry) -> None:
        """Adds or replaces, but for the pin."""
        self._db.execute(
            "INSERT INTO models(manifest, id, name, revision, size, used) VALUES (?, ?, ?, ?, ?, ?)"
            " ON CONFLICT(manifest) DO UPDATE SET id=excluded.id, name=excluded.name, revision=excluded.revision,"
            " size=excluded.size, used=excluded.used",
            (entry.manifest, entry.id, entry.name, entry.revision, entry.size, entry.used),
        )

    def touch(self, manifest: str, used: float) -> None:
        self._db.execute("UPDATE models SET used=? WHERE manifest=?", (used, manifest))

    def remove(self, manifest: str) -> None:
        self._db.execute("DELETE FROM models WHERE manifest=?", (manifest,))
