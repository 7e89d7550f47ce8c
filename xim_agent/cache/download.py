"""From chunks at the router or in the store to verified files: a pipeline over several chunks, bounded in memory."""

import functools
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import trio

from xim_agent import files
from xim_agent.backoff import Backoff
from xim_agent.cache import codec, tree
from xim_agent.cache.manifest import ManifestRefused
from xim_agent.cache.memory import Buffers, Memory, Received, cost
from xim_agent.cache.partial import Partial
from xim_agent.cache.store import Store
from xim_agent.cache.transfer import BlobSource, Counters, Retry, WrongBlob, get_blob
from xim_agent.errors import AgentError, Exit
from xim_agent.mesh.messages import Progress

log = logging.getLogger("xim_agent.cache")

# Also with fewer cores, since some wait for the disk. More would not help: joining planes (2 GB/s) holds the
# interpreter's lock, and a file is hashed by one thread (1.8 GB/s).
WORKERS = 4
_REPORT = 1.0
_LOG = 10

_T = TypeVar("_T")


@dataclass(frozen=True)
class Job:
    """One blob and all places (file, chunk) that are made of it."""

    blob: str
    stored: int
    places: tuple[tuple[int, int], ...]


@dataclass
class Meter:
    """What `Progress` says, in bytes."""

    stage: Literal["fetch", "verify"] = "fetch"
    done: int = 0
    total: int = 0
    rate: float = 0.0
    text: str = ""

    def progress(self) -> Progress:
        return Progress(self.stage, min(self.done, self.total), self.total, self.rate, self.text)


