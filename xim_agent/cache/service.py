"""The model cache: takes an assigned model to a directory that vLLM can open, within the bound."""

import logging
import random
import re
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Self

import trio

from xim_agent import files
from xim_agent.backoff import Backoff
from xim_agent.cache import claim, tree
from xim_agent.cache.inventory import Evict, Inventory
from xim_agent.cache.ledger import Cause, Ledger, cause
from xim_agent.cache.manifest import check_component, manifest_digest
from xim_agent.cache.operation import Operation
from xim_agent.cache.plan import INDEX, RESERVES, Holds, Limits, Reserves, trim
from xim_agent.cache.statistics import CachedModel, CacheStatistics
from xim_agent.cache.store import Store
from xim_agent.cache.transfer import BlobSource, Counters
from xim_agent.clock import Clock
from xim_agent.errors import AgentError, Exit
from xim_agent.health import Health
from xim_agent.mesh.messages import ModelRef, Progress

log = logging.getLogger("xim_agent.cache")

LOOK = 30.0
FULL_DISK_LOOK = 5.0  # seconds between two looks whether a full disk has room again
COMMAND_SECONDS = 60.0  # how long the start waits for an operator's command that has the cache
DAMAGED = "cache_damaged"  # health condition: files of the running model are not what they should be
_AGAIN = 0.2


@contextmanager
def named(code: str, directory: Path) -> Iterator[None]:
    """What the disk refuses becomes an AgentError."""
    try:
        yield
    except (OSError, sqlite3.Error, RecursionError) as e:
        why = "directories in it are nested too deeply" if isinstance(e, RecursionError) else e
        text = f"cannot use the model cache {directory}: {why}"
        raise AgentError(code, text, hint=tree.cure(e, directory), exit_code=Exit.STATE) from e


