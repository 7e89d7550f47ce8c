"""The bar of `run` on a terminal, and what is logged while it shows."""

import io
import logging
import re
import sys

import pytest
import trio
import trio.testing

from xim_agent import log
from xim_agent.cli.bar import show_transfers
from xim_agent.mesh.messages import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


async def test_lines_stay_whole_above_the_bar_and_the_log_gets_its_stream_back(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    root = logging.getLogger()
    handlers, level = root.handlers[:], logging.getLogger("xim_agent").level
    try:
        log.setup("info", "console", terminal)
        now: list[Progress | None] = [Progress("fetch", 50, 200, 10.0, "")]
        line = "word " * 60 + "end"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(show_transfers, lambda: now[0])
            await trio.sleep(1)
            logging.getLogger("xim_agent.test").info(line)
            now[0] = Progress("engine", 1, 0, 0.0, "")
            await trio.sleep(1)
            at = terminal.tell()
            await trio.sleep(60)
            assert terminal.tell() == at, "nothing is drawn between transfers"
            logging.getLogger("xim_agent.test").info("after")
            nursery.cancel_scope.cancel()
        shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
        assert f"test: {line}\n" in shown, "one line, not broken by the bar or at its width"
        assert "fetching the model" in shown
        assert "50 B of 200 B, 10 B/s, 15 s left" in shown
        assert "fetching the model: done" in shown
        assert shown.endswith("test: after\n")
        assert root.handlers[0].stream is terminal  # type: ignore[attr-defined]
    finally:
        root.handlers[:] = handlers
        logging.getLogger("xim_agent").setLevel(level)
