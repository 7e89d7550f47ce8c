"""One model made ready: manifest, plan, steps, publish. Made by the cache service for one call of `ensure`."""

import logging
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from xim_agent import files
from xim_agent.cache.download import WORKERS, Fetch
from xim_agent.cache.index import Entry
from xim_agent.cache.inventory import BLOCK, Evict, What, allocated
from xim_agent.cache.ledger import Cause, cause
from xim_agent.cache.manifest import Manifest, ManifestRefused, parse
from xim_agent.cache.partial import Partial
from xim_agent.cache.plan import INDEX, STALE, CacheRefused, Drain, Need, Plan, plan
from xim_agent.cache.plan import Fetch as FetchStep
from xim_agent.cache.transfer import Retry
from xim_agent.errors import AgentError
from xim_agent.mesh.messages import ModelRef, Progress
from xim_agent.outcome import RouterError

if TYPE_CHECKING:
    from xim_agent.cache.service import Cache

log = logging.getLogger("xim_agent.cache")

_T = TypeVar("_T")


class Operation:
    """`release` as in `Cache.ensure`; None: what is in use stays."""

    def __init__(
        self,
        cache: "Cache",
        model: ModelRef,
        digest: str,
        report: Callable[[Progress], None],
        release: Callable[[], Awaitable[None]] | None,
    ) -> None:
        self.cache, self.store, self.model, self.digest = cache, cache.store, model, digest
        self.report, self.release = report, release
        self.data, self.manifest = b"", Manifest(0, "", "", ())
        self.partial: Partial | None = None
        self.verified = cache.store.index.verified(digest)

    async def run(self) -> Path:
        """The ready directory. Raises as `Cache.ensure`."""
        self.data, self.manifest = await self._manifest()
        await _thread(self.store.whole_ready, self.digest, self.manifest)
        refusal = await self._prepare()
        if refusal is not None:
            await self.cache.trim(self.digest)  # what does not fit below a bound that was lowered
            raise refusal
        await self._outlast(self._remember)
        return self.store.ready[self.digest]

    async def _prepare(self) -> CacheRefused | None:
        try:
            if self.digest in self.store.ready:
                await self._steps(Need(self.digest, _chunks(self.manifest), 0, beside=self._unsaved()))
                await self._save()
            while self.digest not in self.store.ready:
                await self._attempt()
        except CacheRefused as refusal:
            return refusal
        return None

    async def _attempt(self) -> None:
        """Returns when the model is ready, or when what a resumed attempt went on with is of no use."""
        self.partial = None
        if await _thread(self.store.has_partial, self.digest):
            self.partial = await self._outlast(self.store.partial, self.digest, self.manifest)
        resumed, refusal = bool(self.partial and self.partial.done), None
        try:
            with self.cache.ledger.transfer(self.model):
                await self._steps(await _thread(_need, self.digest, self.manifest, self.partial, self._unsaved()))
                args = self.partial, self.digest, self.model.id, self.model.revision
                await self._outlast(self.store.publish, *args)
        except AgentError as e:
            refusal = e
        if refusal is None:
            self.verified = True
            return
        if isinstance(refusal, ManifestRefused) or not (self.partial and self.partial.done):
            await _thread(self.store.drop_partial, self.digest)
        if not resumed or refusal.code != "file_digest":
            await self._outlast(self.store.forget_empty)
            raise refusal
        log.warning("resumed files do not verify, starting over", extra={"model": self.model.name})

    async def _manifest(self) -> tuple[bytes, Manifest]:
        """From the disk, else from the router; checked in any case, since what the operator allows may have changed.

        It is written only when there is room for it: `_save`.
        """
        data = await _thread(self.store.load_manifest, self.digest)
        retry = Retry(self.cache.backoff, self.cache.rand, self.cache.counters, self._trouble)
        while data is None:
            try:
                data = await self.cache.source.manifest(self.digest)
                self.cache.counters.network_bytes += len(data)
            except RouterError as e:
                await retry.wait(e)
        retry.reset()
        return data, await _thread(self._parse, data)

    def _unsaved(self) -> int:
        """Bytes that the manifest will take; the index grows as well when a model is new, or was lost."""
        return INDEX + (0 if self.digest in self.store.known else allocated(len(self.data)))

    async def _save(self) -> None:
        await self._outlast(self.store.save_manifest, self.digest, self.data, self.manifest)

    def _parse(self, data: bytes) -> Manifest:
        return parse(
            data,
            digest=self.digest,
            model=self.model.name,
            revision=self.model.revision,
            size_bytes=self.model.size_bytes,
            allow_unsafe=self.cache.allow_unsafe,
        )

    async def _begin(self) -> Fetch:
        """What has to go is gone, and the first byte may be written."""
        await self._save()
        if self.partial is None:
            self.partial = await self._outlast(self.store.partial, self.digest, self.manifest)
        cache = self.cache
        return Fetch(
            self.store,
            cache.source,
            self.partial,
            downloads=cache.downloads,
            counters=cache.counters,
            report=self.report,
            backoff=cache.backoff,
            rand=cache.rand,
            trouble=self._trouble,
            room=self._room,
            verified=self.verified,
        )

    async def _steps(self, need: Need) -> None:
        todo, causes = await self._plan(need)
        fetch: Fetch | None = None
        for step in todo.steps:
            if isinstance(step, Evict):
                await self.cache.evict(step, causes[step.what, step.key])
            elif isinstance(step, Drain):
                if self.release is not None:
                    await self.release()
            else:
                fetch = fetch or await self._begin()
                await (fetch.chunks() if isinstance(step, FetchStep) else fetch.expand(step.keep))

    async def _plan(self, need: Need) -> tuple[Plan, dict[tuple[What, str], Cause]]:
        inventory, limits, holds = await _thread(self.cache.survey, self.release is not None)
        todo = plan(inventory, need, limits, holds)
        extra: dict[str, Any] = {"case": todo.case.value, "outage_bytes": todo.outage}
        log.debug("cache plan", extra={**extra, "steps": [str(s) for s in todo.steps]})
        if any(isinstance(s, Drain) for s in todo.steps):
            log.warning("no room for both models, serving stops while the next one is prepared", extra=extra)
        return todo, {(s.what, s.key): cause(s, inventory, limits) for s in todo.steps if isinstance(s, Evict)}

    def _remember(self) -> None:
        now, model, verified = self.cache.clock.now(), self.model, int(self.verified)
        self.store.index.add(
            Entry(self.digest, model.id, model.name, model.revision, self.manifest.size, now, verified)
        )
        for key, partial in self.store.scan().partials.items():
            if partial.used < now - STALE:
                self.store.drop_partial(key)
                self.cache.ledger.evicted(Evict("partial", key, partial.bytes), Cause("stale", now - partial.used), "")
        self.store.forget_empty()

    def _trouble(self, text: str | None) -> None:
        if text is None:
            self.cache.health.clear("model_fetch")
        else:
            self.cache.health.set("model_fetch", f"fetching the model fails and is tried again: {text}")

    async def _room(self) -> None:
        """Another program filled the disk: returns when the reserve is free again."""
        limits = await _thread(self.cache.limits)
        log.warning("the disk is full, waiting for room", extra={"free": limits.disk_free, "reserve": limits.reserve})
        while True:
            self.cache.health.set(
                "cache_disk_full",
                "the disk of the model cache is full, the model waits for room",
                f"free {limits.reserve / 1e9:.1f} GB on the disk of {self.store.root}; it goes on by itself",
            )
            await trio.sleep(self.cache.full_disk_look)
            limits = await _thread(self.cache.limits)
            if limits.disk_free >= limits.reserve:
                break
        self.cache.health.clear("cache_disk_full")
        log.info("the disk has room again, the model goes on", extra={"free": limits.disk_free})

    async def _outlast(self, call: Callable[..., _T], *args: Any) -> _T:
        """The result of a change that begins anew where the disk is full. What the room comes from is not held up."""
        while True:
            try:
                async with self.cache.changing:
                    return await _thread(call, *args)
            except (OSError, sqlite3.Error) as e:
                if not files.is_full(e):
                    raise
            await self._room()


def _chunks(manifest: Manifest) -> dict[str, int]:
    return {blob: allocated(stored) for blob, stored in manifest.blobs().items()}


def _need(digest: str, manifest: Manifest, partial: Partial | None, unsaved: int) -> Need:
    """`files` includes all that the partial consists of. Its journal is written anew beside the old one."""
    journal = allocated(16 * sum(len(f.chunks) for f in manifest.files))
    folders = {parent for f in manifest.files for parent in PurePosixPath(f.path).parents}
    # Marker; directories of the files, that of the partial, and those of the model in `ready`.
    size = sum(allocated(f.size) for f in manifest.files) + journal + allocated(len(digest))
    size += BLOCK * (len(folders) + 3)
    done = partial.done_blobs() if partial is not None else frozenset()
    return Need(digest, _chunks(manifest), size, done, WORKERS + 1, unsaved + journal)


async def _thread(call: Callable[..., _T], *args: Any) -> _T:
    return await trio.to_thread.run_sync(call, *args)
