"""The router's database: DIR/router.sqlite, WAL, shared by the running router and the commands beside it."""

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from xim_agent import files
from xim_agent.errors import AgentError, Exit, leaves
from xim_agent.router import join_keys, keyring
from xim_agent.router.sql import transaction
from xim_agent.router.tokens import RouterKeys

_ROOM = 4 * 1024 * 1024  # bytes that SQLite may need to open a database in WAL mode and begin a change
DEFAULT_LISTEN = "127.0.0.1:8080"
FILE = "router.sqlite"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS settings(key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS signing_keys(
  kid TEXT PRIMARY KEY, kind TEXT NOT NULL, private TEXT NOT NULL, created REAL NOT NULL, retired REAL);
CREATE TABLE IF NOT EXISTS join_keys(
  id INTEGER PRIMARY KEY, secret_hash BLOB NOT NULL UNIQUE, project TEXT NOT NULL, region TEXT NOT NULL,
  tiers TEXT NOT NULL, expires REAL, uses_left INTEGER NOT NULL, revoked REAL, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS agents(
  agent_id TEXT PRIMARY KEY, worker_id TEXT NOT NULL UNIQUE, join_key INTEGER NOT NULL REFERENCES join_keys(id),
  jkt TEXT NOT NULL, public_key TEXT NOT NULL, project TEXT NOT NULL, region TEXT NOT NULL, tiers TEXT NOT NULL,
  name TEXT NOT NULL, info TEXT NOT NULL, hardware TEXT NOT NULL, max_concurrent INTEGER, state TEXT NOT NULL,
  enrolled REAL NOT NULL, last_seen REAL, family INTEGER NOT NULL, used INTEGER NOT NULL, family_revoked REAL,
  UNIQUE(join_key, jkt));
CREATE TABLE IF NOT EXISTS refresh_tokens(
  hash BLOB PRIMARY KEY, agent_id TEXT NOT NULL REFERENCES agents(agent_id), family INTEGER NOT NULL,
  serial INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS models(
  name TEXT NOT NULL, revision TEXT NOT NULL, id TEXT NOT NULL, manifest TEXT NOT NULL, size_bytes INTEGER NOT NULL,
  stored_bytes INTEGER NOT NULL, task TEXT NOT NULL, created REAL NOT NULL, PRIMARY KEY(name, revision));
CREATE TABLE IF NOT EXISTS assignments(
  agent_id TEXT PRIMARY KEY, name TEXT NOT NULL, revision TEXT NOT NULL, serving TEXT NOT NULL,
  generation INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS api_keys(hash BLOB PRIMARY KEY, project TEXT NOT NULL, created REAL NOT NULL, revoked REAL);
CREATE TABLE IF NOT EXISTS dashboard_links(
  hash BLOB PRIMARY KEY, role TEXT NOT NULL, expires REAL NOT NULL, used REAL, at_start INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS dashboard_sessions(
  hash BLOB PRIMARY KEY, role TEXT NOT NULL, created REAL NOT NULL, seen REAL NOT NULL, insecure INTEGER NOT NULL);
"""


class Store:
    """One connection; every call is short and blocks. Times are Unix seconds. Raises sqlite3.Error.

    As a context manager it closes itself, and what SQLite raised inside becomes AgentError `router_data`, exit 77.
    """

    def __init__(self, directory: Path, db: sqlite3.Connection) -> None:
        self.directory = directory
        self.db = db

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Makes what is missing, readable by its owner only: the private keys are in it. Raises AgentError, exit 77."""
        path = directory / FILE
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            db = sqlite3.connect(path, isolation_level=None, timeout=5.0)
        except (OSError, sqlite3.Error) as error:
            raise _unusable(path, error) from error
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")  # what was answered must be on disk: keys and credentials
            db.execute("PRAGMA foreign_keys = ON")
            db.executescript("BEGIN IMMEDIATE;" + _SCHEMA + "COMMIT;")
        except sqlite3.Error as error:
            db.close()
            raise _unusable(path, error) from error
        return cls(directory, db)

    def close(self) -> None:
        self.db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        for cause in leaves(error) if error is not None else ():
            if isinstance(cause, sqlite3.Error):
                raise _unusable(self.directory / FILE, cause) from cause

    def data_version(self) -> int:
        """Another number whenever another connection has committed something."""
        return int(self.db.execute("PRAGMA data_version").fetchone()[0])

    def setting(self, key: str) -> str | None:
        row = self.db.execute("SELECT value FROM settings WHERE key=?", (key,)).fetchone()
        return str(row[0]) if row else None

    def set_setting(self, key: str, value: str) -> None:
        self.db.execute("INSERT OR REPLACE INTO settings(key, value) VALUES(?, ?)", (key, value))

    def save_seen(self, seen: Mapping[str, float]) -> None:
        """When agents were last heard, in one transaction that is not forced to disk: nothing depends on it."""
        if seen:
            self.db.execute("PRAGMA synchronous = NORMAL")
            try:
                with transaction(self.db):
                    rows = [(when, agent_id) for agent_id, when in seen.items()]
                    self.db.executemany("UPDATE agents SET last_seen=? WHERE agent_id=?", rows)
            finally:
                self.db.execute("PRAGMA synchronous = FULL")

    def hurry(self) -> None:
        """From now on waits 0.2 s for another process at most: a serving router has others to answer meanwhile."""
        self.db.execute("PRAGMA busy_timeout = 200")

    @property
    def public_urls(self) -> list[str]:
        """Where agents and clients reach the router; until it was served once, where it listens by default."""
        stored = self.setting("public_urls")
        return list(json.loads(stored)) if stored else [f"http://{DEFAULT_LISTEN}"]

    @property
    def urls_given(self) -> bool:
        """Whether somebody once said what the public URLs are."""
        return self.setting("public_urls_given") is not None

    @property
    def served_before(self) -> bool:
        return self.setting("public_urls") is not None

    def serve_at(self, given: Sequence[str], listening: str) -> None:
        """Keeps the public URLs: those given now, else those given once before, else `listening`.

        The issuer is the first public URL of the first start; agents compare it for ever, so it never changes.
        """
        if given:
            self.set_setting("public_urls", json.dumps([url.rstrip("/") for url in given]))
            self.set_setting("public_urls_given", "1")
        elif not self.urls_given:
            self.set_setting("public_urls", json.dumps([listening]))
        if self.setting("issuer") is None:
            self.set_setting("issuer", self.public_urls[0])

    def keys(self, now: float) -> RouterKeys:
        """Root and signing keys, made at the first call."""
        return keyring.open_keys(self.db, self.setting("issuer") or self.public_urls[0], now)

    def create_join_key(
        self, *, project: str, region: str, uses: int, expires_at: float | None, now: float
    ) -> tuple[int, str]:
        """The key's number, and its text, which is nowhere else. Raises AgentError `join_key_invalid`."""
        return join_keys.create(
            self.db,
            self.keys(now),
            project=project,
            region=region,
            uses=uses,
            expires_at=expires_at,
            tiers=["self_hosted"],
            public_urls=self.public_urls,
            now=now,
        )


@contextmanager
def router_lock(directory: Path) -> Iterator[None]:
    """Held by the one router that serves a directory; it goes with the process. Raises AgentError, exit 14 or 77."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = files.lock(directory / "lock", 0o600)
    except files.Held as held:
        raise AgentError(
            "already_running",
            f"another router with pid {held.pid} uses {directory}",
            hint="stop it, or give this one a directory of its own with --data",
            exit_code=Exit.ALREADY_RUNNING,
        ) from None
    except OSError as error:
        raise _unusable(directory / "lock", error) from error
    try:
        yield
    finally:
        os.close(lock)


def _unusable(path: Path, error: Exception) -> AgentError:
    hint = "check --data: its owner and its mode; a damaged database must be restored from a backup"
    with suppress(OSError):
        if files.disk(path.parent).free < _ROOM:
            hint = "its disk is full: free a few megabytes elsewhere, then `router model rm` or `gc` can free more"
    return AgentError(
        "router_data",
        f"the router's database {path} cannot be used: {error}",
        hint=hint,
        exit_code=Exit.STATE,
    )
