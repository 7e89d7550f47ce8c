"""SIGTERM and SIGINT: the first asks for a stop with drain, a second abandons. SIGHUP: settings, or the terminal."""

import logging
import os
import signal
from collections.abc import Callable

import trio

log = logging.getLogger("xim_agent.signals")

# A one-file bootloader forwards the terminal's Ctrl-C that its child has already got.
SAME_SIGNAL_SECONDS = 1.0


async def watch(
    stop: trio.Event,
    root: trio.CancelScope,
    on_hangup: Callable[[], None] = lambda: None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Sets `stop` at the first signal and cancels `root` at the second. Never returns unless cancelled.

    SIGHUP calls `on_hangup`, as services are reloaded by it; of a process on a terminal it means that the terminal is
    gone, and asks for a stop.
    """
    on_terminal = any(map(os.isatty, (0, 1, 2)))  # it cannot be asked any more when it is gone
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as received:
        task_status.started()
        first: float | None = None
        async for number in received:
            name = signal.Signals(number).name
            if number == signal.SIGHUP and not on_terminal:
                on_hangup()
            elif first is None:
                first = trio.current_time()
                log.info(f"{name}: draining; a second signal abandons running requests")
                stop.set()
            elif trio.current_time() - first >= SAME_SIGNAL_SECONDS:
                log.warning(f"second {name}: abandoning running requests")
                root.cancel()
