"""The executable frozen inside a build, as whoever has only a checkout gets it."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import pytest
from fakes import debian, images
from fakes.docker import daemon, data_root

from xim_agent import __version__

pytestmark = [pytest.mark.full, pytest.mark.e2e]

ROOT = Path(__file__).parents[2]
# In place of the Debian 11: build/old-python, which build/release runs and is tested there, finds its work done.
OLD = """FROM xim-test/python
RUN mkdir -p /opt/python/bin && ln -s /usr/bin/python3.11 /opt/python/bin/ && touch /opt/python/complete
"""


def download_wheels(directory: Path) -> None:
    """What build/freeze.lock names."""
    sys.path.insert(0, str(ROOT / "build"))
    try:
        loader = importlib.machinery.SourceFileLoader("release", str(ROOT / "build" / "release"))
        spec = importlib.util.spec_from_loader("release", loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        module.wheels(directory)
    finally:
        sys.path.remove(str(ROOT / "build"))


def test_the_agent_of_an_image_can_be_frozen_in_its_build(
    tmp_path: Path, agent_onedir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    download_wheels(tmp_path / "wheels")
    (tmp_path / "Dockerfile").write_text(OLD)
    with data_root(tmp_path) as data, daemon(data, network=True) as docker:
        docker.load(debian.archive("python3-venv", "libpython3.11", "binutils", "ca-certificates"), "xim-test/python")
        docker("build", "--network", "host", "--tag", "xim-test/old", str(tmp_path))
        images.base(docker)
        with images.served(tmp_path / "wheels") as wheels:
            given = {"AGENT": "from-source", "OLD": "xim-test/old"}
            image = images.build(docker, "xim-router", agent_onedir.parent, wheels, **given)
        said = docker("run", "--rm", "--network", "none", "--entrypoint", "xerotier-xim-agent", image, "--version")
        assert said.startswith(f"xerotier-xim-agent {__version__} ")
