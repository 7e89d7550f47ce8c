"""Which process speaks for an agent: restarts, and clones (wire-protocol §5.1)."""

from collections import OrderedDict
from dataclasses import dataclass, field

KEEP = 64  # starts in 75 s of the fastest supervisor
SILENT = 75.0  # seconds after which a process counts as gone; the ttl of its leases


@dataclass(eq=False)
class Boot:
    """One process of an agent. `start`: Unix seconds of its first poll; `heard`: monotonic seconds of its last."""

    id: str
    address: str
    start: float
    heard: float


@dataclass
class Boots:
    """The processes that have polled with one identity; `current` is the one that gets leases.

    A process never seen is a restart and takes over. One that comes back after another has polled shows that both run:
    the earlier one gets the identity and is told once in 75 s, the later one is refused while the earlier one is heard.
    """

    current: Boot | None = None
    known: OrderedDict[str, Boot] = field(default_factory=OrderedDict)
    warn: Boot | None = None
    warned: float = float("-inf")

    def enter(self, boot: str, address: str, now: float, wall: float) -> tuple[bool, Boot | None]:
        """Notes a poll: whether `current` is another one now, and the clone that the caller must be told of."""
        caller = self.known.get(boot)
        if caller is None:
            caller = self.known[boot] = Boot(boot, address, wall, now)
            self._forget()
            return self._switch(caller), None
        self.known.move_to_end(boot)
        caller.address, caller.heard = address, now
        other = self.current
        if other is None or other is caller:
            clone, self.warn = self.warn, None
            return False, clone
        if now - other.heard >= SILENT:
            return self._switch(caller), None
        if caller.start <= other.start:
            self.warned = now
            return self._switch(caller), other
        if now - self.warned >= SILENT:
            self.warned, self.warn = now, caller
        return False, other

    def _forget(self) -> None:
        """All but the KEEP lately heard: a copy that starts again and again must not make the original one unknown."""
        for old in list(self.known.values())[:-KEEP]:
            if old is not self.current:
                del self.known[old.id]

    def _switch(self, to: Boot) -> bool:
        self.current, self.warn = to, None
        return True
