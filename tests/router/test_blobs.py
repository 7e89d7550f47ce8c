"""The endpoints over a real server."""

import random
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import httpx
import hypercorn.trio
import pytest
import trio
import zstandard
from hypercorn.config import Config
from starlette.applications import Starlette
from starlette.routing import Route

from xim_agent.router.blobs import blob_endpoint, manifest_endpoint
from xim_agent.router.publish import PublishedModel, publish


@pytest.fixture
def published(tmp_path: Path) -> PublishedModel:
    root = tmp_path / "model"
    root.mkdir()
    (root / "w.safetensors").write_bytes(random.Random(1).randbytes(1_000_000))
    for i in range(20):
        (root / f"{i}.json").write_text(str(i))
    return publish(root, "m", "r", tmp_path / "data")


@pytest.fixture
def blob(published: PublishedModel, tmp_path: Path) -> tuple[str, bytes]:
    path = max((p for p in (tmp_path / "data/models/blobs").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    return path.name, path.read_bytes()


@pytest.fixture
async def client(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[httpx.AsyncClient]:
    app = Starlette(
        routes=[
            Route("/v1/models/manifests/{sha256}", manifest_endpoint),
            Route("/v1/models/blobs/{sha256}", blob_endpoint),
        ]
    )
    app.state.data_dir = tmp_path / "data"
    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.graceful_timeout = 0
    config.loglevel = "CRITICAL"
    urls = await nursery.start(partial(hypercorn.trio.serve, app, config))  # type: ignore[arg-type]
    async with httpx.AsyncClient(base_url=urls[0] + "/v1/models", trust_env=False) as client:
        yield client


async def test_a_blob_whole(client: httpx.AsyncClient, blob: tuple[str, bytes]) -> None:
    reply = await client.get(f"/blobs/{blob[0]}", headers={"accept-encoding": "zstd, gzip"})
    assert (reply.status_code, reply.content) == (200, blob[1])
    assert reply.headers["etag"] == f'"{blob[0]}"'
    assert reply.headers["content-length"] == str(len(blob[1]))
    assert "content-encoding" not in reply.headers


N = 1_000_000
RANGES = [
    ("bytes=0-0", 206, (0, 1)),
    ("bytes=5-", 206, (5, N)),
    ("bytes=5-9", 206, (5, 10)),
    ("Bytes=5-9", 206, (5, 10)),
    ("bytes=999999-", 206, (N - 1, N)),
    ("bytes=5-99999999", 206, (5, N)),
    ("bytes=-10", 206, (N - 10, N)),
    ("bytes=-99999999", 206, (0, N)),
    ("bytes=1000000-", 416, None),
    ("bytes=1000000-1000005", 416, None),
    ("bytes=-0", 416, None),
    ("bytes=9-5", 200, (0, N)),
    ("bytes=0-1,5-6", 200, (0, N)),
    ("bytes=-", 200, (0, N)),
    ("items=0-1", 200, (0, N)),
    ("bytes=x-", 200, (0, N)),
]


@pytest.mark.parametrize(("header", "status", "span"), RANGES)
async def test_ranges(
    client: httpx.AsyncClient, blob: tuple[str, bytes], header: str, status: int, span: tuple[int, int] | None
) -> None:
    reply = await client.get(f"/blobs/{blob[0]}", headers={"range": header})
    assert reply.status_code == status
    assert reply.content == (blob[1][slice(*span)] if span else b"")
    expected = {206: span and f"bytes {span[0]}-{span[1] - 1}/{N}", 416: f"bytes */{N}"}.get(status)
    assert reply.headers.get("content-range") == expected


async def test_a_range_of_another_version_is_not_served(client: httpx.AsyncClient, blob: tuple[str, bytes]) -> None:
    for etag, status in (('"other"', 200), (f'"{blob[0]}"', 206)):
        reply = await client.get(f"/blobs/{blob[0]}", headers={"range": "bytes=5-", "if-range": etag})
        assert reply.status_code == status


async def test_head_and_not_modified(client: httpx.AsyncClient, blob: tuple[str, bytes]) -> None:
    head = await client.head(f"/blobs/{blob[0]}")
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(N), b"")
    head = await client.head(f"/blobs/{blob[0]}", headers={"range": "bytes=5-9"})
    assert (head.status_code, head.headers["content-length"]) == (200, str(N))  # Range is for GET alone
    for tags in (f'"x", "{blob[0]}"', f'W/"{blob[0]}"', "*"):
        reply = await client.get(f"/blobs/{blob[0]}", headers={"if-none-match": tags})
        assert reply.status_code == 304


@pytest.mark.parametrize("name", ["0" * 64, "x", "..%2f..%2frouter.sqlite", "A" * 64])
@pytest.mark.parametrize("kind", ["blobs", "manifests"])
async def test_what_is_not_there_is_not_found(client: httpx.AsyncClient, tmp_path: Path, kind: str, name: str) -> None:
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data/router.sqlite").write_text("secret")
    reply = await client.get(f"/{kind}/{name}")
    assert reply.status_code == 404
    assert "secret" not in reply.text


@pytest.mark.parametrize(
    ("accept", "encoded"),
    [("zstd", True), ("gzip, zstd;q=0.5", True), ("gzip", False), ("zstd;q=0", False), ("", False)],
)
async def test_manifests_are_packed_for_those_who_can_read_it(
    client: httpx.AsyncClient, published: PublishedModel, tmp_path: Path, accept: str, encoded: bool
) -> None:
    raw = (tmp_path / "data/models/manifests" / f"{published.manifest_sha256}.json").read_bytes()
    async with client.stream(
        "GET", f"/manifests/{published.manifest_sha256}", headers={"accept-encoding": accept}
    ) as reply:
        body = b"".join([piece async for piece in reply.aiter_raw()])
    assert (reply.headers.get("content-encoding") == "zstd") == encoded
    assert (zstandard.ZstdDecompressor().decompressobj().decompress(body) if encoded else body) == raw
