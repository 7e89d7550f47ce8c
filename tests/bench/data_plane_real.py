"""Real vLLM under the same clients: by its own socket, then as clients have it, through local router and agent.

vLLM sets the pace, as fast as it can, so that `gap` is the plain time between two pieces here, and `hop` unknown.
`agent`: CPU of the agent alone, `router`: of the local router in the same run.
"""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_plane_peers import HERE, python, running, usage
from data_plane_rows import head, row, show, watch
from fakes.stack import Stack


@contextmanager
def stack(vllm: str, model: str, root: Path, streams: int) -> Iterator[Stack]:
    """This source as the executable."""
    exe = root / "agent"
    exe.write_text(f'#!/bin/sh\nPYTHONPATH={HERE.parent.parent} exec {sys.executable} -m xim_agent "$@"\n')
    exe.chmod(0o755)
    made = Stack(exe=str(exe), vllm=vllm, model=Path(model), root=root / "stack")
    try:
        made.prepare()
        seqs = str(max(64, streams))
        own = {"MAX_NUM_SEQS": seqs, "MAX_CONCURRENT": seqs, "ROUTER_URL": made.url, "JOIN_KEY": made.join_key}
        made.start_agent(**{f"XEROTIER_AGENT_{name}": value for name, value in own.items()})
        made.wait_ready()
        yield made
    finally:
        made.close()


def run(vllm: str, model: str, streams: list[int], seconds: float, pieces: int) -> None:
    with tempfile.TemporaryDirectory(prefix="xim") as scratch, stack(vllm, model, Path(scratch), max(streams)) as made:
        assert made.agent is not None
        assert made.router is not None
        print(head())
        for number in streams:
            for name, address, pid in (
                ("vLLM", str(made.socket), None),
                ("agent", str(made.port), made.agent.popen.pid),
            ):
                load = (Path(scratch, f"{name}{number}"), number * 1000, pieces, number, seconds)
                env = {"XIM_BENCH_MODEL": made.served, "XIM_BENCH_KEY": made.api_key}
                with running(*python("data_plane_client.py", address, *load), **env) as driver:
                    before = usage(made.router.popen.pid, alone=True)
                    measured = row(name, number, *watch(driver, pid, alone=True))
                    after = usage(made.router.popen.pid, alone=True)
                show(measured, None)
                if pid is not None:
                    each = (after.cpu - before.cpu) / max(1.0, measured.rate * (seconds + 2)) * 1e6
                    print(f"{'router':12} {number:6} {'':8} {each:7.1f}", flush=True)
