"""Slow steps on stderr: a live bar on a terminal, a line per phase and every 10 s elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any, Self

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

_EVERY_SECONDS = 10.0


def size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit in ("B", "kB") else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def bytes_text(done: float, total: float, rate: float) -> str:
    eta = f", {(total - done) / rate:.0f} s left" if rate > 0 and done < total else ""
    return f"{size(done)} of {size(total)}" + (f", {size(rate)}/s{eta}" if rate > 0 else "")


class Display:
    """One step at a time. `show` may be called often; a new title ends the step before with its seconds."""

    def __init__(self) -> None:
        self._title = ""
        self._began = 0.0
        self._last = ("", 0.0)
        self._live: Progress | None = None
        self._task: TaskID | None = None
        if sys.stderr.isatty():
            console = Console(stderr=True)
            self._live = Progress(
                TextColumn("{task.description:<22}"),
                BarColumn(bar_width=30 if console.width >= 100 else 8),  # in 80 columns the figures fit, too
                TextColumn("{task.fields[detail]}"),
                console=console,
                transient=True,
            )

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.finish(failed=error is not None)

    def show(self, title: str, *, done: float = 0, total: float = 0, detail: str = "") -> None:
        """`done` of `total` in any unit (total 0: no bar yet); `detail` is what stands behind the bar."""
        new = title != self._title
        if new:
            self._end()
            self._title, self._began = title, time.monotonic()
            if self._live:
                self._task = self._live.add_task(title, total=None, detail="")
        seconds = time.monotonic() - self._began
        if self._live and self._task is not None:
            text = detail or f"{seconds:.0f} s"
            self._live.update(self._task, completed=done, total=total or None, detail=text, refresh=new)
        else:
            key, at = self._last
            if key != title or time.monotonic() - at >= _EVERY_SECONDS:
                self._last = (title, time.monotonic())
                self.say(f"{title} ... {detail or f'{seconds:.0f} s'}" if key == title else f"{title} ...")

    def finish(self, failed: bool = False) -> None:
        self._end(failed)
        if self._live:
            self._live.stop()

    def transfer(self, progress: Any) -> None:
        """`progress`: a `messages.Progress` of the stages fetch and verify."""
        title = "fetching the model" if progress.stage == "fetch" else "verifying the model"
        detail = bytes_text(progress.done, progress.total, progress.rate)
        self.show(title, done=progress.done, total=progress.total, detail=detail)

    def write(self, text: str) -> int:
        """As of a stream, for whole lines with the colours of a terminal: they go above the bar."""
        if self._live:
            self._live.console.print(Text.from_ansi(text.rstrip("\n")), soft_wrap=True, highlight=False)
        else:
            click.echo(text, err=True, nl=False)
        return len(text)

    def flush(self) -> None:
        pass

    def say(self, text: str) -> None:
        if self._live:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            click.echo(text, err=True)

    def _end(self, failed: bool = False) -> None:
        if not self._title:
            return
        if self._live and self._task is not None:
            self._live.remove_task(self._task)
        mark = "failed" if failed else "done"
        self.say(f"{self._title}: {mark} ({time.monotonic() - self._began:.1f} s)")
        self._title = ""
