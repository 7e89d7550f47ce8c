"""Lets several tasks wait for "something changed" without losing a change between two looks."""

from collections.abc import Callable

import trio


class Watch:
    """A version number that only grows. `bump` is synchronous; waiters compare with the version they saw last."""

    def __init__(self) -> None:
        self.version = 0
        self._event = trio.Event()

    def bump(self) -> None:
        self.version += 1
        self._event.set()
        self._event = trio.Event()

    async def wait_beyond(self, seen: int) -> int:
        """Returns the version as soon as it is greater than `seen`. Cancellation leaves nothing behind."""
        while self.version <= seen:
            await self._event.wait()
        return self.version


class Changed:
    """Told by parts that exist before the poller, who listens, does."""

    def __init__(self) -> None:
        self.listener: Callable[[], None] = lambda: None

    def __call__(self) -> None:
        self.listener()
