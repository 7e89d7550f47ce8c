"""A model server on loopback (the router's own endpoints behind a layer of faults), and a cache that uses it."""

import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import hypercorn.trio
import pytest
import trio
from fakes.disk import small_disk
from fakes.hostile import cache_of
from fakes.models import ModelServer, Source
from hypercorn.config import Config

from xim_agent.cache.service import Cache
from xim_agent.mesh.messages import ModelRef
from xim_agent.router.publish import PublishedModel, publish


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three chunks in one file (zstd, raw, short), one in another that equals the first, small and empty files."""
    root = tmp_path_factory.mktemp("model")
    chunk = 16 * 1024 * 1024
    rand = random.Random(7)
    soft = rand.randbytes(chunk // 64) * 64
    (root / "model.safetensors").write_bytes(soft + rand.randbytes(chunk) + rand.randbytes(70_001))
    (root / "same.safetensors").write_bytes(soft)
    (root / "config.json").write_bytes(b'{"a": 1}')
    (root / "sub" / "deep").mkdir(parents=True)
    (root / "sub" / "deep" / "vocab.txt").write_bytes(b"a\nb\n" * 5000)
    (root / "empty.txt").touch()
    return root


@pytest.fixture(scope="module")
def published(model_files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PublishedModel]:
    data = tmp_path_factory.mktemp("router")
    return data, publish(model_files, "tiny", "r1", data)


def reference(p: PublishedModel) -> ModelRef:
    return ModelRef(p.id, p.name, p.revision, f"sha256:{p.manifest_sha256}", p.size_bytes)


@pytest.fixture
def model(published: tuple[Path, PublishedModel]) -> ModelRef:
    return reference(published[1])


@pytest.fixture
async def server(published: tuple[Path, PublishedModel], nursery: trio.Nursery) -> ModelServer:
    server = ModelServer(published[0])
    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.graceful_timeout = 0
    config.loglevel = "CRITICAL"
    server.url = (await nursery.start(partial(hypercorn.trio.serve, server, config)))[0]  # type: ignore[arg-type]
    return server


@pytest.fixture
async def source(server: ModelServer) -> AsyncIterator[Source]:
    async with httpx.AsyncClient(base_url=server.url, trust_env=False) as client:
        yield Source(client)


@pytest.fixture
def open_cache(tmp_path: Path, source: Source) -> Callable[..., Cache]:
    def make(**changes: Any) -> Cache:
        usual: dict[str, Any] = {"directory": tmp_path / "cache", "source": source, "max_bytes": 10**9}
        return cache_of(**(usual | changes))

    return make


@pytest.fixture
def same_tree() -> Callable[[Path, Path], None]:
    def check(path: Path, original: Path) -> None:
        def tree(root: Path) -> dict[str, bytes]:
            return {
                p.relative_to(root).as_posix(): p.read_bytes()
                for p in root.rglob("*")
                if p.is_file() and p.name != ".xim-manifest"
            }

        assert tree(path) == tree(original)

    return check


@pytest.fixture
def disk_usage() -> Callable[[Path], int]:
    def du(root: Path) -> int:
        total = root.lstat().st_blocks * 512
        for directory, folders, names in os.walk(root):
            total += sum(os.lstat(os.path.join(directory, n)).st_blocks * 512 for n in [*folders, *names])  # noqa: PTH118
        return total

    return du


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 64 MiB."""
    if os.geteuid() != 0:
        yield tmp_path  # the test runs elsewhere, see below
        return
    with small_disk(tmp_path / "disk", 64 * 1024 * 1024) as disk:
        yield disk


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Who is not root mounts in a user namespace, where the test then runs in a pytest of its own."""
    if "tmpfs" not in pyfuncitem.fixturenames or os.geteuid() == 0:
        return None
    command = ["unshare", "-rm", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    options: dict[str, Any] = {"cwd": pyfuncitem.config.rootpath, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, **options)
    assert done.returncode == 0, f"as root of a user namespace, which a tmpfs takes:\n{done.stdout}"
    return True
