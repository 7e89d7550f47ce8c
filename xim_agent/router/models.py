"""Published models on the router's disk: what there is, removal, and what no model needs. Everything blocks."""

import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from xim_agent import files
from xim_agent.cache.manifest import DIGEST, ManifestRefused, check
from xim_agent.errors import AgentError, Exit
from xim_agent.router.catalog import ALL, Published, models
from xim_agent.router.sql import rows, transaction


@dataclass(frozen=True)
class Garbage:
    """What no published model needs. `bytes` as allocated on the disk."""

    paths: tuple[Path, ...]
    chunks: int
    bytes: int


@contextmanager
def changing(directory: Path, waits: Callable[[], None], *, alone: bool) -> Iterator[None]:
    """Publishers side by side, or one that removes: until its models are registered, a publisher's chunks have no name.

    `directory`: the router's; `waits` is called before it has to wait. The lock goes with the process.
    Raises AgentError `publish_io`.
    """
    path = directory / "models" / "lock"
    try:
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise AgentError("publish_io", f"{path} cannot be used: {e}", exit_code=Exit.STATE) from e
    try:
        kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            waits()
            fcntl.flock(fd, kind)
        yield
    finally:
        os.close(fd)


def busy(directory: Path) -> bool:
    """Whether something is published, or removed, at this moment. Raises AgentError `publish_io`."""
    try:
        with changing(directory, _give_up, alone=True):
            return False
    except BlockingIOError:
        return True


def _give_up() -> None:
    raise BlockingIOError


def remove(directory: Path, db: sqlite3.Connection, name: str, revision: str) -> tuple[Published, Garbage]:
    """Takes a revision from the list and its chunks from the disk, unless another one needs them: what went.

    Blocks for as long as that takes. Raises AgentError `model_busy` (exit 4) while something is published, and what
    `unregister`, `garbage` and `sweep` raise.
    """
    try:
        with changing(directory, _give_up, alone=True):
            model = unregister(db, name, revision)
            found = garbage(db, directory)
            sweep(found)
    except BlockingIOError:
        raise AgentError(
            "model_busy",
            f"{name}@{revision} cannot be removed while a model is published",
            hint="try again when that is done",
            exit_code=Exit.BUSY,
        ) from None
    return model, found


def listed(db: sqlite3.Connection) -> list[dict[str, Any]]:
    """Newest first, sizes in bytes; `agents`: ids that have it assigned, `*`: all that have no other one."""
    return [
        {
            "model": m.name,
            "revision": m.revision,
            "task": m.task,
            "size": m.size_bytes,
            "stored": m.stored_bytes,
            "manifest": m.manifest,
            "published": m.created,
            "agents": _assigned(db, m),
        }
        for m in models(db)
    ]


def _assigned(db: sqlite3.Connection, model: Published) -> list[str]:
    query = (
        "SELECT a.agent_id AS id FROM assignments a LEFT JOIN agents g USING(agent_id)"
        " WHERE a.name=? AND a.revision=? AND (a.agent_id=? OR g.state != 'removed') ORDER BY 1"
    )
    return [str(row["id"]) for row in rows(db, query, (model.name, model.revision, ALL))]


def unregister(db: sqlite3.Connection, name: str, revision: str | None) -> Published:
    """Takes a model from the list; its chunks are garbage then.

    Raises AgentError `model_unknown`, `model_ambiguous` (exit 1), `model_assigned` (exit 4).
    """
    with transaction(db):
        found = [m for m in models(db) if m.name == name and revision in (None, m.revision)]
        if not found:
            wanted = f"{name}@{revision}" if revision else name
            raise AgentError(
                "model_unknown",
                f"no model {wanted!r} is published",
                hint="`router model ls` shows what is",
                exit_code=Exit.MISSING,
            )
        if len(found) > 1:
            raise AgentError(
                "model_ambiguous",
                f"{name} has {len(found)} revisions",
                hint=f"say which: {', '.join(f'{m.name}@{m.revision}' for m in found)}",
                exit_code=Exit.MISSING,
            )
        model = found[0]
        if agents := _assigned(db, model):
            whom = "all agents" if ALL in agents else f"{len(agents)} agents: {', '.join(agents[:5])}"
            raise AgentError(
                "model_assigned",
                f"{model.name}@{model.revision} is assigned to {whom}",
                hint="give them another model first: `router assign NAME`, with --agent for those that have their own",
                exit_code=Exit.BUSY,
            )
        key = (model.name, model.revision)
        db.execute("DELETE FROM models WHERE name=? AND revision=?", key)
        db.execute("DELETE FROM assignments WHERE name=? AND revision=?", key)  # of agents that were removed
    return model


def garbage(db: sqlite3.Connection, directory: Path) -> Garbage:
    """For who is `alone`. Raises AgentError `manifest_damaged` (exit 3): what a lost manifest named nobody knows."""
    root = directory / "models"
    manifests: set[str] = set()
    blobs: set[str] = set()
    for model in models(db):
        digest = model.manifest.removeprefix("sha256:")
        manifests.add(digest)
        blobs |= _named(root / "manifests" / f"{digest}.json", digest, model)
    useless = [p for p in _entries(root / "manifests") if p.name.removesuffix(".json") not in manifests]
    chunks = [p for folder in _entries(root / "blobs") if folder.is_dir() for p in _entries(folder)]
    dead = [p for p in chunks if p.name not in blobs]
    size = sum(map(files.disk_bytes, useless + dead))
    return Garbage((*useless, *dead), sum(bool(DIGEST.fullmatch(p.name)) for p in dead), size)


def _named(path: Path, digest: str, model: Published) -> frozenset[str]:
    try:
        data = path.read_bytes()
        if sha256(data).hexdigest() != digest:
            raise ValueError("other content than its name says")
        return frozenset(check(data).blobs())
    except (OSError, ValueError, ManifestRefused) as e:
        raise AgentError(
            "manifest_damaged",
            f"the manifest of {model.name}@{model.revision} cannot be read: {path}: {e}",
            hint="publish that model again under the same name and revision, or remove it; nothing was deleted",
            exit_code=Exit.DAMAGED,
        ) from e


def _entries(path: Path) -> list[Path]:
    try:
        return sorted(path.iterdir())
    except FileNotFoundError:
        return []


def sweep(found: Garbage) -> None:
    """Manifests come first, so that none is ever left without its chunks. Raises AgentError `publish_io`."""
    for path in found.paths:
        try:
            files.remove_tree(path)
            with suppress(OSError):  # not empty
                path.parent.rmdir()
        except OSError as e:
            raise AgentError("publish_io", f"{path} cannot be removed: {e}", exit_code=Exit.STATE) from e
