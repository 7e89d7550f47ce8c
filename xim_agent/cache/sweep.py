"""What does not belong into the cache goes at the start: leftovers of crashes, and what others put there."""

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from xim_agent import files
from xim_agent.cache import tree

log = logging.getLogger("xim_agent.cache")

FOLDERS = ("blobs", "manifests", "ready", "partial", "quarantine", "compile")
_NAMED = 5

Keep = Callable[["os.DirEntry[str]"], bool]


def sweep(root: Path) -> None:
    """Links go, never what they name. The root itself may be a mount: there only our own leftovers go.

    Raises AgentError `cache_foreign`, OSError.
    """
    foreign: list[Path] = []
    _clear(root, lambda e: not e.name.startswith(files.TEMPORARY), foreign)
    for folder in _clear(root / "blobs", _directory("[0-9a-f]{2}"), foreign):
        _clear(folder, _file(folder.name + "[0-9a-f]{62}"), foreign)
    _clear(root / "manifests", _file(r"[0-9a-f]{64}\.json"), foreign)
    for folder in _clear(root / "ready", _directory(".*"), foreign):
        _clear(folder, _directory(".*"), foreign)
    _clear(root / "partial", _directory("[0-9a-f]{64}"), foreign)
    _clear(root / "quarantine", lambda e: not e.name.startswith("evicted-"), foreign)
    _clear(root / "compile", _directory(".*"), foreign)
    if foreign:
        named = [str(path) for path in foreign[:_NAMED]]
        log.warning("what the cache did not make is removed", extra={"entries": len(foreign), "paths": named})


def _directory(name: str) -> Keep:
    return lambda e: e.is_dir(follow_symlinks=False) and re.fullmatch(name, e.name, re.DOTALL) is not None


def _file(name: str) -> Keep:
    return lambda e: e.is_file(follow_symlinks=False) and re.fullmatch(name, e.name) is not None


def _clear(folder: Path, keep: Keep, foreign: list[Path]) -> list[Path]:
    """Removes the rest and tells it, our own leftovers excepted. What stays."""
    kept = []
    with tree.directory(folder):  # else what is removed would be somebody else's
        entries = list(os.scandir(folder))
    for entry in entries:
        path = folder / entry.name
        if keep(entry):
            kept.append(path)
            continue
        tree.remove(path)
        if not entry.name.startswith((files.TEMPORARY, "evicted-")):
            foreign.append(path)
    return kept
