"""One model made ready: manifest, plan, steps, publish. Made by the cache service for one call of `ensure`."""

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from xim_agent import files
from xim_agent.cache.download import WORKERS, Fetch
from xim_agent.cache.index import Entry
from xim_agent.cache.inventory import Evict, What, allocated
from xim_agent.cache.ledger import Cause, cause
from xim_agent.cache.manifest import Manifest, ManifestRefused, parse
from xim_agent.cache.partial import Partial
from xim_agent.cache.plan import STALE, Drain, Expand, Limits, Need, Plan, plan
from xim_agent.cache.plan import Fetch as FetchStep
from xim_agent.cache.transfer import Retry
from xim_agent.errors import AgentError
from xim_agent.mesh.messages import ModelRef, Progress
from xim_agent.outcome import RouterError

if TYPE_CHECKING:
    from xim_agent.cache.service import Cache

log = logging.getLogger("xim_agent.cache")

_FULL_DISK_LOOK = 5.0

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

    async def run(self) -> Path:
        """The ready directory. Raises as `Cache.ensure`."""
        manifest = await self._manifest()
        await _thread(self.store.whole_ready, self.digest, manifest)
        if self.digest in self.store.ready:
            await self._steps(Need(self.digest, _chunks(manifest), 0), None)
        while self.digest not in self.store.ready:
            partial = await _thread(self.store.partial, self.digest, manifest)
            resumed, refusal = bool(partial.done), None
            try:
                await self._make(manifest, partial)
            except AgentError as e:
                refusal = e
            if refusal is None:
                break
            if isinstance(refusal, ManifestRefused) or not partial.done:
                await _thread(self.store.drop_partial, self.digest)
            if not resumed or refusal.code != "file_digest":
                await _thread(self.store.forget_empty)
                raise refusal
            log.warning("resumed files do not verify, starting over", extra={"model": self.model.name})
        async with self.cache.changing:
            await _thread(self._remember, manifest)
        return self.store.ready[self.digest]

    async def _manifest(self) -> Manifest:
        """From the disk, else from the router; checked in any case, since what the operator allows may have changed."""
        data = await _thread(self.store.load_manifest, self.digest)
        retry = Retry(self.cache.backoff, self.cache.rand, self.cache.counters, self._trouble)
        while data is None:
            try:
                data = await self.cache.source.manifest(self.digest)
                self.cache.counters.network_bytes += len(data)
            except RouterError as e:
                await retry.wait(e)
        retry.reset()
        manifest = await _thread(self._parse, data)
        await _thread(self.store.save_manifest, self.digest, data, manifest)
        return manifest

    def _parse(self, data: bytes) -> Manifest:
        return parse(
            data,
            digest=self.digest,
            model=self.model.name,
            revision=self.model.revision,
            size_bytes=self.model.size_bytes,
            allow_unsafe=self.cache.allow_unsafe,
        )

    async def _make(self, manifest: Manifest, partial: Partial) -> None:
        cache = self.cache
        fetch = Fetch(
            self.store,
            cache.source,
            partial,
            downloads=cache.downloads,
            counters=cache.counters,
            report=self.report,
            backoff=cache.backoff,
            rand=cache.rand,
            trouble=self._trouble,
            room=self._room,
        )
        with cache.ledger.transfer(self.model):
            await self._steps(_need(self.digest, manifest, partial), fetch)
            async with cache.changing:
                await _thread(self.store.publish, partial, self.digest, self.model.id, self.model.revision)

    async def _steps(self, need: Need, fetch: Fetch | None) -> None:
        todo, causes = await self._plan(need)
        for step in todo.steps:
            if isinstance(step, Evict):
                await self.cache.evict(step, causes[step.what, step.key])
            elif isinstance(step, Drain) and self.release is not None:
                await self.release()
            elif isinstance(step, FetchStep) and fetch is not None:
                await fetch.chunks()
            elif isinstance(step, Expand) and fetch is not None:
                await fetch.expand(step.keep)

    async def _plan(self, need: Need) -> tuple[Plan, dict[tuple[What, str], Cause]]:
        inventory = await _thread(self.store.scan)
        disk = await _thread(files.disk, self.store.root)
        entries = await _thread(self.store.index.entries)
        limits = Limits(self.cache.max_bytes, disk.free, disk.total, self.cache.clock.now(), self.cache.vllm)
        pinned = frozenset(e.manifest for e in entries.values() if e.pinned)
        todo = plan(inventory, need, limits, self.cache.holds(self.release is not None, pinned))
        extra: dict[str, Any] = {"case": todo.case.value, "outage_bytes": todo.outage}
        log.debug("cache plan", extra={**extra, "steps": [str(s) for s in todo.steps]})
        if any(isinstance(s, Drain) for s in todo.steps):
            log.warning("no room for both models, serving stops while the next one is prepared", extra=extra)
        return todo, {(s.what, s.key): cause(s, inventory, limits) for s in todo.steps if isinstance(s, Evict)}

    def _remember(self, manifest: Manifest) -> None:
        now, model = self.cache.clock.now(), self.model
        self.store.index.add(Entry(self.digest, model.id, model.name, model.revision, manifest.size, now))
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
        disk = await _thread(files.disk, self.store.root)
        log.warning("the disk is full, waiting for room", extra={"free": disk.free})
        while True:
            self.cache.health.set("cache_disk_full", "the disk of the model cache is full")
            await trio.sleep(_FULL_DISK_LOOK)
            disk = await _thread(files.disk, self.store.root)
            if disk.free >= Limits(0, disk.free, disk.total).reserve:
                break
        self.cache.health.clear("cache_disk_full")


def _chunks(manifest: Manifest) -> dict[str, int]:
    return {blob: allocated(stored) for blob, stored in manifest.blobs().items()}


def _need(digest: str, manifest: Manifest, partial: Partial) -> Need:
    """`files` includes the journal and the marker."""
    journal = 16 * sum(len(f.chunks) for f in manifest.files)
    size = sum(allocated(f.size) for f in manifest.files) + allocated(journal) + 2 * allocated(0)
    return Need(digest, _chunks(manifest), size, partial.done_blobs(), WORKERS + 1)


async def _thread(call: Callable[..., _T], *args: Any) -> _T:
    return await trio.to_thread.run_sync(call, *args)
