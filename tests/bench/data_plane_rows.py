"""One line of the table: what a driver says, and what the measured process has used meanwhile."""

import json
import subprocess
from dataclasses import dataclass
from typing import Any

from data_plane_peers import Usage, usage


@dataclass(frozen=True)
class Row:
    name: str
    streams: int
    rate: float
    cpu_us: float
    delays: dict[str, float]
    wire: float
    peak: int
    whole: int
    wrong: int


def watch(
    driver: subprocess.Popen[str], pid: int | None, *, alone: bool = False
) -> tuple[dict[str, Any], Usage, Usage]:
    """The driver's lines, and what the measured process had used at the begin and the end of its window."""
    assert driver.stdout is not None
    lines: dict[str, Any] = {}
    used = {}
    for line in driver.stdout:
        found = json.loads(line)
        name = next(iter(found))
        lines[name] = found
        if name in ("begin", "end"):
            used[name] = usage(pid, alone=alone)
        if name == "report":
            return lines, used["begin"], used["end"]
    raise SystemExit("the driver ended without a report")


def row(name: str, streams: int, lines: dict[str, Any], before: Usage, after: Usage) -> Row:
    begin, end, report = lines["begin"], lines["end"], lines["report"]
    chunks = max(1, end["chunks"] - begin["chunks"])
    return Row(
        name,
        streams,
        chunks / (end["end"] - begin["begin"]),
        (after.cpu - before.cpu) / chunks * 1e6,
        {key: value * 1000 for key, value in report["report"].items()},
        (end["wire"] - begin["wire"]) / chunks,
        after.peak,
        report["whole"],
        report["wrong"],
    )


def show(row: Row, direct: Row | None) -> None:
    d = dict(row.delays)
    if direct is not None and row is not direct:
        for key in ("first50", "first99"):
            d[key] -= direct.delays[key]
    pairs = "  ".join(f"{d[f'{name}50']:6.1f} {d[f'{name}99']:6.1f}" for name in ("first", "gap", "hop"))
    wrong = f"  {row.wrong} of {row.whole + row.wrong} answers are not whole" if row.wrong else ""
    print(
        f"{row.name:12} {row.streams:6} {row.rate:8.0f} {row.cpu_us:7.1f}  {pairs}  {row.wire:7.1f} "
        f"{row.peak / 2**20:6.0f}{wrong}",
        flush=True,
    )


def head() -> str:
    delays = "  ".join(f"{name:>13}" for name in ("first", "gap", "hop"))
    return f"{'':12} {'stream':>6} {'chunks/s':>8} {'CPU us':>7}  {delays}  {'B/chunk':>7} {'RSS':>6}"
