"""One process at a time, whatever becomes of the lock file and of who held it. Holders are real processes."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from xim_agent.cache.look import look
from xim_agent.cache.store import Store
from xim_agent.errors import AgentError, Exit

# Holds the cache, and has a child that outlives it: its descriptors are all that could keep the lock.
_HOLDER = """
import subprocess, sys
from pathlib import Path
from xim_agent.cache.look import look
from xim_agent.cache.store import Store
store = Store.open(Path(sys.argv[1]))
child = subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A cache and the process that has it."""
    root = tmp_path / "cache"
    command = [sys.executable, "-c", _HOLDER, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            yield root, process
        finally:
            os.kill(child, 9)
            process.kill()


def nothing(lock: Path) -> None:
    pass


def replaced(lock: Path) -> None:
    lock.unlink()
    lock.write_bytes(b"1\n")


def renamed_over(lock: Path) -> None:
    fresh = lock.with_name("fresh")
    fresh.write_bytes(b"1\n")
    fresh.rename(lock)


@pytest.mark.parametrize("change", [nothing, Path.unlink, replaced, renamed_over])
def test_there_is_never_a_second_holder(
    held: tuple[Path, subprocess.Popen[str]], change: Callable[[Path], None]
) -> None:
    root, _ = held
    change(root / "lock")
    with pytest.raises(AgentError) as e:
        Store.open(root)
    assert (e.value.code, e.value.exit_code) == ("cache_in_use", 14)


def test_who_is_refused_hears_who_holds_it_and_since_when(held: tuple[Path, subprocess.Popen[str]]) -> None:
    root, process = held
    os.utime(root / "lock", (1_700_000_000, 1_700_000_000))
    with pytest.raises(AgentError) as e:
        Store.open(root)
    since = datetime.fromtimestamp(1_700_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert f"process {process.pid}, since {since}" in e.value.message


def test_a_killed_holder_blocks_nobody_though_its_child_lives(held: tuple[Path, subprocess.Popen[str]]) -> None:
    root, process = held
    process.kill()
    process.wait()
    Store.open(root).close()


def test_a_cache_that_is_closed_or_fails_to_open_is_free_again(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    Store.open(root).close()
    (root / "FORMAT").write_text("2")
    for _ in range(2):  # the first failure keeps no lock
        with pytest.raises(AgentError) as e:
            Store.open(root)
        assert e.value.code == "cache_format"
    (root / "FORMAT").write_text("1")
    Store.open(root).close()


@pytest.mark.parametrize("folder", ["blobs", "manifests", "ready", "partial", "quarantine", "compile"])
def test_what_another_program_keeps_under_our_names_is_left_alone(tmp_path: Path, folder: str) -> None:
    """As ~/.ollama/models does: a cache would begin with removing it."""
    mine = tmp_path / "models" / folder / "sha256-ab"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"precious")
    for ask in (lambda: Store.open(tmp_path / "models"), lambda: look(tmp_path / "models", 1, tmp_path / "models")):
        with pytest.raises(AgentError, match=f"{folder}/") as e:
            ask()
        assert (e.value.code, e.value.exit_code) == ("cache_format", Exit.STATE)
    assert [p for p in (tmp_path / "models").rglob("*") if p.is_file()] == [mine]
    assert mine.read_bytes() == b"precious"


def test_an_empty_place_with_our_names_becomes_a_cache(tmp_path: Path) -> None:
    """A crash may leave it so, before the cache says what it is."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "lost+found").mkdir()
    Store.open(tmp_path).close()
    assert (tmp_path / "FORMAT").read_text() == "1"
