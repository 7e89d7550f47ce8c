"""How long requests and calls take, for the metrics. Pure."""

from dataclasses import dataclass, field

from xim_agent.metrics.histogram import Histogram
from xim_agent.metrics.names import CALL_SECONDS, DURATION_SECONDS, FIRST_TOKEN_SECONDS, QUEUE_SECONDS


@dataclass(frozen=True)
class Times:
    """Since the start of the process; what is counted: `metrics.names`."""

    queue: Histogram = field(default_factory=lambda: Histogram(QUEUE_SECONDS))
    first: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_SECONDS))
    duration: Histogram = field(default_factory=lambda: Histogram(DURATION_SECONDS))
    call: Histogram = field(default_factory=lambda: Histogram(CALL_SECONDS))