class Fetch:
    """One operation on one model. `room` waits until the disk has room again after it was full.

    `verified`: the files that these chunks make had their digests before. Then those that are made from the first byte
    are not hashed again: each chunk's own digest is checked in any case, and what a frame decodes to by the checksum in
    it, so that the same chunks make the same files. It would take as much CPU time as to decode and join them. Files
    that an earlier operation began are hashed: what became of them on the disk since, no digest of a chunk tells.
    """

    def __init__(
        self,
        store: Store,
        source: BlobSource,
        partial: Partial,
        *,
        downloads: int,
        counters: Counters,
        report: Callable[[Progress], None],
        backoff: Callable[[], Backoff],
        rand: Callable[[], float],
        trouble: Callable[[str | None], None],
        room: Callable[[], Awaitable[None]],
        verified: bool = False,
    ) -> None:
        self.store, self.source, self.partial, self.manifest = store, source, partial, partial.manifest
        self.counters, self.report, self.room = counters, report, room
        self._retry = functools.partial(Retry, backoff, rand, counters, trouble)
        self._transfers = trio.Semaphore(downloads)
        self._slots = trio.Semaphore(downloads + WORKERS)
        self._memory = Memory()
        self._buffers = Buffers()
        self._decoders = codec.Decoders()
        self._threads = trio.CapacityLimiter(WORKERS)
        self._counted: set[str] = set()
        self._hashing = [trio.Lock() for _ in self.manifest.files]
        begun = {i for i, _ in partial.done} if verified else range(len(self.manifest.files))
        self._hashers = [partial.new_hasher() if i in begun else None for i in range(len(self.manifest.files))]
        self._hashed = [0 if i in begun else len(f.chunks) for i, f in enumerate(self.manifest.files)]
        self._failure: AgentError | None = None
        self.meter = Meter()

    async def chunks(self) -> None:
        """Brings every missing blob into the store. Raises AgentError; what has arrived stays, also when cancelled."""
        await self._run(self._jobs(), self._store_only)

    async def expand(self, keep: bool) -> None:
        """Writes and verifies all files of the partial.

        `keep`: fetched chunks are stored too; otherwise stored ones that no other model holds go when they are written.
        Raises AgentError; what is done stays, also when cancelled.
        """
        jobs = self._jobs()
        eaten: frozenset[str] = frozenset()
        if not keep:
            inventory = await self._thread(self.store.scan)
            eaten = inventory.only_of(self.partial.root.name)
            jobs.sort(key=lambda job: job.blob not in inventory.blobs)  # frees room before anything is added
            for blob in eaten & self.partial.done_blobs():
                await self._thread(self.store.drop_blob, blob)
        await self._run(jobs, functools.partial(self._expand, keep=keep, eaten=eaten))
        hashed = sum(c.size for i, j, c in self.manifest.places() if j < self._hashed[i])
        self.meter = Meter("verify", hashed, self.manifest.size)
        await self._run(range(len(self.manifest.files)), self._finish)

    def _jobs(self) -> list[Job]:
        places: dict[str, list[tuple[int, int]]] = {}
        for i, j, chunk in self.manifest.places():
            if (i, j) not in self.partial.done:
                places.setdefault(chunk.blob, []).append((i, j))
        stored = self.manifest.blobs()
        jobs = [Job(blob, stored[blob], tuple(where)) for blob, where in places.items()]
        here = [b for b in stored if b not in places]
        for blob in here:
            self._hit(blob, stored[blob])
        self.meter = Meter("fetch", sum(stored[b] for b in here), sum(stored.values()))
        return jobs

    # -- one job -------------------------------------------------------------------------------------------------

    async def _store_only(self, job: Job) -> None:
        if await self._thread(self.store.has_blob, job.blob):
            self._hit(job.blob, job.stored)
            self._arrived(job.stored)
        else:
            with self._buffers.lent(job.stored) as received:
                data = await self._fetched(job, received)
                await self._thread(self.store.write_blob, job.blob, data)

    async def _expand(self, job: Job, keep: bool, eaten: frozenset[str]) -> None:
        with self._buffers.lent(job.stored) as received:
            data = received.room(job.stored)
            if await self._thread(self.store.read_blob, job.blob, data):
                self._hit(job.blob, job.stored)
                self._arrived(job.stored)
            else:
                data = await self._fetched(job, received)
                if keep:
                    await self._thread(self.store.write_blob, job.blob, data)
            await self._thread(self._write, job, data, job.blob in eaten)
        for i in {i for i, _ in job.places}:
            await self._advance(i)

    def _hit(self, blob: str, size: int) -> None:
        """Once for each blob, and for none that was fetched in this operation."""
        if blob not in self._counted:
            self._counted.add(blob)
            self.counters.hit_bytes += size

    def _arrived(self, amount: int) -> None:
        self.meter.done += amount

    async def _fetched(self, job: Job, into: Received) -> memoryview:
        """The verified bytes from the router. Wrong ones are fetched once more, then the model is refused."""
        for _ in range(2):
            del into[0:]
            try:
                async with self._transfers:
                    data = await get_blob(
                        self.source, job.blob, job.stored, self._retry(), self.counters, self._arrived, into
                    )
            except WrongBlob as e:
                why = str(e)
            else:
                if await self._thread(codec.verified, data, job.blob):
                    self._counted.add(job.blob)
                    return data
                self._arrived(-len(data))
                why = "they have another digest"
            log.warning("wrong bytes for a chunk", extra={"blob": job.blob, "error": why})
            self.counters.wrong_blobs += 1
        raise AgentError(
            "blob_refused",
            f"the router gave wrong bytes for the chunk {job.blob} twice: {why}",
            hint="publish the model again, or check what sits between the router and this host",
            exit_code=Exit.CONFIG,
        )

    def _write(self, job: Job, data: codec.Data, drop: bool) -> None:
        """Writes all places of a verified blob; `drop` in the same go, so that few chunks are on the disk twice."""
        for i, j in job.places:
            chunk = self.manifest.files[i].chunks[j]
            with self._decoders.lent() as decoder:
                try:
                    pieces = decoder.pieces(data, chunk.codec, chunk.size)
                except codec.CorruptChunk as e:
                    path = self.manifest.files[i].path
                    raise ManifestRefused("chunk_undecodable", f"chunk {j} of {path!r} ({job.blob}): {e}") from e
                self.partial.write(i, j, pieces)
        if drop:
            self.store.drop_blob(job.blob)

    # -- whole files ---------------------------------------------------------------------------------------------

    async def _advance(self, i: int) -> None:
        """Hashes file `i` as far as it is written without a gap, from the disk, so that little is left at the end."""
        async with self._hashing[i]:
            while (i, self._hashed[i]) in self.partial.done:
                await self._thread(self.partial.hash_chunk, self._hashers[i], i, self._hashed[i])
                self._hashed[i] += 1
                if self.meter.stage == "verify":
                    self._arrived(self.manifest.files[i].chunks[self._hashed[i] - 1].size)

    async def _finish(self, i: int) -> None:
        await self._advance(i)
        if not await self._thread(self.partial.whole, i, self._hashers[i]):
            raise ManifestRefused(
                "file_digest", f"{self.manifest.files[i].path!r} does not have the digest that the manifest says"
            )

    # -- the pipeline --------------------------------------------------------------------------------------------

    async def _run(self, items: Iterable[_T], handle: Callable[[_T], Awaitable[None]]) -> None:
        """Handles all items, several at once. The first AgentError stops the rest and is raised alone."""
        async with trio.open_nursery() as ticking:
            ticking.start_soon(self._tick)
            async with trio.open_nursery() as nursery:
                for item in items:
                    held = cost(item.stored) if isinstance(item, Job) else 0
                    await self._slots.acquire()
                    await self._memory.take(held)
                    nursery.start_soon(self._guarded, handle, item, held, nursery.cancel_scope)
            ticking.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure
        self.report(self.meter.progress())

    async def _guarded(
        self, handle: Callable[[_T], Awaitable[None]], item: _T, held: int, everything: trio.CancelScope
    ) -> None:
        try:
            await handle(item)
        except AgentError as e:
            self._failure = self._failure or e
            everything.cancel()
        finally:
            self._memory.give(held)
            self._slots.release()

    async def _thread(self, call: Callable[..., _T], *args: Any) -> _T:
        """File and hash work, off the event loop. A full disk is waited out; other I/O errors become `cache_io`."""
        while True:
            try:
                return await trio.to_thread.run_sync(call, *args, limiter=self._threads)
            except OSError as e:
                if not files.is_full(e):
                    raise AgentError("cache_io", f"model cache: {e}", hint=tree.CURE, exit_code=Exit.STATE) from e
            await self.room()

    async def _tick(self) -> None:
        last, ticks, meter = self.meter.done, 0, self.meter
        while True:
            await trio.sleep(_REPORT)
            ticks += 1
            if meter is not self.meter:
                last, meter = self.meter.done, self.meter
            meter.rate = 0.7 * meter.rate + 0.3 * max(0, meter.done - last) / _REPORT
            last = meter.done
            self.report(meter.progress())
            if ticks % _LOG == 0:
                left = (meter.total - meter.done) / meter.rate if meter.rate else None
                log.info(
                    "preparing model",
                    extra={
                        "stage": meter.stage,
                        "model": self.manifest.model,
                        "done": meter.done,
                        "total": meter.total,
                        "bytes_per_s": round(meter.rate),
                        "seconds_left": left and round(left),
                    },
                )
