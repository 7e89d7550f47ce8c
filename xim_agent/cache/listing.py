"""What `cache ls` shows of a cache, and how a person's word for a model is found in it."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from difflib import get_close_matches

from xim_agent import files
from xim_agent.cache.inventory import Inventory
from xim_agent.cache.plan import Limits
from xim_agent.cache.store import Store
from xim_agent.errors import AgentError, Exit

FORMAT = 1  # of the JSON object


@dataclass(frozen=True)
class Row:
    """One model revision. `state`: in use, preparing, ready, stored (chunks only) or partial; `percent` of it is here.

    Bytes: `size` of its files; the rest as allocated on disk, `stored_bytes` with chunks that other models share.
    `saved`: share of the size that compression saves, None unless all chunks are stored. `last_used`: Unix seconds.
    """

    model: str
    revision: str
    id: str
    manifest: str
    state: str
    percent: int
    size: int
    stored_bytes: int
    ready_bytes: int
    partial_bytes: int
    saved: float | None
    last_used: float | None
    path: str | None


@dataclass(frozen=True)
class Listing:
    """All sums in bytes; `tiers` are the parts of `used`; `reserve` is the free disk that is left to others."""

    format: int
    directory: str
    bound: int
    used: int
    reserve: int
    disk_free: int
    disk_size: int
    tiers: Mapping[str, int]
    models: tuple[Row, ...]


@dataclass(frozen=True)
class Name:
    """`id` is empty for a model that never was ready here; `last_used` None as well."""

    model: str
    revision: str
    id: str
    size: int
    last_used: float | None


class Names(dict[str, Name]):
    """By manifest."""

    @classmethod
    def of(cls, store: Store) -> "Names":
        """Blocks. Raises sqlite3.Error."""
        found = cls()
        for digest, known in dict(store.known).items():
            found[digest] = Name(known.name, known.revision, "", known.size, None)
        for digest, entry in store.index.entries().items():
            found[digest] = Name(entry.name, entry.revision, entry.id, entry.size, entry.used)
        for digest, path in dict(store.ready).items():
            if digest not in found:  # index and manifest are lost
                id_, revision = path.parent.name, path.name
                found[digest] = Name(id_, revision, id_, files.disk_bytes(path), None)
        return found

    def text(self, digest: str) -> str:
        name = self.get(digest)
        return f"{name.model}@{name.revision}" if name else digest

    def last_used(self) -> str | None:
        used = {digest: name.last_used for digest, name in self.items() if name.last_used is not None}
        return max(used, key=lambda digest: used[digest]) if used else None

    def find(self, target: str) -> list[str]:
        """Manifests of MODEL or MODEL@REV; MODEL is a name or an id, or 12 digits or more of a manifest's digest.

        Raises AgentError `model_unknown`.
        """
        found = [digest for digest, name in self.items() if target in _calls(name) or _starts(digest, target)]
        if found:
            return sorted(found)
        known = sorted({word for digest, name in self.items() for word in _calls(name)[:2]})
        near = get_close_matches(target, known, n=3)
        listed = f"did you mean {', '.join(near)}? " if near else ""
        raise AgentError(
            "model_unknown",
            f"there is no model {target[:200]!r} in this cache",
            hint=f"{listed}`cache ls --partials` shows what there is",
            exit_code=Exit.MISSING,
        )

    def one(self, target: str) -> str:
        """As `find`; raises AgentError `model_ambiguous` as well."""
        found = self.find(target)
        if len(found) == 1:
            return found[0]
        texts = [self.text(digest) for digest in found]
        if len(set(texts)) < len(texts):
            texts = [f"{text} ({digest[:12]})" for text, digest in zip(texts, found, strict=True)]
        raise AgentError(
            "model_ambiguous",
            f"{target[:200]!r} is {len(found)} models: {', '.join(sorted(texts))}",
            hint="name one, as MODEL@REV, or by the digits in brackets",
            exit_code=Exit.MISSING,
        )


def _calls(name: Name) -> list[str]:
    words = [name.model, f"{name.model}@{name.revision}"]
    return [*words, name.id, f"{name.id}@{name.revision}"] if name.id else words


def _starts(digest: str, target: str) -> bool:
    return len(target) >= 12 and digest.startswith(target)


def held(digest: str, in_use: AbstractSet[str], preparing: str | None) -> str | None:
    """What keeps a model from being removed."""
    if digest in in_use:
        return "in use by the engine"
    return "being prepared for the engine" if digest == preparing else None


def listing(
    store: Store, inventory: Inventory, names: Names, limits: Limits, in_use: AbstractSet[str], preparing: str | None
) -> Listing:
    rows = [
        _row(store, inventory, digest, name, digest in in_use, digest == preparing) for digest, name in names.items()
    ]
    rows.sort(key=lambda row: (row.model, row.revision, row.manifest))
    return Listing(
        FORMAT,
        str(store.root),
        limits.bound,
        inventory.total,
        limits.reserve,
        limits.disk_free,
        limits.disk_size,
        inventory.tiers(),
        tuple(rows),
    )


def _row(store: Store, inventory: Inventory, digest: str, name: Name, in_use: bool, preparing: bool) -> Row:
    model, partial = inventory.models.get(digest), inventory.partials.get(digest)
    known, path = store.known.get(digest), store.ready.get(digest)
    stored = sum(inventory.blobs.get(b, 0) for b in model.chunks) if model else 0
    share = max(
        len(model.chunks) / len(known.blobs) if model and known and known.blobs else 0.0,
        partial.bytes / name.size if partial and name.size else 0.0,
    )
    whole = bool(model and (model.ready or model.complete))
    if in_use:
        state = "in use"
    elif preparing:
        state = "preparing"
    elif whole:
        state = "ready" if model and model.ready else "stored"
    else:
        state = "partial"
    return Row(
        model=name.model,
        revision=name.revision,
        id=name.id,
        manifest=digest,
        state=state,
        percent=100 if whole else min(99, int(100 * share)),
        size=name.size,
        stored_bytes=stored,
        ready_bytes=model.ready if model else 0,
        partial_bytes=partial.bytes if partial else 0,
        saved=max(0.0, 1 - stored / name.size) if model and model.complete and name.size else None,
        last_used=name.last_used,
        path=str(path) if path else None,
    )
