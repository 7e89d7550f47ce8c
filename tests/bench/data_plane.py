"""The hop from engine to router, and what a user would put in its place, under the same load.

By hand, in the root: `python tests/bench/data_plane.py [--streams 32,128,512] [--seconds 10] [--rows direct,agent]`.
A synthetic engine sends an event of about 200 bytes per stream every 20 ms. Each row is measured after 2 s of warm-up,
in processes of its own; requests come anew after 250 pieces. Prints, per row and number of streams:

    chunks/s   pieces that came to the client (or, of the agent, to a router that acknowledges them)
    CPU us     of the measured process per piece, requests and polls included
    first      ms from the request to the first piece, less those of `direct`: p50 and p99
    gap        ms by which a piece came later after its predecessor than it was sent: p50 and p99
    hop        ms from the engine's send to us: p50 and p99
    B/chunk    bytes read per piece; of the agent those of bodies of events
    RSS        peak, MiB
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_plane_peers import PEERS, Place, Usage, free_port, python, running, said, usage

ROWS = ("direct", "nginx", "vllm-router", "agent")


@dataclass(frozen=True)
class Shape:
    streams: int
    seconds: float
    pieces: int
    period_ms: float

    @property
    def requests(self) -> int:
        """More than can run: the rest of the window, and what the warm-up takes."""
        each = (self.seconds + 3) * 1000 / self.period_ms / self.pieces
        return int(self.streams * (each + 3)) + 64


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


def watch(driver: subprocess.Popen[str], pid: int | None) -> tuple[dict[str, Any], Usage, Usage]:
    """The driver's lines, and what the measured process had used at the begin and the end of its window."""
    assert driver.stdout is not None
    lines: dict[str, Any] = {}
    used = {}
    for line in driver.stdout:
        found = json.loads(line)
        name = next(iter(found))
        lines[name] = found
        if name in ("begin", "end"):
            used[name] = usage(pid)
        if name == "report":
            return lines, used["begin"], used["end"]
    raise SystemExit("the driver ended without a report")


@contextmanager
def engine(shape: Shape, scratch: Path, peers: Path) -> Iterator[tuple[Place, Path]]:
    times, place = scratch / "times", Place(scratch, peers, scratch / "engine.sock", free_port())
    argv = (place.engine, place.engine_port, times, shape.requests, shape.pieces, shape.period_ms)
    with running(*python("data_plane_engine.py", *argv)) as process:
        said(process, "ready")
        yield place, times


def measure(name: str, shape: Shape, peers: Path) -> Row:
    with tempfile.TemporaryDirectory(prefix="xim") as scratch, engine(shape, Path(scratch), peers) as (place, times):
        load = (times, shape.requests, shape.pieces, shape.streams, shape.seconds)
        if name == "agent":
            port = free_port()
            with running(*python("data_plane_sink.py", port, *load)) as driver:
                said(driver, "ready")
                url, ceiling = f"http://127.0.0.1:{port}", shape.streams * 2
                argv = (place.engine, url, ceiling, place.scratch / "spool")
                with running(*python("data_plane_agent.py", *argv)) as agent:
                    return row(name, shape, *watch(driver, agent.pid))
        with PEERS[name](place) as (address, pid), running(*python("data_plane_client.py", address, *load)) as driver:
            return row(name, shape, *watch(driver, pid))


def row(name: str, shape: Shape, lines: dict[str, Any], before: Usage, after: Usage) -> Row:
    begin, end, report = lines["begin"], lines["end"], lines["report"]
    chunks = max(1, end["chunks"] - begin["chunks"])
    return Row(
        name,
        shape.streams,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="32,128,512")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--pieces", type=int, default=250, help="of an answer")
    parser.add_argument("--period-ms", type=float, default=20.0, help="between two pieces of a stream")
    parser.add_argument("--peers", type=Path, default=Path(tempfile.gettempdir(), "xim-bench-peers"))
    asked = parser.parse_args()
    asked.peers.mkdir(exist_ok=True)
    delays = "  ".join(f"{name:>13}" for name in ("first", "gap", "hop"))
    print(f"{'':12} {'stream':>6} {'chunks/s':>8} {'CPU us':>7}  {delays}  {'B/chunk':>7} {'RSS':>6}")
    wrong = 0
    for streams in map(int, asked.streams.split(",")):
        base: Row | None = None
        for name in asked.rows.split(","):
            measured = measure(name, Shape(streams, asked.seconds, asked.pieces, asked.period_ms), asked.peers)
            base = measured if name == "direct" else base
            show(measured, base)
            wrong += measured.wrong
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
