import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from xim_agent import PROTOCOL, __version__

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]


def run(exe: Path, *arguments: str) -> str:
    """In an empty environment, as on a machine without Python."""
    done = subprocess.run([exe, *arguments], env={}, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def runtime_closure() -> set[str]:
    """Normalized names of everything that the project needs to run, as installed here."""
    todo = [Requirement(r) for r in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]]
    found: set[str] = set()
    while todo:
        need = todo.pop()
        name = need.name.lower().replace("_", "-")
        if name in found or (need.marker and not need.marker.evaluate({"extra": ""})):
            continue
        try:
            todo += [Requirement(r) for r in requires(need.name) or []]
        except PackageNotFoundError:
            continue
        found.add(name)
    return found


def test_version_needs_no_python(agent_exe: Path) -> None:
    assert run(agent_exe, "--version") == f"xerotier-xim-agent {__version__} (XIM protocol {PROTOCOL})\n"


def test_plan_of_a_model_on_the_hardware_that_it_printed(agent_exe: Path, toy_model: Path, tmp_path: Path) -> None:
    (tmp_path / "here.json").write_text(run(agent_exe, "plan"))
    lines = run(agent_exe, "plan", "--model", str(toy_model), "--hardware", str(tmp_path / "here.json")).splitlines()
    assert lines[0].startswith("# LlamaForCausalLM (generate) on ")
    assert lines[-1].startswith(f"vllm serve {toy_model} --uds ")


def test_licences_of_all_that_is_bundled_with_their_texts(agent_exe: Path) -> None:
    printed = run(agent_exe, "licenses")
    bundled = {line.split()[1].lower().replace("_", "-") for line in printed.splitlines() if line.startswith("## ")}
    assert not runtime_closure() - bundled
    assert "Permission is hereby granted" in printed  # texts, not names alone
    assert "Apache License" in printed


def test_size(agent_exe: Path) -> None:
    assert agent_exe.stat().st_size <= 40e6
