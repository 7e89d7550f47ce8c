"""Everything in the cache read and hashed again, beside an agent that serves: one thread, a chunk at a time."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import trio

from xim_agent.cache import codec, tree
from xim_agent.cache.listing import Names, held
from xim_agent.cache.manifest import CHUNK, File, Manifest
from xim_agent.cache.service import DAMAGED, Cache
from xim_agent.cache.store import DAMAGED_MANIFEST

log = logging.getLogger("xim_agent.cache")


@dataclass(frozen=True)
class Damage:
    """`what`: chunk, file or manifest; `name`: its digest or path; `models`: MODEL@REV of its users."""

    what: str
    name: str
    models: tuple[str, ...]
    done: str


@dataclass
class Verified:
    """`bytes` were read; `unchecked`: ready models whose manifest is lost, so that nothing says what they should be."""

    chunks: int = 0
    files: int = 0
    bytes: int = 0
    damaged: list[Damage] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)


async def verify(
    cache: Cache, names: Names, wanted: frozenset[str] | None, report: Callable[[int, int], None]
) -> Verified:
    """`wanted`: manifests, None for all there is. `report`: bytes done and in all.

    Damaged chunks are removed, damaged ready copies put into the quarantine; of a model that is in use or prepared the
    files stay, and a health condition says so. Raises OSError where neither reading nor removing works. Cancellation
    leaves what was found so far dealt with.
    """
    return await _Run(cache, names, report).run(wanted)


class _Run:
    def __init__(self, cache: Cache, names: Names, report: Callable[[int, int], None]) -> None:
        self.cache, self.store, self.names, self.report = cache, cache.store, names, report
        self.one = trio.CapacityLimiter(1)
        self.result = Verified()
        self.total = 0

    async def run(self, wanted: frozenset[str] | None) -> Verified:
        inventory = await self._thread(self.store.scan)
        models = {d: m for d, m in inventory.models.items() if wanted is None or d in wanted}
        blobs = {b for b in inventory.blobs if len(b) == 64} if wanted is None else set()
        blobs |= {b for m in models.values() for b in m.chunks}
        ready = [d for d, m in models.items() if m.ready]
        self.total = sum(inventory.blobs.get(b, 0) for b in blobs) + sum(self.names[d].size for d in ready)
        if wanted is None:
            await self._manifests()
        for blob in sorted(blobs):
            await self._chunk(blob)
        for digest in ready:
            await self._ready(digest)
        log.info(
            "cache verified",
            extra={"chunks": self.result.chunks, "files": self.result.files, "damaged": len(self.result.damaged)},
        )
        return self.result

    def _read(self, amount: int) -> None:
        self.result.bytes += amount
        self.total = max(self.total, self.result.bytes)
        self.report(self.result.bytes, self.total)

    async def _manifests(self) -> None:
        """Those that were found damaged before, at the start perhaps: their chunks are nobody's until then."""
        for path in await self._thread(sorted, (self.store.root / "quarantine").glob(f"{DAMAGED_MANIFEST}*")):
            digest = path.name.removeprefix(DAMAGED_MANIFEST)
            async with self.cache.changing:
                await self._thread(tree.remove, path)
            self._damage(Damage("manifest", digest, (), "removed; it is fetched again when its model is needed"))

    async def _chunk(self, blob: str) -> None:
        size, good = await self._thread(_check_blob, self.store.blob(blob), blob)
        if size is None:
            return  # evicted meanwhile
        self.result.chunks += 1
        self._read(size)
        if not good:
            async with self.cache.changing:
                await self._thread(self.store.drop_blob, blob)
            users = [self.names.text(d) for d, k in dict(self.store.known).items() if blob in k.blobs]
            self._damage(Damage("chunk", blob, tuple(users), "removed; it is fetched again when it is needed"))

    async def _ready(self, digest: str) -> None:
        path, data = self.store.ready.get(digest), await self._thread(self.store.load_manifest, digest)
        if path is None:
            return
        if data is None:
            self.result.unchecked.append(self.names.text(digest))
            return
        manifest = await self._thread(lambda: msgspec.json.decode(data, type=Manifest))
        bad = [f.path for f in manifest.files if not await self._whole(path / f.path, f)]
        if not bad:
            if digest in self.cache.in_use:
                self.cache.health.clear(DAMAGED)
            return
        async with self.cache.changing:
            if self.store.ready.get(digest) != path:
                return  # evicted while it was read
            done = await self._deal_with(digest, bad)
        for name in bad:
            self._damage(Damage("file", name, (self.names.text(digest),), done))

    async def _deal_with(self, digest: str, bad: list[str]) -> str:
        text = self.names.text(digest)
        state = held(digest, self.cache.in_use, self.cache.preparing)
        if state is None:
            await self._thread(self.store.retire_damaged, digest)
            return "its ready copy is in the quarantine; it is made again when the model is assigned"
        self.cache.health.set(
            DAMAGED,
            f"{len(bad)} files of {text}, which is {state}, are damaged: {', '.join(bad[:3])}",
            "assign another model, remove this one with `cache rm`, and assign it again; check the disk",
        )
        log.error("files of the model in use are damaged", extra={"model": text, "files": bad[:20]})
        return f"left in place, since the model is {state}"

    async def _whole(self, path: Path, file: File) -> bool:
        """Whether the file is what the manifest says; read in pieces, so that a stop comes through."""
        self.result.files += 1
        hasher, offset = sha256(), 0
        while True:
            got = await self._thread(_hash_piece, path, file.size, hasher, offset)
            if got is None:
                return False
            offset += got
            self._read(got)
            if got == 0:
                return offset == file.size and hasher.hexdigest() == file.sha256

    def _damage(self, damage: Damage) -> None:
        log.warning("damaged", extra={"what": damage.what, "path": damage.name, "done": damage.done})
        self.result.damaged.append(damage)

    async def _thread(self, call: Callable[..., Any], *args: Any) -> Any:
        return await trio.to_thread.run_sync(call, *args, limiter=self.one)


def _check_blob(path: Path, digest: str) -> tuple[int | None, bool]:
    """Bytes read, None when it is not there, and whether they are the right ones. What cannot be read is not right."""
    try:
        fd = tree.open_file(path, os.O_RDONLY, own=False)
    except FileNotFoundError:
        return None, False
    except (OSError, tree.Foreign) as e:
        log.warning("a chunk cannot be read", extra={"error": str(e)})
        return 0, False
    try:
        with os.fdopen(fd, "rb", buffering=0) as file:
            data = file.read(CHUNK + 1)
            # What was read once for this must not push the engine's files out of memory.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as e:
        log.warning("a chunk cannot be read", extra={"error": str(e)})
        return 0, False
    return len(data), codec.verified(data, digest)


def _hash_piece(path: Path, size: int, hasher: Any, offset: int) -> int | None:
    """Bytes fed to `hasher`, 0 at the end; None when the file is not a plain file of this size or cannot be read."""
    try:
        fd = tree.open_file(path, os.O_RDONLY, own=False)
    except (OSError, tree.Foreign) as e:
        log.warning("a file cannot be read", extra={"error": str(e)})
        return None
    try:
        if os.fstat(fd).st_size != size:
            return None
        data = os.pread(fd, CHUNK, offset)
        hasher.update(data)
        return len(data)
    except OSError as e:
        log.warning("a file cannot be read", extra={"error": str(e)})
        return None
    finally:
        os.close(fd)
