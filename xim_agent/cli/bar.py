"""A bar on the terminal of `run` while a model is fetched, and log lines above it."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from xim_agent.cli.progress import Display
from xim_agent.mesh.messages import Progress

_LOOK = 0.2


async def show_transfers(progress: Callable[[], Progress | None]) -> None:
    """Never returns. Between transfers nothing is drawn. Cancelled, it leaves the terminal and the log as they were."""
    while True:
        if _transfer(progress()) is not None:
            with Display() as display, _above(display):
                while (now := _transfer(progress())) is not None:
                    display.transfer(now)
                    await trio.sleep(_LOOK)
        await trio.sleep(_LOOK)


def _transfer(progress: Progress | None) -> Progress | None:
    return progress if progress is not None and progress.stage in ("fetch", "verify") else None


@contextmanager
def _above(display: Display) -> Iterator[None]:
    """Log lines do not run into the bar."""
    handlers = [h for h in logging.getLogger().handlers if type(h) is logging.StreamHandler]
    before = [h.setStream(display) for h in handlers]
    try:
        yield
    finally:
        for handler, stream in zip(handlers, before, strict=True):
            if stream is not None:
                handler.setStream(stream)
