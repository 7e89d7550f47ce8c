"""What systemd is told (sd_notify(3)): ready, reloading, stopping, alive, and a line of status. Nothing elsewhere.

Whoever has something to say does not wait for systemd: `deliver` sends, in the order in which it was said.
"""

import logging
import math
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass

import trio

from xim_agent.text import printable

log = logging.getLogger("xim_agent.notify")

# Polls that end, well or not, are how an agent is seen to be alive. One is held for 25 s at most.
POLL_SECONDS = 60.0
STATUS_SECONDS = 5.0
STATUS_LENGTH = 500


@dataclass
class Life:
    """Whether the poll loop turns. Counts what passes from look to look, not what a clock says: a machine that was
    suspended is not one that hangs.
    """

    beats: int = -1
    silent: float = 0.0

    def alive(self, beats: int, excused: bool, seconds: float) -> bool:
        """`beats` grows when the loop turns; `excused`: it has a reason not to; `seconds` since the last look."""
        self.silent = 0.0 if excused or beats != self.beats else self.silent + seconds
        self.beats = beats
        return self.silent < POLL_SECONDS


class Notifier:
    """`address`: of a datagram socket; `watchdog`: seconds after which systemd kills a silent process, or None."""

    def __init__(self, address: str, watchdog: float | None) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._watchdog = watchdog
        self._said, self._unsent = trio.open_memory_channel[str](math.inf)
        self._ready = self._stopping = False
        self._news = trio.Event()

    def say(self, *assignments: str) -> None:
        self._said.send_nowait("\n".join(assignments))

    async def deliver(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Sends until cancelled, which drops the rest. What systemd does not take is lost, with a warning."""
        with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_DGRAM) as out:
            task_status.started()
            lost = False
            async for message in self._unsent:
                try:
                    await out.sendto(message.encode(), self._address)
                except OSError as error:
                    if not lost:
                        log.warning("systemd does not take what it is told", extra={"reason": str(error)})
                    lost = True
                else:
                    lost = False

    async def ready(
        self,
        enrolled: Callable[[], Awaitable[object]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Says READY, and how the agent is then, when `enrolled` returns. Raises what it raises."""
        task_status.started()
        await enrolled()
        self._ready = True
        self.say("READY=1")
        self._news.set()

    def reload(self, reread: Callable[[], None]) -> None:
        """Calls `reread`, and tells of it; before READY and after STOPPING a reload is nothing to systemd."""
        told = self._ready and not self._stopping
        if told:
            self.say("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        reread()
        if told:
            self.say("READY=1")

    async def stopping(
        self, stop: trio.Event, seconds: float, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Says STOPPING when `stop` is set, and that it may take `seconds`, should the unit give less."""
        task_status.started()
        await stop.wait()
        self._stopping = True
        self.say("STOPPING=1", f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    async def watch(
        self,
        beats: Callable[[], int],
        excused: Callable[[], bool],
        status: Callable[[], str],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Until cancelled: feeds the watchdog while the poll loop turns, and tells a status that has changed."""
        task_status.started()
        every = min(STATUS_SECONDS, (self._watchdog or math.inf) / 3)
        life, told, passed = Life(), "", every
        while True:
            alive = life.alive(beats(), excused(), passed)
            text = printable(status())[:STATUS_LENGTH]
            if not alive:
                text = f"no poll has ended for {POLL_SECONDS:.0f} s: the watchdog is not fed"
            elif self._watchdog is not None:
                self.say("WATCHDOG=1")
            if text != told:
                if not alive:
                    log.error(text)
                told = text
                self.say(f"STATUS={text}")
            passed = every
            with trio.move_on_after(every):
                await self._news.wait()
                self._news, passed = trio.Event(), 0.0


def take(environ: MutableMapping[str, str]) -> Notifier | None:
    """None where nobody listens. Removes the variables, so that no child speaks to systemd."""
    address, microseconds, pid = (environ.pop(name, "") for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"))
    if not address:
        return None
    if address[0] not in "/@":
        log.warning("systemd is told nothing: its socket is of another kind", extra={"address": address})
        return None
    ours = microseconds.isdecimal() and int(microseconds) > 0 and pid in ("", str(os.getpid()))
    return Notifier(address, int(microseconds) / 1e6 if ours else None)
