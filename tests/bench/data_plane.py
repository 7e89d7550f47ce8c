"""The hop from engine to router, and what a user would put in its place, under the same load.

By hand, in the root: `PYTHONPATH=.:tests python tests/bench/data_plane.py [--streams 32,128] [--rows direct,agent]`. A
synthetic engine sends an event of about 200 bytes per stream every 20 ms. Each row is measured after 2 s of warm-up, in
processes of its own; a request ends after `--pieces` and another one comes. Prints, per row and number of streams:

    chunks/s   pieces that came to the client (or, of the agent, to a router that acknowledges them)
    CPU us     of the measured process per piece, requests and polls included
    first      ms from the request to the first piece, less those of `direct`: p50 and p99
    gap        ms by which a piece came later after its predecessor than it was sent: p50 and p99
    hop        ms from the engine's send to us: p50 and p99
    B/chunk    bytes read per piece; of the agent those of bodies of events
    RSS        peak, MiB

The targets are 17 us at 128 streams and 11 us at 512 where `prototype` takes 17 and 10. With `--real VLLM MODEL`: real
vLLM at its own pace, by its socket and through agent and local router.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_plane_peers import PEERS, Place, free_port, python, running, said
from data_plane_rows import Row, head, row, show, watch

# What reads the engine and calls a router that acknowledges.
AGENTS = {"agent": "data_plane_agent.py", "prototype": "data_plane_prototype.py"}
ROWS = (*PEERS, *AGENTS)


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
        if name in AGENTS:
            port = free_port()
            with running(*python("data_plane_sink.py", port, *load)) as driver:
                said(driver, "ready")
                url, ceiling = f"http://127.0.0.1:{port}", shape.streams * 2
                argv = (place.engine, url, ceiling, place.scratch / "spool")
                with running(*python(AGENTS[name], *argv)) as agent:
                    return row(name, shape.streams, *watch(driver, agent.pid))
        with PEERS[name](place) as (address, pid), running(*python("data_plane_client.py", address, *load)) as driver:
            return row(name, shape.streams, *watch(driver, pid))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="32,128,512")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--pieces", type=int, default=250, help="of an answer")
    parser.add_argument("--period-ms", type=float, default=20.0, help="between two pieces of a stream")
    parser.add_argument("--peers", type=Path, default=Path(tempfile.gettempdir(), "xim-bench-peers"))
    parser.add_argument("--real", nargs=2, metavar=("VLLM", "MODEL"))
    asked = parser.parse_args()
    asked.peers.mkdir(exist_ok=True)
    streams = [int(number) for number in asked.streams.split(",")]
    if asked.real:
        import data_plane_real

        data_plane_real.run(*asked.real, streams, asked.seconds, asked.pieces)
        return
    print(head())
    wrong = 0
    for number in streams:
        base: Row | None = None
        for name in asked.rows.split(","):
            measured = measure(name, Shape(number, asked.seconds, asked.pieces, asked.period_ms), asked.peers)
            base = measured if name == "direct" else base
            show(measured, base)
            wrong += measured.wrong
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
