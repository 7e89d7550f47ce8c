"""The model cache: takes an assigned model to a directory that vLLM can open, within the bound."""

import logging
import random
import re
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import trio

from xim_agent.backoff import Backoff
from xim_agent.cache.manifest import check_component, manifest_digest
from xim_agent.cache.operation import Operation
from xim_agent.cache.plan import Holds
from xim_agent.cache.store import Store
from xim_agent.cache.transfer import BlobSource, Counters
from xim_agent.clock import Clock
from xim_agent.errors import AgentError, Exit
from xim_agent.health import Health
from xim_agent.mesh.messages import ModelRef, Progress

log = logging.getLogger("xim_agent.cache")


@dataclass(frozen=True)
class CachedModel:
    """Bytes as allocated; `stored`: its chunks, shared ones included."""

    manifest: str
    id: str
    name: str
    revision: str
    stored: int
    ready: int
    in_use: bool


@dataclass(frozen=True)
class CacheStatistics:
    """Bytes as allocated at the last look, which is taken before and after every operation; the rest counts up."""

    bytes_used: int
    bound: int
    network_bytes: int
    hit_bytes: int
    stalls: int
    retries: int
    wrong_blobs: int
    evictions: Mapping[str, int]
    models: tuple[CachedModel, ...]


@contextmanager
def _named(code: str, directory: Path) -> Iterator[None]:
    """What the disk refuses becomes an AgentError."""
    try:
        yield
    except (OSError, sqlite3.Error) as e:
        raise AgentError(code, f"cannot use the model cache {directory}: {e}", exit_code=Exit.STATE) from e


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
    ) -> None:
        self.directory, self.max_bytes, self.downloads, self.source = directory, max_bytes, downloads, source
        self.allow_unsafe, self.clock, self.health, self.rand, self.backoff = allow_unsafe, clock, health, rand, backoff
        self.counters = Counters()
        self.evictions: Counter[str] = Counter()
        self._store: Store | None = None
        self._one = trio.Lock()
        self._pinned: set[str] = set()
        self._vllm: str | None = None
        self._used = 0
        self._models: tuple[CachedModel, ...] = ()

    async def __aenter__(self) -> Self:
        with _named("cache_directory", self.directory):
            self._store = await trio.to_thread.run_sync(Store.open, self.directory)
            try:
                await trio.to_thread.run_sync(self._look)
            except BaseException:
                self._store.close()
                raise
        return self

    async def __aexit__(self, *_: object) -> None:
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
        async with self._one:
            operation = Operation(self, model, digest, report, release)
            try:
                with _named("cache_io", self.directory):
                    path = await operation.run()
                    await trio.to_thread.run_sync(self._look)
            finally:
                self.health.clear("model_fetch")
                self.health.clear("cache_disk_full")
            return path

    def pin(self, model: ModelRef) -> None:
        """In use by the engine: its ready copy stays."""
        self._pinned.add(manifest_digest(model.manifest))

    def unpin(self, model: ModelRef) -> None:
        self._pinned.discard(manifest_digest(model.manifest))

    def compile_cache_dir(self, vllm_version: str) -> Path:
        """Where this vLLM keeps what it compiled; counted in the bound, that of other versions goes first.

        Raises AgentError `cache_io`.
        """
        self._vllm = re.sub(r"[^A-Za-z0-9._+-]", "_", vllm_version).lstrip(".") or "unknown"
        path = self.store.root / "compile" / self._vllm
        with _named("cache_io", self.directory):
            path.mkdir(mode=0o750, exist_ok=True)
        return path

    def statistics(self) -> CacheStatistics:
        c = self.counters
        return CacheStatistics(
            self._used,
            self.max_bytes,
            c.network_bytes,
            c.hit_bytes,
            c.stalls,
            c.retries,
            c.wrong_blobs,
            dict(self.evictions),
            self._models,
        )

    # -- for operations ------------------------------------------------------------------------------------------

    def holds(self, can_drain: bool, pinned: frozenset[str]) -> Holds:
        """`pinned`: by the operator. Where nothing can be drained, what is in use counts as pinned too."""
        in_use = frozenset(self._pinned)
        return Holds(in_use, pinned) if can_drain else Holds(frozenset(), pinned | in_use)

    @property
    def vllm(self) -> str | None:
        """The version whose compile cache is in use."""
        return self._vllm

    def _look(self) -> None:
        inventory, entries = self.store.scan(), self.store.index.entries()
        self._used = inventory.total
        self._models = tuple(
            CachedModel(
                digest,
                entries[digest].id,
                entries[digest].name,
                entries[digest].revision,
                sum(inventory.blobs[b] for b in model.chunks),
                model.ready,
                digest in self._pinned,
            )
            for digest, model in inventory.models.items()
            if digest in entries
        )
