"""Wall time (tokens, leases on disk). Relative waits use trio's clock, which tests replace."""

import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Unix seconds."""
        ...


class SystemClock:
    def now(self) -> float:
        return time.time()
