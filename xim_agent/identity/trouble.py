"""Attempts that failed and will be repeated: counted, logged, shown as a health condition, and how long to wait."""

import logging
from collections import Counter

import trio

from xim_agent.backoff import Backoff
from xim_agent.errors import AgentError
from xim_agent.health import Health
from xim_agent.identity import refusals
from xim_agent.identity.claims import TokenRefused
from xim_agent.outcome import RouterError

log = logging.getLogger("xim_agent.identity")

CLOCK, OTHER = "clock_off", "identity_failing"


class Trouble:
    """`not_before`: trio time until which a router asked not to be called; `failures` by code."""

    def __init__(self, health: Health) -> None:
        self.failures: Counter[str] = Counter()
        self.not_before = float("-inf")
        self._health = health
        self._backoff = Backoff()

    def note(self, error: AgentError, what: str, skew: float | None, rand: float) -> float:
        """Seconds until the next attempt. `skew`: of the last reply; `rand`: 0 to 1."""
        shown, retry_after, clock = error, None, False
        if isinstance(error, RouterError):
            shown, retry_after = refusals.explain(error), error.retry_after
            clock = error.code == "dpop_invalid" and refusals.clock_is_off(skew)
        elif isinstance(error, TokenRefused):
            clock = error.clock
        self.failures[shown.code] += 1
        delay = self._backoff.next(rand, retry_after)
        self.not_before = trio.current_time() + (delay if retry_after is not None else 0.0)
        self._health.set(CLOCK if clock else OTHER, shown.message, shown.hint)
        self._health.clear(OTHER if clock else CLOCK)
        log.warning(f"{what} failed: {shown.message}", extra={"code": shown.code, "retry_seconds": round(delay, 1)})
        return delay

    def over(self) -> None:
        """An attempt succeeded."""
        self._backoff.reset()
        self._health.clear(CLOCK)
        self._health.clear(OTHER)
