"""Whether the router answers, and who may try next: one backoff for polls and events together."""

import logging
import random
from collections.abc import Awaitable, Callable, Iterator
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
# The one call that may be made while the router is away may hang for 10 s: what it sent is lost, or nobody answers its
# connection. Meanwhile others ask beside it, so that in every such span the router can show that it is back.
KNOCK_SECONDS = 1.5
# What a proxy in front of a router says while that restarts.
AWAY = frozenset({None, 502, 503, 504})
# So many calls in a row without a reply, and the next router is tried.
UNANSWERED = 3


class Link:
    """Use: `await turn()`, then at once `with call(kind): await ...`.

    While the link is up every call may go. After a failure nobody goes before the backoff has passed, and then one call
    alone, until one of those has succeeded. `unreachable` is called after every third call in a row without a reply.

    When the router is back, calls that hang since before then are cut: whatever they wait for has been lost.
    """

    def __init__(
        self,
        *,
        health: Health,
        unreachable: Callable[[], None] = lambda: None,
        rand: Callable[[], float] = random.random,
    ) -> None:
        self.up = False
        self._health = health
        self._unreachable = unreachable
        self._unanswered = 0
        self._rand = rand
        self._backoff = Backoff()
        self._changed = Watch()
        self._until = float("-inf")
        self._probing = False
        self._began: dict[trio.CancelScope, float] = {}  # of every call under way
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
        """Notes how the call inside ends; a RouterError passes on. One that is cut raises RouterError `silence`."""
        failures, began = self._failures, trio.current_time()
        probe = not self.up
        self._probing = self._probing or probe
        scope = trio.CancelScope()
        self._began[scope] = began
        try:
            with scope:
                yield
        except RouterError as error:
            # A call that began before another one failed tells nothing new.
            if failures == self._failures:
                self._failed(kind, error, began if probe else trio.current_time())
            raise
        else:
            if scope.cancelled_caught:
                raise RouterError("silence", "given up: the router, back again, answers later calls")
            if failures == self._failures:
                self._answered(kind, began)
        finally:
            del self._began[scope]
            if probe:
                self._probing = False
            self._changed.bump()

    async def knock(self, ask: Callable[[], Awaitable[object]]) -> None:
        """Until cancelled: asks beside a call that hangs. `ask` is a call that changes nothing and is answered at once.

        Counts as a call that is answered, or not at all. Cancelling leaves nothing behind.
        """
        last = float("-inf")
        while True:
            if not self._knocks():
                await self._changed.wait_beyond(self._changed.version)
                continue
            due = max(last, max(self._began.values(), default=trio.current_time())) + KNOCK_SECONDS
            if trio.current_time() < due:
                await trio.sleep_until(due)
                continue
            last = trio.current_time()
            if self._probing and await self._hears(ask):
                self._answered("events", last)
                self._changed.bump()

    def _knocks(self) -> bool:
        return not self.up and self._last is not None and self._last[1].status is None and self._quick()

    def _quick(self) -> bool:
        return self._down_since is not None and trio.current_time() - self._down_since < QUICK_FOR

    async def _hears(self, ask: Callable[[], Awaitable[object]]) -> bool:
        with trio.move_on_after(KNOCK_SECONDS):
            try:
                await ask()
            except RouterError as error:
                return error.status not in AWAY
            return True
        return False

    def _answered(self, kind: Kind, began: float) -> None:
        if self._down_since is not None:
            log.info("router answers again", extra={"seconds": round(trio.current_time() - self._down_since, 1)})
            for scope, since in self._began.items():
                if since < min(began, trio.current_time() - KNOCK_SECONDS):
                    scope.cancel()
        self.up = True
        self._unanswered = 0
        self._down_since = None
        # Calls that are refused one way and succeed the other way must not become a hot loop.
        if self._last is None or self._last[1].status is None or self._last[0] == kind:
            self._backoff.reset()
            self._last = None
        self._health.clear("router_unreachable")

    def _failed(self, kind: Kind, error: RouterError, since: float) -> None:
        if error.action is Action.WAIT or (error.action is Action.FINAL and kind == "events"):
            self._answered(kind, since)  # the router is there; what it refuses is the caller's business
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
        if error.status in AWAY and self._quick():
            delay = min(delay, QUICK_CAP)
        # While it is away: from the begin of the call, so that one that has hung for long is followed at once.
        self._until = max(since + delay, now + min(error.retry_after or 0.0, 300.0))
        self._health.set("router_unreachable", error.message, error.hint)