class Cache:
    """Open as an async context manager, which takes the lock of the directory and adopts what is there.

    Opening raises AgentError `cache_in_use`, `cache_format`, `cache_directory`.
    """

    def __init__(
        self,
        *,
        directory: Path,
        max_bytes: int,
        downloads: int,
        source: BlobSource,
        allow_unsafe: bool,
        clock: Clock,
        health: Health,
        rand: Callable[[], float] = random.random,
        backoff: Callable[[], Backoff] = Backoff,
        reserves: Reserves = RESERVES,
        full_disk_look: float = FULL_DISK_LOOK,
        patience: float = COMMAND_SECONDS,
    ) -> None:
        self.directory, self.max_bytes, self.downloads, self.source = directory, max_bytes, downloads, source
        self.allow_unsafe, self.clock, self.health, self.rand, self.backoff = allow_unsafe, clock, health, rand, backoff
        self.reserves, self.full_disk_look, self.patience = reserves, full_disk_look, patience
        self.counters = Counters()
        self.ledger = Ledger(self.counters, clock)
        self.preparing: str | None = None
        self.changing = trio.Lock()  # held for every removal and publication, and while an operation begins
        self._store: Store | None = None
        self._one = trio.Lock()
        self._pinned: set[str] = set()
        self._vllm: str | None = None
        self._inventory, self._free = Inventory(), 0
        self._models: tuple[CachedModel, ...] = ()

    async def __aenter__(self) -> Self:
        with named("cache_directory", self.directory):
            self._store = await self._open()
            try:
                await trio.to_thread.run_sync(self.look)
            except BaseException:
                self._store.close()
                raise
        return self

    async def _open(self) -> Store:
        """An operator's command that has the cache for a moment is waited for; at first nobody has said who it is."""
        begin = trio.current_time()
        while True:
            try:
                return await trio.to_thread.run_sync(Store.open, self.directory)
            except AgentError as e:
                if e.code != "cache_in_use":
                    raise
                held = e
            says = (await trio.to_thread.run_sync(claim.holder, self.directory / claim.LOCK)).says
            patience = {claim.COMMAND: self.patience, "": claim.SILENT_SECONDS}.get(says, 0.0)
            if trio.current_time() >= begin + patience:
                raise held
            await trio.sleep(_AGAIN)

    async def __aexit__(self, *_: object) -> None:
        for digest in self._pinned:
            self.store.index.touch(digest, self.clock.now())
        try:
            self.store.index.save()
        except (OSError, tree.Foreign) as e:
            log.warning("the last uses are lost", extra={"error": str(e)})
        self.store.close()
        self._store = None

    @property
    def store(self) -> Store:
        if self._store is None:
            raise RuntimeError("the cache is not open")
        return self._store

    # -- for the rest of the agent -------------------------------------------------------------------------------

    async def ensure(
        self,
        model: ModelRef,
        report: Callable[[Progress], None],
        release: Callable[[], Awaitable[None]] | None = None,
    ) -> Path:
        """The directory with the model's files, verified and read-only; `pin` it before the next call.

        `release` stops the running engine and unpins its model; it is called only where the plan says that nothing
        else makes room. Raises ManifestRefused, CacheRefused (before the first byte of a chunk), RouterError (where
        trying again cannot help), AgentError `blob_refused`, `cache_io`. Cancellation leaves what can be resumed.
        """
        digest = manifest_digest(model.manifest)
        check_component(model.id)
        check_component(model.revision)

        def tell(progress: Progress) -> None:
            self.ledger.progress = progress
            report(progress)

        async with self._one:
            async with self.changing:
                self.preparing = digest
            operation = Operation(self, model, digest, tell, release)
            try:
                with named("cache_io", self.directory):
                    path = await operation.run()
                    await trio.to_thread.run_sync(self.look)
            finally:
                self.preparing = self.ledger.progress = None
                self.health.clear("model_fetch")
                self.health.clear("cache_disk_full")
            return path

    def pin(self, model: ModelRef) -> None:
        """In use by the engine: its ready copy stays."""
        self._pinned.add(manifest_digest(model.manifest))

    def unpin(self, model: ModelRef) -> None:
        digest = manifest_digest(model.manifest)
        self._pinned.discard(digest)
        self.health.clear(DAMAGED)
        if self._store is not None:
            self._store.index.touch(digest, self.clock.now())

    def compile_cache_dir(self, vllm_version: str) -> Path:
        """Where this vLLM keeps what it compiled; counted in the bound, that of other versions goes first.

        Raises AgentError `cache_io`.
        """
        self._vllm = re.sub(r"[^A-Za-z0-9._+-]", "_", vllm_version).lstrip(".") or "unknown"
        path = self.store.root / "compile" / self._vllm
        with named("cache_io", self.directory):
            if path.is_symlink():
                tree.remove(path)
            tree.make_directory(path)
        return path

    def statistics(self) -> CacheStatistics:
        c, led, now = self.counters, self.ledger, self.ledger.progress
        return CacheStatistics(
            bytes_used=self._inventory.total,
            tiers=self._inventory.tiers(),
            bound=self.max_bytes,
            disk_free=self._free,
            fetch_done=now.done if now else None,
            fetch_total=now.total if now else None,
            fetch_rate=now.rate if now else None,
            fetch_seconds_left=led.seconds_left,
            network_bytes=c.network_bytes,
            hit_bytes=c.hit_bytes,
            stalls=c.stalls,
            retries=c.retries,
            wrong_blobs=c.wrong_blobs,
            evictions={kind: dict(reasons) for kind, reasons in led.evictions.items()},
            evicted_bytes=dict(led.evicted_bytes),
            last_eviction_age=led.last_age,
            models=self._models,
        )

    async def watch(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Looks at the disk every `LOOK` seconds, for the statistics and the bound. Never returns."""
        task_status.started()
        while True:
            await trio.sleep(LOOK)
            try:
                await self.watch_once()
            except (OSError, sqlite3.Error) as e:
                log.warning("the model cache cannot be looked at", extra={"error": str(e)})

    async def watch_once(self) -> None:
        """What vLLM wrote above its reserve is made up for, but where an operation is at work, whose plan sees to it.

        Raises OSError, sqlite3.Error.
        """
        inventory = await trio.to_thread.run_sync(self.look)
        if inventory.total > self.max_bytes and not self._one.locked():
            async with self._one:
                await self.trim(None)

    # -- for operations and operators' commands ------------------------------------------------------------------

    @property
    def in_use(self) -> frozenset[str]:
        """Manifests of what the engine has open."""
        return frozenset(self._pinned)

    async def evict(self, step: Evict, why: Cause) -> None:
        """Raises OSError, sqlite3.Error."""
        async with self.changing:
            await self.evict_here(step, why)

    async def evict_here(self, step: Evict, why: Cause) -> None:
        """For who holds `changing`."""
        known = self.store.known.get(step.key)
        await trio.to_thread.run_sync(self.store.evict, step)
        self.ledger.evicted(step, why, known.name if known else "")

    async def trim(self, wanted: str | None) -> None:
        """Evicts what is above the bound, as far as nothing in use is touched; the manifest `wanted` loses last.

        Raises OSError, sqlite3.Error.
        """
        inventory, limits, holds = await trio.to_thread.run_sync(self.survey, True)
        below = replace(limits, bound=limits.bound - INDEX)  # the next use of a model is written down, too
        for step in trim(inventory, wanted, below, holds) if inventory.total > limits.bound else ():
            await self.evict(step, cause(step, inventory, limits))
        await trio.to_thread.run_sync(self.look)

    def survey(self, can_drain: bool) -> tuple[Inventory, Limits, Holds]:
        """What a plan is made of. Where nothing can be drained, what is in use counts as pinned too.

        Blocks; raises OSError, sqlite3.Error.
        """
        in_use = self.in_use
        holds = Holds(in_use) if can_drain else Holds(pinned=in_use)
        return self.store.scan(), self.limits(), holds

    def limits(self) -> Limits:
        """Blocks; raises OSError."""
        disk = files.disk(self.store.root)
        return Limits(self.max_bytes, disk.free, disk.total, self.clock.now(), self._vllm, self.reserves)

    @property
    def vllm(self) -> str | None:
        """The version whose compile cache is in use."""
        return self._vllm

    def look(self) -> Inventory:
        """Takes in what is on the disk. Blocks; raises OSError, sqlite3.Error."""
        inventory, entries = self.store.scan(), self.store.index.entries()
        self._inventory, self._free = inventory, files.disk(self.store.root).free
        self._models = tuple(
            CachedModel(
                digest,
                entries[digest].id,
                entries[digest].name,
                entries[digest].revision,
                sum(inventory.blobs.get(b, 0) for b in model.chunks),
                model.ready,
                digest in self._pinned,
            )
            for digest, model in inventory.models.items()
            if digest in entries
        )
        return inventory
