"""Is a serving engine alive? /health proves nothing: it answers 200 through hangs. So: does its work move? Pure."""

from dataclasses import dataclass

# Two looks lie 6 s apart at most: 1 s, and 5 s for an answer that does not come. Much more means that this machine, or
# we alone, stood still (suspended, frozen, starved), and says nothing about the engine.
LONGEST_GAP = 8.0
# One step over a long prompt may take minutes on a slow CPU, where nothing moves meanwhile but its CPU time.
COMPUTING_COUNTS = 0.2


@dataclass(frozen=True)
class Sign:
    """One look. `now` in seconds of a monotonic clock; `proof` is compared with that of the look before: it holds what
    only a working engine core changes; `busy` requests that should make it move: its own count, those of ours that
    wait for it, a canary; `computing`: its processes use the CPU, and that is where it computes.
    """

    now: float
    proof: object
    busy: int
    computing: bool = False


class Liveness:
    """A hang: no proof for `limit` seconds, with requests for the last half of them at least.

    An idle engine that hangs is so found as soon as a busy one, when a canary asks it after half the limit. Looks a
    second apart find a hang within the limit; later answers (load) up to one look after it.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.still = 0.0  # seconds without a proof, as far as they count
        self._busy_for = 0.0
        self._was_busy = False
        self._proof: object = None
        self._at: float | None = None

    def asked(self) -> None:
        """A canary is on its way since the last look."""
        self._was_busy = True

    def hung(self, sign: Sign) -> bool:
        gap = 0.0 if self._at is None else min(sign.now - self._at, LONGEST_GAP)
        self._at = sign.now
        counts = gap * (COMPUTING_COUNTS if sign.computing else 1.0)
        self._busy_for = self._busy_for + counts if sign.busy and self._was_busy else 0.0
        self._was_busy = sign.busy > 0
        self.still += counts
        if sign.proof != self._proof:
            self._proof, self.still, self._busy_for = sign.proof, 0.0, 0.0
        # It may have hung since just after the look before the last proof, and the next look would be too late.
        margin = min(2 * gap, self.limit / 6)
        return self.still + margin >= self.limit and self._busy_for + margin >= self.limit / 2
