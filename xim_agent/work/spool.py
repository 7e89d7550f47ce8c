"""Endings that the router has not acknowledged when the agent stops, kept on disk for the next start."""

import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Raw

log = logging.getLogger("xim_agent.work")


class Entry(msgspec.Struct, frozen=True):
    """`frames`: as they were cut, under the boot that held their leases."""

    boot: str
    frames: list[Raw]


class Spool:
    """One small file, replaced atomically, mode 0600. Blocks for as long as a small write does."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def save(self, boot: str, frames: Sequence[Raw]) -> None:
        """Adds to what an earlier boot could not deliver; with no frames nothing is written. Raises OSError."""
        if not frames:
            return
        entries = [*self.load(), Entry(boot, list(frames))]
        fresh = self._path.with_suffix(".tmp")
        fresh.touch(mode=0o600)
        fresh.write_bytes(msgspec.msgpack.encode(entries))
        fresh.replace(self._path)

    def load(self) -> list[Entry]:
        """Oldest first. What cannot be read is worth a warning only: the router ends those leases by itself."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            log.warning("spool cannot be read", extra={"path": str(self._path), "reason": str(error)})
            return []
        try:
            return msgspec.msgpack.decode(data, type=list[Entry])
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            log.warning("spool cannot be read", extra={"path": str(self._path), "reason": str(error)})
            return []

    def clear(self) -> None:
        self._path.unlink(missing_ok=True)
