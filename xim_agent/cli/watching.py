"""`--watch`: the same look once a second, redrawn on a terminal, else said when it says something new."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import click

from xim_agent.errors import AgentError

EVERY_SECONDS = 1.0
# Of an agent that ends, hangs, or is started again: another look may find one.
PASSING = frozenset({"agent_absent", "agent_gone", "agent_silent", "agent_unreachable"})


def watch(
    flags: Mapping[str, Any],
    name: str,
    draw: Callable[[Any], str],
    key: Callable[[Any], object] | None,
    *,
    absent: Callable[[], Any] = lambda: None,
) -> None:
    """Until Ctrl-C, which is the way to end it (exit code 0). `draw`: what is shown of an answer; `key`: what of it is
    news where nothing can be redrawn; None: each answer is. `absent`: the answer of what runs where no agent does.

    An agent that goes away is said, and waited for. Raises AgentError as the first look does.
    """
    import trio

    from xim_agent import log
    from xim_agent.cli.agent_reach import reach
    from xim_agent.cli.common import configured, ignore

    config = configured(flags)
    if config.log_level in ("info", "warning"):
        log.set_level("error")

    async def loop(show: Callable[[str, object], None]) -> None:
        met = False
        while True:
            gone: AgentError | None = None
            try:
                found = await reach(config, name, {}, ignore)
            except AgentError as error:
                gone = error
            if gone is not None:
                found = await trio.to_thread.run_sync(absent) if gone.code == "agent_absent" else None
            if found is not None:
                show(draw(found), key and key(found))
            elif gone is not None and (not met or gone.code not in PASSING):
                raise gone
            elif gone is not None:
                show(f"{log.redact(gone.message)}; waiting for an agent", gone.code)
            met = True
            await trio.sleep(EVERY_SECONDS)

    try:
        if key is None:
            trio.run(loop, lambda text, _: click.echo(text))
        elif sys.stdout.isatty():
            from rich.live import Live
            from rich.text import Text

            with Live(auto_refresh=False, vertical_overflow="crop") as live:
                trio.run(loop, lambda text, _: live.update(Text(text), refresh=True))
        else:
            trio.run(loop, News())
    except KeyboardInterrupt:
        return
    except BaseExceptionGroup as group:
        if group.split(KeyboardInterrupt)[1] is not None:
            raise


class News:
    """Prints what is new, with the time it was seen."""

    def __init__(self) -> None:
        self._last: object = self

    def __call__(self, text: str, key: object) -> None:
        if key != self._last:
            self._last = key
            click.echo(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}\n{text}")
            sys.stdout.flush()
