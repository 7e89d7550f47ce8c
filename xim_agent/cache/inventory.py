"""What lies in the cache, in allocated bytes, and what is left when something of it goes. Pure."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Literal

BLOCK = 4096

What = Literal["quarantine", "orphans", "partial", "compile", "ready", "chunks"]


def allocated(size: int) -> int:
    """Bytes on disk of a file of `size` bytes, rounded up to blocks; one block more for its share of directories."""
    return -(-size // BLOCK) * BLOCK + BLOCK


@dataclass(frozen=True)
class Model:
    """One manifest on disk. `chunks`: blobs it keeps in the store; `complete`: all it has; `ready`: bytes, 0 = none."""

    manifest: str
    used: float = 0.0
    chunks: frozenset[str] = frozenset()
    complete: bool = False
    ready: int = 0


@dataclass(frozen=True)
class Partial:
    bytes: int
    used: float


@dataclass(frozen=True)
class Inventory:
    """Allocated bytes of all there is. `compile` by vLLM version, `partials` by manifest; `other` never goes."""

    models: Mapping[str, Model] = field(default_factory=dict)
    blobs: Mapping[str, int] = field(default_factory=dict)
    partials: Mapping[str, Partial] = field(default_factory=dict)
    compile: Mapping[str, int] = field(default_factory=dict)
    quarantine: int = 0
    other: int = 0

    def tiers(self) -> dict[str, int]:
        return {
            "blobs": sum(self.blobs.values()),
            "ready": sum(m.ready for m in self.models.values()),
            "partial": sum(p.bytes for p in self.partials.values()),
            "quarantine": self.quarantine,
            "compile": sum(self.compile.values()),
            "other": self.other,
        }

    @property
    def total(self) -> int:
        return sum(self.tiers().values())

    def only_of(self, manifest: str) -> frozenset[str]:
        """Blobs that no other model keeps."""
        others: set[str] = set()
        for model in self.models.values():
            if model.manifest != manifest:
                others |= model.chunks
        return self.models[manifest].chunks - others if manifest in self.models else frozenset()


@dataclass(frozen=True)
class Evict:
    what: What
    key: str
    bytes: int
    blobs: frozenset[str] = frozenset()

    def __str__(self) -> str:
        blobs = f", {len(self.blobs)} blobs" if self.blobs else ""
        return f"evict {self.what} {self.key}".rstrip() + f" ({self.bytes} bytes{blobs})"


def evict(now: Inventory, what: What, key: str, needed: AbstractSet[str]) -> tuple[Inventory, Evict]:
    """The inventory without that victim. A blob goes only when nobody else keeps it and it is not `needed`."""
    if what == "quarantine":
        return replace(now, quarantine=0), Evict(what, key, now.quarantine)
    if what == "partial":
        kept = {k: p for k, p in now.partials.items() if k != key}
        return replace(now, partials=kept), Evict(what, key, now.partials[key].bytes)
    if what == "compile":
        others = {k: n for k, n in now.compile.items() if k != key}
        return replace(now, compile=others), Evict(what, key, now.compile[key])
    if what == "ready":
        model = now.models[key]
        return replace(now, models={**now.models, key: replace(model, ready=0)}), Evict(what, key, model.ready)
    if what == "orphans":
        held: set[str] = set().union(*(m.chunks for m in now.models.values()))
        gone = frozenset(now.blobs.keys() - held - needed)
        models = now.models
    else:
        gone = now.only_of(key) - needed
        models = {**now.models, key: replace(now.models[key], chunks=frozenset(), complete=False)}
    freed = sum(now.blobs.get(b, 0) for b in gone)
    left = {b: n for b, n in now.blobs.items() if b not in gone}
    return replace(now, blobs=left, models=models), Evict(what, key, freed, gone)
