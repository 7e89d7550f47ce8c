import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

BUILD = Path(__file__).parents[2] / "build"


class Installer:
    """Stands for the commands that `ensure` runs; `installs` is how often pip would have installed something."""

    def __init__(self) -> None:
        self.installs = 0
        self.works = True

    def __call__(self, command: list[str], **env: str) -> None:
        if "install" in command:
            self.installs += 1
            if not self.works:
                sys.exit("failed")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BUILD))
    monkeypatch.delitem(sys.modules, "environment", raising=False)
    return importlib.import_module("environment")


@pytest.fixture
def installer(environment: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Installer:
    made = Installer()
    monkeypatch.setattr(environment, "run", made)
    return made


def test_second_run_installs_nothing_and_says_so(
    environment: ModuleType, installer: Installer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment.ensure(tmp_path / "venv", ["a==1"])
    capsys.readouterr()
    environment.ensure(tmp_path / "venv", ["a==1"], flags=lambda: pytest.fail("asked for although nothing is missing"))
    said = capsys.readouterr()
    assert installer.installs == 1
    assert said.out == ""
    assert "nothing to install" in said.err


@pytest.mark.parametrize("change", ["packages", "key", "directory"])
def test_what_changed_is_installed_again(
    environment: ModuleType, installer: Installer, tmp_path: Path, change: str
) -> None:
    venv = tmp_path / "venv"
    environment.ensure(venv, ["a==1"], key="k")
    if change == "directory":  # scripts of a virtual environment name its place
        venv = venv.rename(tmp_path / "moved")
    environment.ensure(venv, ["a==2"] if change == "packages" else ["a==1"], key="l" if change == "key" else "k")
    assert installer.installs == 2


def test_an_installation_that_failed_is_taken_up_again(
    environment: ModuleType, installer: Installer, tmp_path: Path
) -> None:
    environment.ensure(tmp_path / "venv", ["a==1"])
    installer.works = False
    with pytest.raises(SystemExit):
        environment.ensure(tmp_path / "venv", ["a==2"])
    installer.works = True
    environment.ensure(tmp_path / "venv", ["a==1"])  # what was complete before may be half overwritten
    assert installer.installs == 3


def test_digest_sees_names_and_contents(
    environment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    seen = set()
    for name, text in [("a.py", "1"), ("a.py", "2"), ("b.py", "2")]:
        folder = tmp_path / "src"
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        (folder / name).write_text(text)
        seen.add(environment.digest([folder]))
    assert len(seen) == 3
