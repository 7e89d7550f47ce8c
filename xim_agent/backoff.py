"""When to try again. No sleeping and no randomness here: the caller passes a number in [0, 1) and waits itself."""


class Backoff:
    """Full jitter: the n-th delay is uniform in (0, min(cap, base * 2^n)]; `reset` after a success.

    The lower end is a tenth of the window, so that a burst of lucky draws is no hot loop.
    Source: AWS Architecture Blog, "Exponential Backoff And Jitter" (full jitter).
    """

    def __init__(self, base: float = 1.0, cap: float = 30.0) -> None:
        self.base = base
        self.cap = cap
        self.failures = 0

    def next(self, rand: float, retry_after: float | None = None) -> float:
        """Seconds to wait; `retry_after` (seconds, the router's wish, obeyed up to 300) is a lower bound."""
        window = min(self.cap, self.base * 2.0 ** min(self.failures, 32))
        self.failures += 1
        delay = window * (0.1 + 0.9 * rand)
        return max(delay, min(retry_after, 300.0)) if retry_after is not None else delay

    def reset(self) -> None:
        self.failures = 0
