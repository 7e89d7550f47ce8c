"""What vLLM leaves behind: shared memory, socket, temporary files. Noted while it runs, swept when it is gone.

Used by the guard after its fork, so nothing here imports anything late.
"""

import json
import os
import shutil
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xim_agent.engine.tree import descendants

SHM = "/dev/shm"  # noqa: S108
LOOKS_AT_NEW_FILE = 20  # a file is mapped within moments of its creation; the guard looks twice a second


def mapped_shm(pid: int) -> dict[int, int]:
    """Files of /dev/shm that `pid` maps: device by inode. Not by name: a semaphore is mapped before it gets its own."""
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as file:
            fields = [line.split(maxsplit=5) for line in file if f" {SHM}/" in line]
    except OSError:
        return {}
    return {
        int(inode): os.makedev(*(int(part, 16) for part in device.split(":"))) for _, _, _, device, inode, _ in fields
    }


def _listing() -> set[tuple[str, int]]:
    try:
        with os.scandir(SHM) as entries:
            return {(entry.name, entry.inode()) for entry in entries}
    except OSError:
        return set()


@dataclass
class Leftovers:
    """What must go when the tree is gone. Only what was seen to be the tree's own: names in /dev/shm tell no owner.

    `file` keeps the notes on disk, so that they outlive a guard that was killed. `sockets` and `scratch` are paths that
    belong to this engine alone.
    """

    file: str
    sockets: list[str] = field(default_factory=list)
    scratch: list[str] = field(default_factory=list)
    shm: dict[str, tuple[int, int]] = field(default_factory=dict)
    _seen: set[tuple[str, int]] = field(default_factory=set)
    _pending: dict[tuple[str, int], int] = field(default_factory=dict)

    def begin(self) -> None:
        """Before the tree starts: what lies in /dev/shm now is not its own, even if it maps it."""
        self._seen = _listing()
        self.save()

    def look(self, root: int) -> None:
        """Notes new files of /dev/shm that the tree below `root` maps. Cheap while nothing new appears there."""
        listing = _listing()
        for key in listing - self._seen:
            self._pending[key] = LOOKS_AT_NEW_FILE
        self._seen = listing
        self._pending = {k: n - 1 for k, n in self._pending.items() if n and k in listing}
        if not self._pending:
            return
        noted = {name: identity for name, identity in self.shm.items() if (name, identity[1]) in listing}
        for p in descendants(root):
            mapped = mapped_shm(p.pid)
            noted |= {name: (mapped[inode], inode) for name, inode in self._pending if inode in mapped}
        self._pending = {key: n for key, n in self._pending.items() if key[0] not in noted}
        if noted != self.shm:
            self.shm = noted
            self.save()

    def save(self) -> None:
        notes = {"shm": self.shm, "sockets": self.sockets, "scratch": self.scratch}
        with suppress(OSError):
            temporary = Path(f"{self.file}.{os.getpid()}")
            temporary.write_text(json.dumps(notes))
            temporary.replace(self.file)

    @classmethod
    def load(cls, file: str) -> "Leftovers":
        """Notes of an earlier engine; empty when there are none or they cannot be read."""
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError), open(file) as opened:
            notes: dict[str, Any] = json.load(opened)
            shm = {name: (int(v[0]), int(v[1])) for name, v in notes.get("shm", {}).items()}
            return cls(file, list(notes.get("sockets", [])), list(notes.get("scratch", [])), shm)
        return cls(file)

    def sweep(self) -> list[str]:
        """Removes all of it; call when no process of the tree is left. Returns what was removed."""
        gone = []
        for name, identity in self.shm.items():
            path = Path(SHM, name)
            with suppress(OSError):
                now = path.lstat()
                if (now.st_dev, now.st_ino) == identity:  # else a neighbour has the name by now
                    path.unlink()
                    gone.append(str(path))
        for path in map(Path, self.sockets):
            with suppress(OSError):
                if stat.S_ISSOCK(path.lstat().st_mode):
                    path.unlink()
                    gone.append(str(path))
        for directory in map(Path, self.scratch):
            with suppress(OSError):
                for path in directory.iterdir():
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink()
        with suppress(OSError):
            Path(self.file).unlink()
        self.shm = {}
        return gone
