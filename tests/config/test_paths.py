import os
from pathlib import Path

import pytest

from xim_agent.config.paths import runtime_directory
from xim_agent.errors import AgentError, Exit


def refuse(*_: object, **__: object) -> None:
    raise OSError(30, "Read-only file system")


@pytest.fixture
def short(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Names below it stay short enough for a socket's address."""
    directory = tmp_path_factory.mktemp("r")
    monkeypatch.chdir(directory)
    return directory


def test_a_directory_that_is_0700_already_needs_no_chmod(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (short / "run").mkdir(mode=0o700)
    monkeypatch.setattr(Path, "chmod", refuse)
    assert runtime_directory(short / "config", {"RUNTIME_DIRECTORY": str(short / "run")}) == short / "run"


def test_where_nothing_can_be_written_the_next_place_is_taken(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (short / "open").mkdir(mode=0o755)
    (short / "full").mkdir(mode=0o700)
    monkeypatch.setattr(Path, "chmod", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "full")
    for name in ("open", "full"):
        found = runtime_directory(short / "c", {"RUNTIME_DIRECTORY": str(short / name)})
        assert found == short / "c" / "run"


def test_without_any_place_it_says_where_it_looked(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(AgentError) as failed:
        runtime_directory(short / "c", {"RUNTIME_DIRECTORY": str(short / "x")})
    assert failed.value.exit_code == Exit.STATE
    assert str(short / "x") in failed.value.message
