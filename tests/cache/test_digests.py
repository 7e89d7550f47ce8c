"""A wrong digest at every level: what is wrong is named, and nothing of it is published as ready."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fakes.hostile import Local, cache_of
from fakes.models import done_in, hold

from xim_agent.cache import codec
from xim_agent.cache.index import Entry
from xim_agent.cache.manifest import Chunk, File, Manifest, encode
from xim_agent.cache.service import Cache
from xim_agent.errors import AgentError, Exit
from xim_agent.mesh.messages import ModelRef, Progress

NAME = "model.safetensors"
PLAIN = bytes(range(256)) * 300
OTHER = bytes(reversed(range(256))) * 300


def ignore(_: Progress) -> None:
    pass


def digest(data: bytes) -> str:
    return sha256(data).hexdigest()


def packed(data: bytes, name: Any = "zstd", size: int | None = None) -> tuple[Chunk, bytes]:
    stored = codec.encode(data, name)
    return Chunk(digest(stored), len(stored), len(data) if size is None else size, name), stored


class World:
    """A router with one model of two files, `other.txt` being right in any case."""

    def __init__(self, root: Path) -> None:
        self.source, self.root = Local(root), root / "cache"

    def model(self, chunk: Chunk, stored: bytes, claimed: bytes) -> ModelRef:
        """`claimed`: what the whole file is said to be."""
        right, bytes_of_it = packed(b"right", "raw")
        files = (
            File(NAME, chunk.size, digest(claimed), (chunk,)),
            File("other.txt", 5, digest(b"right"), (right,)),
        )
        data = encode(Manifest(1, "m", "r", files))
        self.source.manifests[digest(data)] = data
        self.source.blobs |= {chunk.blob: stored, right.blob: bytes_of_it}
        return ModelRef("m", "m", "r", f"sha256:{digest(data)}", chunk.size + 5)

    def cache(self) -> Cache:
        return cache_of(self.root, self.source)

    async def refused(self, model: ModelRef) -> AgentError:
        async with self.cache() as cache:
            with pytest.raises(AgentError) as e:
                await cache.ensure(model, ignore)
            assert e.value.exit_code == Exit.CONFIG
            assert not cache.store.ready
        assert not list((self.root / "ready").glob("*/*"))
        return e.value

    async def whole(self, model: ModelRef) -> None:
        async with self.cache() as cache:
            path = await cache.ensure(model, ignore)
            assert (path / NAME).read_bytes() == PLAIN
            assert (path / "other.txt").read_bytes() == b"right"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.mark.parametrize(
    "change", [lambda b: b[:-1] + b" ", lambda b: b + b" ", lambda b: b[:-1], lambda b: b"", lambda b: b"{}"]
)
async def test_another_manifest(world: World, change: Callable[[bytes], bytes]) -> None:
    model = world.model(*packed(PLAIN), PLAIN)
    name = model.manifest.removeprefix("sha256:")
    right = world.source.manifests[name]
    world.source.manifests[name] = change(right)
    error = await world.refused(model)
    assert error.code == "manifest_digest"
    assert name in error.message
    assert not world.source.asked
    assert not list((world.root / "manifests").iterdir())
    world.source.manifests[name] = right
    await world.whole(model)


@pytest.mark.parametrize("name", ["raw", "zstd", "zstd-split2"])
async def test_other_bytes_of_the_same_length_for_a_chunk(world: World, name: str) -> None:
    chunk, stored = packed(PLAIN, name)
    model = world.model(chunk, stored, PLAIN)
    world.source.blobs[chunk.blob] = bytes([stored[0] ^ 1]) + stored[1:]
    error = await world.refused(model)
    assert error.code == "blob_refused"
    assert chunk.blob in error.message
    assert world.source.asked.count(chunk.blob) == 2
    assert not list(world.root.glob(f"blobs/*/{chunk.blob}"))
    world.source.blobs[chunk.blob] = stored
    await world.whole(model)


async def test_a_right_chunk_of_another_file(world: World) -> None:
    """Its digest is right, its length too, so that only the whole file shows it."""
    model = world.model(*packed(OTHER), PLAIN)
    error = await world.refused(model)
    assert error.code == "file_digest"
    assert NAME in error.message
    assert not list((world.root / "partial").iterdir())
    before = len(world.source.asked)
    assert (await world.refused(model)).code == "file_digest"
    assert len(world.source.asked) <= before + 1  # what is stored is right: nothing is fetched again


async def test_files_are_hashed_until_they_were_right_once(world: World) -> None:
    """Only the digest of the whole file shows what is wrong here; the index says whether it has to be looked at."""
    model = world.model(*packed(OTHER), PLAIN)
    manifest = model.manifest.removeprefix("sha256:")
    assert (await world.refused(model)).code == "file_digest"
    async with world.cache() as cache:
        cache.store.index.add(Entry(manifest, "m", "m", "r", model.size_bytes, 0.0, verified=1))
    async with world.cache() as cache:
        path = await cache.ensure(model, ignore)
        assert (path / NAME).read_bytes() == OTHER
        assert cache.store.index.verified(manifest)
        cache.store.retire_damaged(manifest)
    (world.root / "index.sqlite").unlink()
    assert (await world.refused(model)).code == "file_digest"


async def test_files_that_were_right_are_known_as_such(world: World) -> None:
    """A ready copy that is only found proves nothing: nobody hashed it since the index was lost."""
    model = world.model(*packed(PLAIN), PLAIN)
    manifest = model.manifest.removeprefix("sha256:")
    await world.whole(model)
    async with world.cache() as cache:
        assert cache.store.index.verified(manifest)
    (world.root / "index.sqlite").unlink()
    await world.whole(model)
    async with world.cache() as cache:
        assert not cache.store.index.verified(manifest)
        cache.store.retire_damaged(manifest)
    await world.whole(model)
    async with world.cache() as cache:
        assert cache.store.index.verified(manifest)


@pytest.mark.parametrize(
    ("data", "claimed"),
    [(PLAIN, len(PLAIN) + 1), (PLAIN, len(PLAIN) - 1), (b"", 10)],
    ids=["shorter", "longer", "empty"],
)
@pytest.mark.parametrize("name", ["zstd", "zstd-split2"])
async def test_a_chunk_that_unpacks_to_another_size(world: World, name: str, data: bytes, claimed: int) -> None:
    chunk, stored = packed(data, name, claimed)
    if chunk.stored > claimed:
        chunk = msgspec.structs.replace(chunk, size=chunk.stored)
    error = await world.refused(world.model(chunk, stored, PLAIN))
    assert error.code == "chunk_undecodable"
    assert NAME in error.message
    assert chunk.blob in error.message


async def test_a_frame_with_the_right_digest_that_is_damaged_inside(world: World) -> None:
    chunk, stored = packed(PLAIN)
    damaged = stored[:-1] + bytes([stored[-1] ^ 1])
    chunk = msgspec.structs.replace(chunk, blob=digest(damaged))
    error = await world.refused(world.model(chunk, damaged, PLAIN))
    assert (error.code, chunk.blob in error.message) == ("chunk_undecodable", True)


# -- on the disk -----------------------------------------------------------------------------------------------------

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "one bit": lambda b: b[:20] + bytes([b[20] ^ 1]) + b[21:],
    "short": lambda b: b[:-1],
    "long": lambda b: b + b"\0",
    "empty": lambda b: b"",
    "zeros": lambda b: bytes(len(b)),
}


def damage(path: Path, change: Callable[[bytes], bytes]) -> None:
    data = path.read_bytes()
    path.chmod(0o640)
    path.write_bytes(change(data))


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("places", ["blobs/*/{blob}", "manifests/*", "both"])
async def test_stored_bytes_that_are_damaged_are_fetched_again(
    world: World, places: str, change: Callable[[bytes], bytes]
) -> None:
    chunk, stored = packed(PLAIN)
    model = world.model(chunk, stored, PLAIN)
    await world.whole(model)
    async with world.cache() as cache:
        cache.store.retire_damaged(model.manifest.removeprefix("sha256:"))
    for pattern in ("blobs/*/{blob}", "manifests/*") if places == "both" else (places,):
        (path,) = world.root.glob(pattern.format(blob=chunk.blob))
        damage(path, change)
    await world.whole(model)


async def test_another_good_manifest_under_the_name_of_the_right_one_is_not_used(world: World) -> None:
    model = world.model(*packed(PLAIN), PLAIN)
    await world.whole(model)
    (path,) = world.root.glob("manifests/*")
    damage(path, lambda b: b.replace(digest(PLAIN).encode(), digest(OTHER).encode()))
    await world.whole(model)
    assert digest(path.read_bytes()) == path.stem


async def test_a_damaged_chunk_whose_router_is_wrong_too_is_refused(world: World) -> None:
    chunk, stored = packed(PLAIN)
    model = world.model(chunk, stored, PLAIN)
    await world.whole(model)
    async with world.cache() as cache:
        cache.store.retire_damaged(model.manifest.removeprefix("sha256:"))
    (path,) = world.root.glob(f"blobs/*/{chunk.blob}")
    damage(path, DAMAGE["one bit"])
    world.source.blobs[chunk.blob] = path.read_bytes()
    assert (await world.refused(model)).code == "blob_refused"


@pytest.mark.parametrize("verified", [False, True])
@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
async def test_a_part_that_was_damaged_meanwhile_is_made_anew(
    world: World, change: Callable[[bytes], bytes], verified: bool
) -> None:
    """Also of a model whose files were verified before."""
    chunk, stored = packed(PLAIN)
    model = world.model(chunk, stored, PLAIN)
    right = next(b for b in world.source.blobs if b != chunk.blob)
    if verified:
        await world.whole(model)
        async with world.cache() as cache:
            cache.store.retire_damaged(model.manifest.removeprefix("sha256:"))
            cache.store.drop_blob(right)
    good = world.source.blobs[right]
    world.source.blobs[right] = b"wrong"
    world.source.gate = hold(right, lambda: bool(done_in(world.root)), lambda: None)
    async with world.cache() as cache:
        with pytest.raises(AgentError, match=right):
            await cache.ensure(model, ignore)
    (path,) = world.root.glob(f"partial/*/files/{NAME}")
    damage(path, change)
    world.source.blobs[right] = good
    await world.whole(model)
