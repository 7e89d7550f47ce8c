"""Whether the router answers, and who may try next: one backoff for polls and events together."""

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import trio

from xim_agent.backoff import Backoff
from xim_agent.health import Health
from xim_agent.outcome import Action, RouterError
from xim_agent.watch import Watch

log = logging.getLogger("xim_agent.work")

Kind = Literal["poll", "events"]
# A router that comes back must find its agents within 2 s, after up to ten minutes, so an outage is tried more often
# than the backoff would; that is still below one attempt per second on average.
QUICK_FOR = 660.0
QUICK_CAP = 1.5
# What a proxy in front of a router says while that restarts.
AWAY = frozenset({None, 502, 503, 504})
# So many calls in a row without a reply, and the next router is tried.
UNANSWERED = 3


class Link:
    """Use: `await turn()`, then at once `with call(kind): await ...`.

    While the link is up every call may go. After a failure nobody goes before the backoff has passed, and then one call
    alone, until one of those has succeeded. `unreachable` is called after every third call in a row without a reply.
    """

    def __init__(
        self,
        *,
        health: Health,
        unreachable: Callable[[], None] = lambda: None,
        rand: Callable[[], float] = random.random,
    ) -> None:
        self.up = False
        # Called when events got through again: a poll sent before the outage may hang on a dead connection.
        self.on_back: Callable[[], None] = lambda: None
        self._health = health
        self._unreachable = unreachable
        self._unanswered = 0
        self._rand = rand
        self._backoff = Backoff()
        self._changed = Watch()
        self._until = float("-inf")
        self._probing = False
        self._failures = 0
        self._down_since: float | None = None
        self._last: tuple[Kind, RouterError] | None = None

    @property
    def closed(self) -> bool:
        """Nobody may call now: the backoff is not over, or one call tries alone."""
        return not self.up and (self._probing or trio.current_time() < self._until)

    async def turn(self) -> None:
        """Returns when a call may be made now. A caller that does not make it holds nobody up."""
        while self.closed:
            seen = self._changed.version
            with trio.move_on_at(float("inf") if self._probing else self._until):
                await self._changed.wait_beyond(seen)

    async def next_call(self) -> None:
        """Until a call has ended, well or not."""
        await self._changed.wait_beyond(self._changed.version)

    @contextmanager
    def call(self, kind: Kind) -> Iterator[None]:
        """Notes how the call inside ends; a RouterError passes on."""
        failures = self._failures
        probe = not self.up
        self._probing = self._probing or probe
        try:
            yield
        except RouterError as error:
            # A call that began before another one failed tells nothing new.
            if failures == self._failures:
                self._failed(kind, error)
            raise
        else:
            if failures == self._failures:
                self._answered(kind)
        finally:
            if probe:
                self._probing = False
            self._changed.bump()

    def _answered(self, kind: Kind) -> None:
        back = self._down_since is not None
        if self._down_since is not None:
            log.info("router answers again", extra={"seconds": round(trio.current_time() - self._down_since, 1)})
        self.up = True
        self._unanswered = 0
        self._down_since = None
        # Calls that are refused one way and succeed the other way must not become a hot loop.
        if self._last is None or self._last[1].status is None or self._last[0] == kind:
            self._backoff.reset()
            self._last = None
        self._health.clear("router_unreachable")
        if back and kind == "events":
            self.on_back()

    def _failed(self, kind: Kind, error: RouterError) -> None:
        if error.action is Action.WAIT or (error.action is Action.FINAL and kind == "events"):
            self._answered(kind)  # the router is there; what it refuses is the caller's business
            return
        now = trio.current_time()
        self._failures += 1
        if self._down_since is None:
            self._down_since = now
            log.warning("router does not answer", extra={"code": error.code, "reason": error.message})
        self.up = False
        self._last = (kind, error)
        self._unanswered = self._unanswered + 1 if error.status is None else 0
        if self._unanswered == UNANSWERED:
            self._unanswered = 0
            self._unreachable()
        delay = self._backoff.next(self._rand())
        if error.status in AWAY and now - self._down_since < QUICK_FOR:
            delay = min(delay, QUICK_CAP)
        self._until = now + max(delay, min(error.retry_after or 0.0, 300.0))
        self._health.set("router_unreachable", error.message, error.hint)
