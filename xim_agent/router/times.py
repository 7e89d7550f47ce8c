"""How requests of clients fare, for the router's metrics. Pure."""

from collections import Counter
from dataclasses import dataclass, field

from xim_agent.metrics.histogram import Histogram
from xim_agent.metrics.names import DISPATCH_SECONDS, DURATION_SECONDS, FIRST_TOKEN_SECONDS


@dataclass
class Times:
    """Since the start of the process; what is counted: `metrics.names`. `ended` by ending."""

    ended: Counter[str] = field(default_factory=Counter)
    answered_bytes: int = 0
    dispatch: Histogram = field(default_factory=lambda: Histogram(DISPATCH_SECONDS))
    first: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_SECONDS))
    duration: Histogram = field(default_factory=lambda: Histogram(DURATION_SECONDS))

    def over(self, ending: str, size: int, *, first: float | None, seconds: float, trace: str) -> None:
        """A request that has ended. `first`: seconds to the first data of a stream, `seconds` to the end."""
        self.ended[ending] += 1
        self.answered_bytes += size
        self.duration.observe(seconds, trace)
        if first is not None:
            self.first.observe(first, trace)
