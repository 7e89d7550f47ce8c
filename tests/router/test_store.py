"""The router's database when it is busy or full, and the lock of its directory."""

import logging
import os
import sqlite3
from pathlib import Path

import pytest
from fakes.agent import FakeAgent, running, until

from xim_agent.errors import AgentError
from xim_agent.router import app
from xim_agent.router.store import Store, router_lock


def test_one_router_per_directory(tmp_path: Path) -> None:
    directory = tmp_path / "router"
    with router_lock(directory):
        with pytest.raises(AgentError) as caught, router_lock(directory):
            pass
        assert (caught.value.code, caught.value.exit_code) == ("already_running", 14)
        assert f"pid {os.getpid()} " in caught.value.message
    with router_lock(directory):
        assert (directory / "lock").read_text() == f"{os.getpid()}\n"


def test_lock_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to("elsewhere")
    with pytest.raises(AgentError) as caught, router_lock(tmp_path):
        pass
    assert (caught.value.code, caught.value.exit_code) == ("router_data", 77)


def test_keys_are_read_while_another_process_writes(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store, Store.open(tmp_path) as other:
        root = store.keys(1.0).root_jwk()
        other.db.execute("BEGIN IMMEDIATE")
        store.hurry()
        assert store.keys(2.0).root_jwk() == root


def test_what_was_seen_is_not_lost_and_what_must_be_durable_stays_so(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store, Store.open(tmp_path) as other:
        store.hurry()
        other.db.execute("BEGIN IMMEDIATE")
        with pytest.raises(sqlite3.OperationalError):
            store.save_seen({"agent": 1.0})
        assert store.db.execute("PRAGMA synchronous").fetchone() == (2,)
        assert not store.db.in_transaction


def test_what_sqlite_says_has_a_name(tmp_path: Path) -> None:
    error = ExceptionGroup("of a nursery", [sqlite3.OperationalError("disk I/O error")])
    with pytest.raises(AgentError) as caught, Store.open(tmp_path):
        raise error
    assert (caught.value.code, caught.value.exit_code) == ("router_data", 77)


async def test_router_outlives_a_busy_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests that need it fail for the moment, the others go on, and nothing is forgotten."""
    monkeypatch.setattr(app, "SEEN_SECONDS", 0.0)
    async with running(tmp_path / "router") as bench:
        agent = await bench.agent()
        key = bench.join_key()
        with sqlite3.connect(tmp_path / "router" / "router.sqlite", isolation_level=None) as other:
            other.execute("BEGIN IMMEDIATE")
            await agent.poll(wait_ms=0)
            late = FakeAgent(bench.url)
            bench.agents.append(late)
            with caplog.at_level(logging.WARNING):
                refused = await late.enroll(key)
                await until(lambda: any("does not answer" in r.getMessage() for r in caplog.records))
            assert (refused.status_code, refused.json()["code"]) == (503, "router_busy")
            await agent.poll(wait_ms=0)
            other.execute("COMMIT")
        other.close()
        assert (await late.enroll(key)).status_code == 201
        query = "SELECT 1 FROM agents WHERE agent_id=? AND last_seen IS NOT NULL"
        await until(lambda: bench.store.db.execute(query, (agent.id,)).fetchone())
