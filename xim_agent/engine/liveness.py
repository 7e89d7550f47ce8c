"""Is a serving engine alive? /health alone proves nothing: it answers 200 through hangs. So: does its work move?"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sign:
    """One look. `now` in seconds of a monotonic clock; `steps` the engine's own step counter, None when the metrics did
    not come in time; `busy` requests that should make it move: its own count, those of ours that wait for it, a canary.
    """

    now: float
    steps: float | None
    busy: int


class Liveness:
    """A hang is `limit` seconds in which requests ran and the step counter stood still.

    The counter is vLLM's iteration count: it moves for a saturated engine and for every chunk of a long prefill, and
    not for a deadlock. A look without metrics proves nothing by itself (load), but does not move the counter either.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._steps: float | None = None
        self._since: float | None = None  # busy without movement since

    def hung(self, sign: Sign) -> bool:
        moved = sign.steps is not None and sign.steps != self._steps
        if sign.steps is not None:
            self._steps = sign.steps
        if moved or not sign.busy:
            self._since = None
        elif self._since is None:
            self._since = sign.now
        return self._since is not None and sign.now - self._since >= self.limit

    def still_for(self, now: float) -> float:
        """Seconds that busy engine has not moved for, 0 when it has."""
        return 0.0 if self._since is None else now - self._since
