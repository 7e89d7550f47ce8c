"""The cache against a real server on loopback, with a model of a few kilobytes: what is kept, what is refused."""

import os
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fakes.models import blob_of, done_in, flip, hold, long, shifted, short, status

from xim_agent.cache import codec
from xim_agent.cache.manifest import ManifestRefused
from xim_agent.cache.plan import CacheRefused
from xim_agent.cache.service import Cache
from xim_agent.errors import AgentError
from xim_agent.mesh.messages import ModelRef, Progress
from xim_agent.router.publish import publish

Open = Callable[..., Cache]
SameTree = Callable[[Path, Path], None]


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zstd chunk, a raw one, small and empty files; five chunks in all."""
    root = tmp_path_factory.mktemp("model")
    rand = random.Random(7)
    (root / "model.safetensors").write_bytes(rand.randbytes(5000) + bytes(5000))
    (root / "raw.safetensors").write_bytes(rand.randbytes(5000))
    (root / "same.safetensors").write_bytes(rand.randbytes(0) + b"same" * 100)
    (root / "config.json").write_bytes(b'{"a": 1}')
    (root / "sub" / "deep").mkdir(parents=True)
    (root / "sub" / "deep" / "vocab.txt").write_bytes(b"a\nb\n" * 5000)
    (root / "empty.txt").touch()
    return root


def ignore(_: Progress) -> None:
    pass


async def test_a_ready_model_needs_no_network_also_after_a_restart(
    open_cache: Open, model: ModelRef, server: Any
) -> None:
    async with open_cache() as cache:
        first = await cache.ensure(model, ignore)
        await cache.ensure(model, ignore)
    asked = len(server.asked)
    async with open_cache(source=None) as cache:
        assert await cache.ensure(model, ignore) == first
    assert (len(server.asked), server.manifests) == (asked, 1)


async def test_a_stored_model_comes_back_from_its_chunks(
    open_cache: Open, model: ModelRef, server: Any, model_files: Path, same_tree: SameTree
) -> None:
    async with open_cache() as cache:
        path = await cache.ensure(model, ignore)
        cache.store._retire(path, "gone")
        cache.store.ready.clear()
    async with open_cache(source=None) as cache:
        same_tree(await cache.ensure(model, ignore), model_files)
        assert cache.statistics().hit_bytes > 0


async def test_a_chunk_with_a_flipped_bit_is_fetched_once_more(
    open_cache: Open, model: ModelRef, server: Any, published: Any, model_files: Path, same_tree: SameTree
) -> None:
    digest = blob_of(published, "raw.safetensors")
    server.faults[digest].append(flip)
    async with open_cache() as cache:
        same_tree(await cache.ensure(model, ignore), model_files)
        assert cache.statistics().wrong_blobs == 1
    assert server.times()[digest] == 2


@pytest.mark.parametrize("which", ["model.safetensors", "raw.safetensors", "config.json"])
async def test_a_chunk_that_stays_wrong_refuses_the_model_by_its_name(
    open_cache: Open, model: ModelRef, server: Any, published: Any, which: str
) -> None:
    digest = blob_of(published, which)
    server.faults[digest] += [flip] * 5
    async with open_cache() as cache:
        with pytest.raises(AgentError, match=digest) as e:
            await cache.ensure(model, ignore)
        assert e.value.code == "blob_refused"
        assert not list((cache.store.root / "ready").rglob("*.json"))
        assert not cache.store.has_blob(digest)
    assert server.times()[digest] == 2


@pytest.mark.parametrize("fault", ["short", "long", "shifted"])
async def test_a_router_that_lies_about_lengths_is_refused(
    open_cache: Open, model: ModelRef, server: Any, published: Any, fault: str
) -> None:
    digest = blob_of(published, "config.json")
    server.faults[digest] += [{"short": short, "long": long, "shifted": shifted}[fault]] * 5
    async with open_cache() as cache:
        with pytest.raises(AgentError, match=digest):
            await cache.ensure(model, ignore)
    assert server.times()[digest] == 2


async def test_a_failing_router_is_tried_again_and_said_to_fail(
    open_cache: Open, model: ModelRef, server: Any, published: Any
) -> None:
    digest = blob_of(published, "config.json")
    server.faults[digest] += [status(503), status(500), status(429)]
    async with open_cache() as cache:
        raised: list[str] = []
        cache.health.on_change = lambda: raised.extend(c.code for c in cache.health.conditions())
        await cache.ensure(model, ignore)
        assert "model_fetch" in raised
        assert not cache.health.conditions()
    assert server.times()[digest] == 4


async def test_a_blob_that_the_router_does_not_have_ends_the_fetch(
    open_cache: Open, model: ModelRef, server: Any, published: Any
) -> None:
    server.faults[blob_of(published, "config.json")].append(status(404))
    async with open_cache() as cache:
        with pytest.raises(AgentError, match="blob"):
            await cache.ensure(model, ignore)


async def test_a_manifest_that_is_not_the_assigned_one_is_refused_before_the_first_chunk(
    open_cache: Open, model: ModelRef, server: Any
) -> None:
    for wrong, code in [
        (msgspec.structs.replace(model, size_bytes=model.size_bytes - 1), "sizes"),
        (msgspec.structs.replace(model, name="other"), "manifest_model"),
        (msgspec.structs.replace(model, revision="other"), "manifest_model"),
        (msgspec.structs.replace(model, id="../x"), "model_name"),
        (msgspec.structs.replace(model, manifest="sha256:x"), "manifest_reference"),
    ]:
        async with open_cache() as cache:
            with pytest.raises(ManifestRefused) as e:
                await cache.ensure(wrong, ignore)
            assert e.value.code == code
    assert not server.asked


async def test_a_model_that_does_not_fit_is_refused_before_the_first_chunk(
    open_cache: Open, model: ModelRef, server: Any
) -> None:
    async with open_cache(max_bytes=50_000) as cache:
        with pytest.raises(CacheRefused) as e:
            await cache.ensure(model, ignore)
        assert e.value.needed > model.size_bytes
        assert not list((cache.store.root / "manifests").iterdir())
        assert not list((cache.store.root / "partial").iterdir())
    assert not server.asked


async def test_a_damaged_chunk_in_the_store_is_fetched_again(
    open_cache: Open, model: ModelRef, server: Any, published: Any, model_files: Path, same_tree: SameTree
) -> None:
    digest = blob_of(published, "model.safetensors")
    async with open_cache() as cache:
        path = await cache.ensure(model, ignore)
        cache.store._retire(path, "gone")
        cache.store.ready.clear()
        data = bytearray(cache.store.blob(digest).read_bytes())
        data[100] ^= 1
        cache.store.blob(digest).write_bytes(data)
    async with open_cache() as cache:
        same_tree(await cache.ensure(model, ignore), model_files)
        assert codec.verified(cache.store.blob(digest).read_bytes(), digest)
    assert server.times()[digest] == 2


async def test_a_damaged_ready_copy_is_retired(
    open_cache: Open, model: ModelRef, model_files: Path, same_tree: SameTree
) -> None:
    async with open_cache() as cache:
        path = await cache.ensure(model, ignore)
        (path / "config.json").unlink()
    async with open_cache(source=None) as cache:
        same_tree(await cache.ensure(model, ignore), model_files)


async def test_a_lost_or_damaged_index_is_made_from_the_tree(open_cache: Open, model: ModelRef) -> None:
    async with open_cache() as cache:
        await cache.ensure(model, ignore)
        index = cache.store.root / "index.sqlite"
    for damage in (index.unlink, lambda: index.write_bytes(b"nonsense" * 1000), lambda: other_schema(index)):
        damage()
        async with open_cache(source=None) as cache:
            assert [(m.name, m.id, m.ready > 0) for m in cache.statistics().models] == [("tiny", "tiny", True)]
            await cache.ensure(model, ignore)


def other_schema(path: Path) -> None:
    path.unlink()
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE models(manifest TEXT)")
    db.close()


async def test_a_second_agent_on_the_same_cache_is_told_who_holds_it(open_cache: Open) -> None:
    async with open_cache():
        with pytest.raises(AgentError, match=f"process {os.getpid()}") as e:
            async with open_cache():
                pass
        assert (e.value.code, e.value.exit_code) == ("cache_in_use", 14)


async def test_an_unknown_format_is_left_alone(open_cache: Open, tmp_path: Path) -> None:
    async with open_cache():
        pass
    (tmp_path / "cache/FORMAT").write_text("2")
    with pytest.raises(AgentError, match="'2'"):
        async with open_cache():
            pass


@pytest.mark.parametrize("broken", ["FORMAT", "index.sqlite", "lock"])
async def test_a_directory_that_cannot_be_used_is_named(open_cache: Open, tmp_path: Path, broken: str) -> None:
    root = tmp_path / "cache"
    (root / broken).mkdir(parents=True)
    with pytest.raises(AgentError, match=str(root)) as e:
        async with open_cache():
            pass
    assert (e.value.code, e.value.exit_code) == ("cache_directory", 77)


async def test_ready_directories_without_their_marker_are_no_models(open_cache: Open, model: ModelRef) -> None:
    async with open_cache() as cache:
        path = await cache.ensure(model, ignore)
        (path / ".xim-manifest").unlink()
    async with open_cache(source=None) as cache:
        assert not path.exists()
        assert await cache.ensure(model, ignore) == path


async def test_links_planted_in_the_cache_are_not_followed(
    open_cache: Open,
    model: ModelRef,
    tmp_path: Path,
    server: Any,
    published: Any,
    model_files: Path,
    same_tree: SameTree,
) -> None:
    canary = tmp_path / "canary"
    canary.mkdir()
    digest = blob_of(published, "sub/deep/vocab.txt")
    server.faults[digest] += [flip] * 2
    async with open_cache() as cache:
        server.gate = hold(digest, lambda: len(done_in(cache.store.root)) == 4, lambda: None)
        with pytest.raises(AgentError):
            await cache.ensure(model, ignore)
        files = next((cache.store.root / "partial").glob("*/files"))
        (files / "sub").symlink_to(canary, target_is_directory=True)
        same_tree(await cache.ensure(model, ignore), model_files)
    assert not list(canary.iterdir())


async def test_another_revision_shares_the_chunks_that_are_equal(
    open_cache: Open, model: ModelRef, server: Any, published: Any, model_files: Path, tmp_path: Path
) -> None:
    second = tmp_path / "second"
    second.mkdir()
    (second / "model.safetensors").write_bytes((model_files / "model.safetensors").read_bytes())
    (second / "config.json").write_bytes(b'{"a": 2}')
    p = publish(second, "tiny", "r2", published[0])
    other = ModelRef(p.id, p.name, p.revision, f"sha256:{p.manifest_sha256}", p.size_bytes)
    async with open_cache() as cache:
        await cache.ensure(model, ignore)
        server.asked.clear()
        await cache.ensure(other, ignore)
    assert len(server.asked) == 1


async def test_the_same_revision_with_other_content_does_not_touch_the_one_that_runs(
    open_cache: Open, model: ModelRef, published: Any, tmp_path: Path
) -> None:
    second = tmp_path / "second"
    second.mkdir()
    (second / "config.json").write_bytes(b'{"a": 3}')
    p = publish(second, "tiny", "r1", published[0])
    other = ModelRef(p.id, p.name, p.revision, f"sha256:{p.manifest_sha256}", p.size_bytes)
    async with open_cache() as cache:
        first = await cache.ensure(model, ignore)
        again = await cache.ensure(other, ignore)
        assert first != again
        assert (first / "config.json").read_bytes() == b'{"a": 1}'
        assert (again / "config.json").read_bytes() == b'{"a": 3}'
    async with open_cache(source=None) as cache:
        assert (await cache.ensure(model, ignore), await cache.ensure(other, ignore)) == (first, again)
