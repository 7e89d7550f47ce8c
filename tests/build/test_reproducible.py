"""The same sources give the same bytes: in another environment, at another place. And old systems can run a release."""

import faulthandler
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.full]
ROOT = Path(__file__).parents[2]


def frozen(checkout: Path, scratch: Path) -> dict[str, str]:
    """Freezes `checkout` in a new environment; the digest of every file."""
    command = [checkout / "build" / "freeze", "--work", scratch / "work", "--dist", scratch / "dist"]
    subprocess.run(command, check=True)
    files = [f for f in (scratch / "dist").rglob("*") if f.is_file()]
    return {str(f.relative_to(scratch)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_two_environments_at_two_places_give_the_same_bytes(tmp_path: Path) -> None:
    other = tmp_path / "another" / "place"
    other.mkdir(parents=True)
    for name in ("xim_agent", "build"):
        shutil.copytree(ROOT / name, other / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, other)
    one, two = frozen(ROOT, tmp_path / "1"), frozen(other, tmp_path / "2")
    assert len(one) > 100
    assert {name for name in one | two if one.get(name) != two.get(name)} == set()


def test_a_release_runs_on_glibc_2_34(tmp_path: Path) -> None:
    """build/release itself starts what it made in its old system and looks at the versions that the files need."""
    if os.geteuid() != 0 or shutil.which("mmdebstrap") is None:
        pytest.fail("needs root and: apt install mmdebstrap debian-archive-keyring")
    faulthandler.cancel_dump_traceback_later()  # compiling Python takes longer than any other test
    done = subprocess.run([ROOT / "build" / "release"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "for glibc 2." in done.stderr
    made = ROOT / "dist" / "release" / "xerotier-xim-agent"
    assert made.stat().st_size <= 25e6
    printed = subprocess.run([made, "licenses"], capture_output=True, text=True, check=True).stdout
    assert "## OpenSSL 3.5." in printed, "one that is supported until 2030"
