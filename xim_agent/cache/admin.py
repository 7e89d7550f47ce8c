"""What an operator may ask of a cache and do to it; the same beside a running agent and without one."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import trio

from xim_agent.cache.inventory import Evict, Inventory, What, evict
from xim_agent.cache.ledger import Cause, age_of
from xim_agent.cache.listing import Listing, Names, held, listing
from xim_agent.cache.manifest import DIGEST
from xim_agent.cache.plan import STALE
from xim_agent.cache.service import Cache, named
from xim_agent.cache.verify import verify
from xim_agent.errors import AgentError, Exit


@dataclass(frozen=True)
class Gone:
    """One thing that goes or went. `name`: MODEL@REV, or what else it is known by; `bytes` as allocated."""

    what: What
    name: str
    bytes: int


class Commands:
    """`agent`: whether the cache is that of a running agent. All results are plain values, made for JSON.

    All raise AgentError: `model_unknown`, `model_ambiguous`, `model_in_use`, `model_not_ready`, `verify_running`,
    `cache_io`. A removal that is cancelled ends with the step at work: each is whole or not begun.
    """

    def __init__(self, cache: Cache, *, agent: bool) -> None:
        self._cache, self._agent = cache, agent
        self._verifying = trio.Lock()

    async def ls(self) -> dict[str, Any]:
        with named("cache_io", self._cache.directory):
            return asdict(await trio.to_thread.run_sync(self._list))

    def _list(self) -> Listing:
        cache, inventory = self._cache, self._cache.look()
        names = Names.of(cache.store)
        return listing(cache.store, inventory, names, cache.limits(), cache.in_use, cache.preparing)

    async def path(self, target: str) -> str:
        """The ready directory of the model; of several revisions the only one that is ready."""
        with named("cache_io", self._cache.directory):
            names = await trio.to_thread.run_sync(Names.of, self._cache.store)
        found = names.find(target)
        ready = [digest for digest in found if digest in self._cache.store.ready]
        digest = ready[0] if len(ready) == 1 else names.one(target)
        path = self._cache.store.ready.get(digest)
        if path is None:
            raise AgentError(
                "model_not_ready",
                f"{names.text(digest)} has no ready copy, only compressed chunks or parts",
                hint="the agent makes the files when the model is assigned to it",
                exit_code=Exit.MISSING,
            )
        return str(path)

    async def rm(self, target: str) -> list[dict[str, Any]]:
        """Ready copy, chunks that no other model has, parts and manifest of one model."""
        cache = self._cache
        with named("cache_io", self._cache.directory):
            async with cache.changing:
                names = await trio.to_thread.run_sync(Names.of, cache.store)
                digest = names.one(target)
                state = held(digest, cache.in_use, cache.preparing)
                if state is not None:
                    raise AgentError(
                        "model_in_use",
                        f"{names.text(digest)} is {state}",
                        hint="assign another model to this agent, or stop the agent, then remove it",
                        exit_code=Exit.BUSY,
                    )
                inventory = await trio.to_thread.run_sync(cache.store.scan)
                return await self._remove(inventory, _all_of(inventory, digest), names)

    async def prune(self, everything: bool = False, dry_run: bool = False) -> list[dict[str, Any]]:
        """What costs no download; `everything`: also models that are neither in use nor prepared.

        Without an agent the model used last stays as it is: the agent begins with it.
        """
        cache = self._cache
        with named("cache_io", self._cache.directory):
            async with cache.changing:
                names = await trio.to_thread.run_sync(Names.of, cache.store)
                inventory = await trio.to_thread.run_sync(cache.store.scan)
                keep = set(cache.in_use) | ({cache.preparing} if cache.preparing else set())
                if not self._agent and (last := names.last_used()) is not None:
                    keep.add(last)
                now = cache.clock.now()
                todo = list(_sweep(inventory, frozenset(keep), now, cache.vllm, everything, self._agent))
                return await self._remove(inventory, todo, names, dry_run)

    async def verify(self, target: str | None, report: Callable[[int, int], None]) -> dict[str, Any]:
        """Reads and hashes what is stored and what is ready; see `verify.Verified`. One at a time."""
        if self._verifying.locked():
            raise AgentError(
                "verify_running", "this cache is being verified already", hint="wait for it", exit_code=Exit.BUSY
            )
        async with self._verifying:
            with named("cache_io", self._cache.directory):
                names = await trio.to_thread.run_sync(Names.of, self._cache.store)
                wanted = None if target is None else frozenset(names.find(target))
                return asdict(await verify(self._cache, names, wanted, report))

    async def _remove(
        self, now: Inventory, todo: list[tuple[What, str]], names: Names, dry_run: bool = False
    ) -> list[dict[str, Any]]:
        """In order, each as far as what went before leaves something of it. The caller holds `changing`."""
        cache, gone = self._cache, []
        for what, key in todo:
            before = now
            now, step = evict(now, what, key, frozenset())
            if what == "orphans":  # a name of another kind is a chunk that is being written
                blobs = frozenset(b for b in step.blobs if DIGEST.fullmatch(b))
                step = Evict(what, key, sum(before.blobs[b] for b in blobs), blobs)
            if step.bytes == 0 and what != "partial":  # directories alone take no block on some file systems
                continue
            if not dry_run:
                age = age_of(step, before, cache.clock.now())
                await cache.evict_here(step, Cause("operator", age))
            gone.append(asdict(Gone(what, names.text(key) if key else "", step.bytes)))
        if not dry_run:
            await trio.to_thread.run_sync(self._forget, now, {key for _, key in todo})
            await trio.to_thread.run_sync(cache.look)
        return gone

    def _forget(self, left: Inventory, keys: set[str]) -> None:
        """Manifests of which nothing is left."""
        for key in keys & (self._cache.store.known.keys() | self._cache.store.index.entries().keys()):
            model = left.models.get(key)
            empty = key not in left.partials and not (model and (model.chunks or model.ready))
            if empty:
                self._cache.store.forget(key)


def _all_of(inventory: Inventory, digest: str) -> list[tuple[What, str]]:
    kinds: list[What] = []
    if digest in inventory.models:
        kinds += ["ready", "chunks"]
    if digest in inventory.partials:
        kinds.append("partial")
    return [(what, digest) for what in kinds]


def _sweep(
    inventory: Inventory, keep: frozenset[str], now: float, vllm: str | None, everything: bool, agent: bool
) -> Iterator[tuple[What, str]]:
    yield "quarantine", ""
    yield "orphans", ""
    for key, partial in sorted(inventory.partials.items()):
        if key not in keep and (everything or partial.used < now - STALE):
            yield "partial", key
    for version in sorted(inventory.compile):
        if version != vllm and (vllm is not None or (everything and not agent)):
            yield "compile", version
    for key, model in sorted(inventory.models.items(), key=lambda item: item[1].used):
        if key in keep:
            continue
        if model.ready and (everything or model.complete):
            yield "ready", key
        if everything and model.chunks:
            yield "chunks", key
