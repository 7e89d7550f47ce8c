"""What an operation may put on the disk and what must go first: ordered steps, or a refusal with the sums. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from xim_agent.cache.inventory import BLOCK, Evict, Inventory, Model, What, evict
from xim_agent.errors import AgentError, Exit

GIB = 1024**3
STALE = 24 * 3600.0
INDEX = 64 * 1024  # bytes of the index when it is written anew beside the old one: a row of 200 bytes for each model


@dataclass(frozen=True)
class Need:
    """The model to make ready. `chunks`: allocated bytes by blob; `files`: allocated bytes of the ready copy.

    `done`: blobs whose places in the partial are all written; `workers`: chunks that may be on disk twice for a moment;
    `beside`: bytes that grow whatever the plan is: manifest, journals, directories, index.
    """

    manifest: str
    chunks: Mapping[str, int]
    files: int
    done: frozenset[str] = frozenset()
    workers: int = 8
    beside: int = 0


@dataclass(frozen=True)
class Reserves:
    """Bytes. `disk` is left to others (at least 2 % of it), `compile` to vLLM, which writes its caches unplanned."""

    disk: int = GIB
    compile: int = 2 * GIB


RESERVES = Reserves()


@dataclass(frozen=True)
class Limits:
    """Bytes, but `now` (Unix seconds) and `vllm` (version whose compile cache is in use, None = unknown)."""

    bound: int
    disk_free: int
    disk_size: int
    now: float = 0.0
    vllm: str | None = None
    reserves: Reserves = RESERVES

    @property
    def reserve(self) -> int:
        """Free disk that is left to others."""
        return max(self.reserves.disk, self.disk_size // 50)

    @property
    def compile_reserve(self) -> int:
        """For compile caches; a tenth of the bound where that is less."""
        return min(self.reserves.compile, self.bound // 10)


@dataclass(frozen=True)
class Holds:
    """`in_use`: ready copies that the engine has open, free after a drain. `pinned`: never touched."""

    in_use: frozenset[str] = frozenset()
    pinned: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Drain:
    """The running engine must be stopped before the next step."""

    def __str__(self) -> str:
        return "drain"


@dataclass(frozen=True)
class Fetch:
    """Bring the missing chunks into the store; nothing is expanded."""

    def __str__(self) -> str:
        return "fetch"


@dataclass(frozen=True)
class Expand:
    """Make the ready copy, fetching what is missing.

    `keep` False: fetched chunks pass through without being stored, stored ones go as soon as they are written.
    """

    keep: bool

    def __str__(self) -> str:
        return "expand" if self.keep else "expand, chunks not kept"


Step = Evict | Drain | Fetch | Expand


class Case(Enum):
    READY = "ready"  # nothing to fetch
    SERVE = "fetch while serving"
    CHUNKS_FIRST = "chunks while serving, then drain and expand"
    DRAIN_FIRST = "drain, then fetch"


@dataclass(frozen=True)
class Plan:
    """`outage`: bytes that are fetched or expanded while no model is served."""

    case: Case
    steps: tuple[Step, ...]
    outage: int = 0


class CacheRefused(AgentError):
    """The model does not fit. All sums in bytes."""

    def __init__(self, needed: int, limits: Limits, taken: int) -> None:
        self.needed, self.bound, self.free, self.reserve = needed, limits.bound, limits.disk_free, limits.reserve
        super().__init__(
            "cache_refused",
            f"the model does not fit: needed {_gb(needed)}, cache bound {_gb(self.bound)} "
            f"({_gb(taken)} of it cannot be freed), disk free {_gb(self.free)}, reserve {_gb(self.reserve)}",
            hint="raise XEROTIER_AGENT_MODEL_CACHE_MAX_SIZE_GB"
            if needed + taken > self.bound
            else "free space on the disk of the cache",
            exit_code=Exit.CONFIG,
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def plan(inventory: Inventory, need: Need, limits: Limits, holds: Holds) -> Plan:
    """The first case that fits, in the order of model-cache.md §4. Raises CacheRefused with the sums when none does."""
    room = _Room(inventory, need, limits)
    drained = replace(holds, in_use=holds.in_use & {need.manifest})
    if need.manifest in inventory.models and inventory.models[need.manifest].ready:
        return room.ready(holds, drained)
    serving = bool(holds.in_use - {need.manifest})
    for keep in (True, False):
        if (found := room.expand(inventory, keep, holds)) is not None:
            return Plan(Case.SERVE, (*found, Expand(keep)), 0 if serving else need.files)
    if serving and (steps := room.chunks_first(holds, drained)) is not None:
        return Plan(Case.CHUNKS_FIRST, steps, need.files)
    for keep in (True, False):
        if serving and (found := room.expand(inventory, keep, drained)) is not None:
            return Plan(Case.DRAIN_FIRST, (Drain(), *found, Expand(keep)), room.missing() + need.files)
    raise CacheRefused(need.files, limits, _fixed(inventory, need, drained, limits))


def trim(inventory: Inventory, wanted: str | None, limits: Limits, holds: Holds) -> tuple[Evict, ...]:
    """What must go for the bound alone, since it was lowered or vLLM wrote more than expected; `wanted` goes last."""
    first = replace(holds, pinned=holds.pinned | ({wanted} if wanted else set()))
    todo = list(_victims(inventory, "", limits, first))
    todo += [victim for victim in _victims(inventory, "", limits, holds) if victim not in todo]
    now, steps = inventory, []
    for what, key in todo:
        if now.total <= limits.bound:
            break
        now, step = evict(now, what, key, frozenset())
        steps += [step] if step.bytes else []
    return tuple(steps)


@dataclass(frozen=True)
class _Room:
    """How much may still grow, against the bound and against the disk, both seen from the inventory at the start."""

    start: Inventory
    need: Need
    limits: Limits

    def left(self, now: Inventory) -> int:
        compiled = now.compile.get(self.limits.vllm or "", 0)
        bound = self.limits.bound - now.total - max(0, self.limits.compile_reserve - compiled)
        free = self.limits.disk_free - self.limits.reserve + self.start.total - now.total
        return min(bound, free) - self.need.beside

    def missing(self) -> int:
        """Bytes of the chunks that have to be fetched and stored."""
        return sum(self._lacking(self.start, b) for b in self.need.chunks if b not in self.need.done)

    def _lacking(self, now: Inventory, blob: str) -> int:
        """Bytes that storing this blob adds: one that is there may be cut short, and is then fetched again."""
        wanted = self.need.chunks[blob]
        return max(0, wanted - BLOCK - now.blobs[blob]) if blob in now.blobs else wanted

    def ready(self, holds: Holds, drained: Holds) -> Plan:
        """Nothing grows, so only the bound counts: it may have been lowered since. Its own chunks are a second copy."""
        for held in (holds, drained):
            used = replace(held, in_use=held.in_use | {self.need.manifest})
            bound = self.limits.bound - self.need.beside
            steps = trim(self.start, None, replace(self.limits, bound=bound), used)
            if self.start.total - sum(step.bytes for step in steps) <= bound:
                stop = () if held is holds else (Drain(),)
                return Plan(Case.READY, (*stop, *steps))
        size = self.start.models[self.need.manifest].ready
        raise CacheRefused(size, self.limits, _fixed(self.start, self.need, drained, self.limits))

    def make(self, now: Inventory, growth: int, holds: Holds) -> tuple[Inventory, tuple[Evict, ...]] | None:
        """Evicts in order until `growth` bytes fit into what is left; None when they never do."""
        steps: list[Evict] = []
        for what, key in _victims(now, self.need.manifest, self.limits, holds):
            if self.left(now) >= growth:
                break
            now, step = evict(now, what, key, self.need.chunks.keys())
            if step.bytes:
                steps.append(step)
        return (now, tuple(steps)) if self.left(now) >= growth else None

    def growth(self, now: Inventory, keep: bool) -> int:
        """Most bytes that the expansion adds at any moment; below 0 where it frees some before it adds any."""
        partial = now.partials.get(self.need.manifest)
        files = max(0, self.need.files - partial.bytes) if partial else self.need.files
        if keep:
            return files + sum(self._lacking(now, b) for b in self.need.chunks if b not in self.need.done)
        own = now.only_of(self.need.manifest)
        # What a chunk surely gives back when it goes, also where it is planned with its share of directories.
        sure = {
            b: max(0, min(self.need.chunks[b] - 2 * BLOCK, now.blobs[b]))
            for b in own
            if b in self.need.chunks and b in now.blobs
        }
        first = sure.keys() & self.need.done  # written already: after a power cut, chunks that went may be back
        eaten = sure.keys() - first
        most = max((self.need.chunks[b] for b in eaten), default=0)
        return max(0, files - sum(sure[b] for b in eaten)) + self.need.workers * most - sum(sure[b] for b in first)

    def expand(self, now: Inventory, keep: bool, holds: Holds) -> tuple[Evict, ...] | None:
        found = self.make(now, self.growth(now, keep), holds)
        return found[1] if found else None

    def chunks_first(self, holds: Holds, drained: Holds) -> tuple[Step, ...] | None:
        found = self.make(self.start, self.missing(), holds)
        if found is None:
            return None
        now, before = found
        chunks = frozenset(self.need.chunks) - self.need.done | (frozenset(self.need.chunks) & now.blobs.keys())
        target = now.models.get(self.need.manifest, Model(self.need.manifest))
        fetched = replace(
            now,
            models={**now.models, self.need.manifest: replace(target, chunks=chunks)},
            blobs={**{b: self.need.chunks[b] for b in chunks}, **now.blobs},
        )
        for keep in (True, False):
            after = self.expand(fetched, keep, drained)
            if after is not None:
                return (*before, Fetch(), Drain(), *after, Expand(keep))
        return None


def _victims(now: Inventory, wanted: str, limits: Limits, holds: Holds) -> Iterator[tuple[What, str]]:
    """Everything that may go, in the order in which it goes (model-cache.md §4)."""
    never = holds.pinned | {wanted}
    yield "quarantine", ""
    yield "orphans", ""
    partials = sorted((p.used, key) for key, p in now.partials.items() if key not in never)
    yield from (("partial", key) for used, key in partials if used < limits.now - STALE)
    if limits.vllm is not None:
        yield from (("compile", version) for version in sorted(now.compile) if version != limits.vllm)
    models = sorted((m for m in now.models.values() if m.manifest not in never), key=lambda m: (m.used, m.manifest))
    for model in sorted(models, key=lambda m: not m.complete):
        if model.ready and model.manifest not in holds.in_use:
            yield "ready", model.manifest
    yield from (("chunks", m.manifest) for m in models if m.manifest in holds.in_use and m.ready)
    rest = [(m.used, m.manifest, "chunks") for m in models if not (m.manifest in holds.in_use and m.ready)]
    rest += [(used, key, "partial") for used, key in partials if used >= limits.now - STALE]
    for _, key, what in sorted(rest):
        yield ("partial", key) if what == "partial" else ("chunks", key)


def _fixed(inventory: Inventory, need: Need, holds: Holds, limits: Limits) -> int:
    """Bytes that would be left if everything that may go went, the reserve for compile caches included."""
    now = inventory
    for what, key in _victims(inventory, need.manifest, limits, holds):
        now, _ = evict(now, what, key, need.chunks.keys())
    own = sum(now.blobs.get(b, 0) for b in now.only_of(need.manifest))
    partial = now.partials.get(need.manifest)
    ready = now.models[need.manifest].ready if need.manifest in now.models else 0
    compiled = now.compile.get(limits.vllm or "", 0)
    kept = now.total - own - ready - (partial.bytes if partial else 0)
    return kept + need.beside + max(0, limits.compile_reserve - compiled)
