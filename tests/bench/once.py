"""One run of the agent's own cache for the benchmark, in a process of its own; prints seconds and peak bytes of memory.

`python once.py REFERENCE URL CACHE BOUND`, `python once.py make FILES DATA BYTES COUNT`. URL `-`: from the store alone.
"""

import json
import sys
import time
from pathlib import Path

import trio
from weights import write_model

from xim_agent.cache.service import Cache
from xim_agent.clock import SystemClock
from xim_agent.health import Health
from xim_agent.identity.bearer import Bearer
from xim_agent.mesh.client import RouterClient
from xim_agent.mesh.messages import ModelRef
from xim_agent.router.publish import publish


class Credentials:
    def __init__(self, url: str) -> None:
        self._bearer = Bearer(url, "of no use to a file server", "bench")

    async def wait_bearer(self) -> Bearer:
        return self._bearer

    async def refused(self, token: str) -> None:
        raise SystemExit("the server refuses the token")


async def fetch(model: ModelRef, url: str, directory: Path, bound: int) -> None:
    async with RouterClient(insecure=False, clock=SystemClock(), on_skew=lambda s: None) as client:
        client.credentials = None if url == "-" else Credentials(url)
        async with Cache(
            directory=directory,
            max_bytes=bound,
            downloads=8,
            source=client,
            allow_unsafe=False,
            clock=SystemClock(),
            health=Health(now=lambda: 0.0),
        ) as cache:
            began = time.perf_counter()
            await cache.ensure(model, lambda p: None)
            seconds = time.perf_counter() - began
            print(json.dumps({"seconds": seconds, "rss": peak()}))


def peak() -> int:
    """Bytes. The maximum that wait4 tells includes that of the parent before exec."""
    high = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(high.split()[1]) * 1024


def make(root: Path, data: Path, size: int, count: int) -> None:
    write_model(root, size, count)
    done = publish(root, "bench", "r1", data)
    print(json.dumps([done.id, done.name, done.revision, f"sha256:{done.manifest_sha256}", done.size_bytes]))


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
    else:
        reference = ModelRef(*json.loads(Path(sys.argv[1]).read_text()))
        trio.run(fetch, reference, sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
