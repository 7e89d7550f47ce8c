"""`status --watch` where it is redrawn: on a terminal; and beside an agent that stays after a final error."""

import json
import logging
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import trio

from xim_agent.cache import claim
from xim_agent.cli import park
from xim_agent.control.server import ControlServer

IDLE = ["router: no request waits for toy"]
STATUS: dict[str, Any] = {
    "agent": {"version": "1.2", "protocol": 1, "pid": 4711, "started": 0},
    "work": {"phase": "ready", "drained_by": [], "link_up": True, "last_poll": 0, "suspended": False, "sender": {
        "running": 0, "accepted": 7, "refused": 1, "ended": {}, "longest": None}},
    "identity": {"router": "https://r:8443", "enrolled": True, "agent_id": "a-1", "project": "p", "token_expires": 0},
    "assignment": {"model": None, "generation": 0, "wanted": 0, "progress": None},
    "engine": {"state": "ready", "active": 0, "ceiling": 64, "starts": 1, "failures": 0, "failure": None},
    "cache": {"bytes_used": 1, "bound": 2}, "idle": IDLE, "history": [], "health": [],
}  # fmt: skip


class Terminal:
    """A process whose output is a terminal, and what it has drawn there."""

    def __init__(self, *words: str, **env: str) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("XEROTIER_")}
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "xim_agent", *words]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env={**kept, "TERM": "xterm", **env}
        )
        os.close(theirs)
        os.set_blocking(ours, False)
        self._ours = ours

    async def shows(self, words: str) -> str:
        """What it has drawn since the last time, once that holds them."""
        drawn = ""
        with trio.fail_after(30):
            while words not in drawn:
                await trio.lowlevel.wait_readable(self._ours)
                drawn += os.read(self._ours, 65536).decode()
        return drawn

    def close(self) -> int:
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(30)
        finally:
            os.close(self._ours)


async def test_on_a_terminal_it_is_redrawn_in_place(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    said = {"text": "first"}

    async def status(arguments: Any, report: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return STATUS | {"idle": [f"router: {said['text']}"]}

    async with trio.open_nursery() as nursery:
        await nursery.start(ControlServer(tmp_path / "s", {"status": status}, lambda says: _behind(cache, says)).run)
        terminal = Terminal("status", "--watch", XEROTIER_AGENT_MODEL_CACHE_PATH=str(cache))
        try:
            await terminal.shows("router: first")
            said["text"] = "second"
            await terminal.shows("\x1b[1A")  # up again, over the one before
            said["text"] = "\x1b]0;owned\x07third"
            assert "\x1b]0;" not in await terminal.shows("third"), (
                "what an answer holds must not reach the terminal as a command"
            )
        finally:
            code = terminal.close()
        nursery.cancel_scope.cancel()
    assert code == 0


def _behind(cache: Path, says: str) -> None:
    (cache / claim.LOCK).write_text(f"{os.getpid()}\n{says}\n")


async def test_a_parked_agent_is_watched_too(
    tmp_path: Path, free_port: int, error_logs: list[logging.LogRecord]
) -> None:
    port = str(free_port)
    causes = [("join_key_expired", "the join key expired", "create a new one")]
    env = {"XEROTIER_AGENT_MODEL_CACHE_PATH": str(tmp_path / "cache"), "XEROTIER_AGENT_METRICS_PORT": port}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(park.parked, causes, {"metrics_port": port})
        with trio.fail_after(10):
            while True:
                try:
                    await (await trio.open_tcp_stream("127.0.0.1", int(port))).aclose()
                    break
                except OSError:
                    await trio.sleep(0.02)
        terminal = Terminal("status", "--watch", **env)
        lines = Terminal("status", "--watch", "--json", **env)
        try:
            await terminal.shows("the join key expired")
            first, _, _ = (await lines.shows("}\r\n")).partition("\r\n")
            assert json.loads(first)["parked"] is True
        finally:
            codes = terminal.close(), lines.close()
        nursery.cancel_scope.cancel()
    assert codes == (0, 0)
    assert "parked" in error_logs[0].getMessage()
