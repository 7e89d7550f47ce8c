"""Publishers that are killed, have no room, or read what changes."""

import errno
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from xim_agent import files
from xim_agent.cli.router import command
from xim_agent.errors import AgentError
from xim_agent.router.publish import publish


def router(data: Path, *args: str) -> Result:
    return CliRunner().invoke(command, [*args, "--data", str(data)])


def model(directory: Path, seed: int) -> Path:
    """One file that all models share, one that only this one has."""
    directory.mkdir()
    (directory / "common.safetensors").write_bytes(random.Random(0).randbytes(5000))
    (directory / "own.safetensors").write_bytes(random.Random(seed).randbytes(7000))
    return directory


def stored(data: Path) -> set[str]:
    return {p.name for kind in ("blobs", "manifests") for p in (data / "models" / kind).rglob("*") if p.is_file()}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for seed, name in ((1, "one"), (2, "two")):
        done = router(tmp_path / "d", "model", "publish", str(model(tmp_path / name, seed)), "--name", name)
        assert done.exit_code == 0
    return tmp_path / "d"


KILLED = """
import os, signal, sys
from pathlib import Path
from xim_agent import files
from xim_agent.router.publish import publish
steps = int(sys.argv[3])
def step(real):
    def call(*args, **kw):
        global steps
        steps -= 1
        if steps < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kw)
    return call
for name in ("open", "pwrite", "fchmod", "fsync", "rename"):
    setattr(os, name, step(getattr(os, name)))
publish(Path(sys.argv[1]), "m", "r", Path(sys.argv[2]))
"""


@pytest.mark.parametrize("steps", [3, 4, 5, 6, 7, 12, 18, 19, 20, 21])
def test_a_killed_publish_leaves_nothing_half_and_the_next_one_goes_on(tmp_path: Path, steps: int) -> None:
    source, data = model(tmp_path / "m", 1), tmp_path / "d"
    words = [sys.executable, "-c", KILLED, str(source), str(data), str(steps)]
    assert subprocess.run(words).returncode == -signal.SIGKILL
    for path in (data / "models/blobs").rglob("*"):
        assert path.is_dir() or path.name.startswith(".tmp-") or len(path.read_bytes()) in (5000, 7000)
    assert router(data, "model", "publish", str(source), "--name", "m").exit_code == 0
    assert router(data, "model", "gc").exit_code == 0
    assert len(stored(data)) == 3


def test_a_full_disk_is_named_and_leaves_nothing_half(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, content: bytes, offset: int) -> None:
        os.write(fd, bytes(content)[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = stored(data)
    source = model(tmp_path / "three", 3)
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_all", full)
        with pytest.raises(AgentError) as e:
            publish(source, "three", None, data)
    assert (e.value.code, e.value.exit_code) == ("disk_full", 77)
    assert stored(data) == before
    publish(source, "three", None, data)


@pytest.mark.parametrize("name", ["common.safetensors", "own.safetensors"])
def test_a_file_that_changes_while_it_is_published_is_noticed(data: Path, tmp_path: Path, name: str) -> None:
    """Same length, and its time set back: also when it was read already."""
    source = model(tmp_path / "three", 3)
    before = {p for p in stored(data) if p.endswith(".json")}

    def change(done: int, total: int) -> None:
        if done == total:
            info = (source / name).stat()
            with (source / name).open("r+b") as file:
                file.write(b"changed")
            os.utime(source / name, ns=(info.st_atime_ns, info.st_mtime_ns))

    with pytest.raises(AgentError, match=name) as e:
        publish(source, "three", None, data, progress=change)
    assert (e.value.code, e.value.exit_code) == ("model_changed", 77)
    assert {p for p in stored(data) if p.endswith(".json")} == before


def test_the_routers_own_directory_is_never_published(tmp_path: Path) -> None:
    source = model(tmp_path / "m", 1)
    (tmp_path / "link").symlink_to(source)
    for data in (source / "router", source, tmp_path / "link/router"):
        with pytest.raises(AgentError, match="private keys") as e:
            publish(source, "m", None, data)
        assert e.value.exit_code == 2


@pytest.mark.parametrize("config", ['{"architectures": 5}', "[" * 100_000, "{", '{"architectures": ["XModel"]}'])
def test_a_strange_config_does_not_stop_it(tmp_path: Path, config: str) -> None:
    source = model(tmp_path / "m", 1)
    (source / "config.json").write_text(config)
    assert router(tmp_path / "d", "model", "publish", str(source), "--name", "m").exit_code == 0
