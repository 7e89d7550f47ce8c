"""Rows for people (aligned columns) and for programs (JSON), on stdout."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

Row = Mapping[str, Any]
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON: a list with an object for each row")


def show(rows: Sequence[Row], columns: Mapping[str, Callable[[Row], str]], as_json: bool) -> None:
    """`columns`: heading → text of a cell. As JSON every row is printed whole."""
    if as_json:
        click.echo(json.dumps(list(rows), indent=2))
        return
    click.echo(aligned(rows, columns))


def aligned(rows: Sequence[Row], columns: Mapping[str, Callable[[Row], str]]) -> str:
    cells = [list(columns), *([plain(text(row)) for text in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def cell(name: str) -> Callable[[Row], str]:
    """The member as it is."""
    return lambda row: str(row[name])


def plain(text: str) -> str:
    """Names come from others: nothing in them moves the cursor of a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text) or "-"


def moment(when: float | None) -> str:
    """Local time; `never` for None."""
    return "never" if when is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))


def ago(when: float | None, now: float) -> str:
    """How long ago, in the largest unit that makes it 2 or more."""
    if when is None:
        return "never"
    seconds = max(0.0, now - when)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
