"""What lies in a cache directory, seen without its lock and without a change. Everything blocks."""

from dataclasses import dataclass
from pathlib import Path

from xim_agent import files
from xim_agent.cache import claim, tree
from xim_agent.cache.plan import Limits
from xim_agent.cache.sweep import FOLDERS


@dataclass(frozen=True)
class Look:
    """`used`: bytes as allocated; `elsewhere`: parts that lie on another file system than the directory."""

    limits: Limits
    used: int
    elsewhere: tuple[str, ...]


def look(directory: Path, bound: int, disk_of: Path) -> Look:
    """`bound` in bytes; `disk_of`: the directory, or what there is of its path.

    Raises AgentError `cache_format`, `cache_foreign`, OSError. While an agent works in it, the numbers are of no one
    moment.
    """
    disk = files.disk(disk_of)
    limits = Limits(bound, disk.free, disk.total)
    if disk_of != directory:
        return Look(limits, 0, ())
    root = directory.resolve()
    if (data := tree.read(root / claim.MARK, 4096)) is not None:
        claim.known_format(root, data)
    claim.check_ours(root, FOLDERS)
    device = root.stat().st_dev
    elsewhere = []
    for name in FOLDERS:
        try:
            with tree.directory(root / name):
                if (root / name).stat().st_dev != device:
                    elsewhere.append(name)
        except FileNotFoundError:
            continue
    return Look(limits, files.disk_bytes(root), tuple(elsewhere))
