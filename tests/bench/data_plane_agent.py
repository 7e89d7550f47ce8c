"""The agent's work side in a process of its own: `python data_plane_agent.py ENGINE_SOCKET ROUTER_URL CEILING SPOOL`.

The real poller, sender, requests, outbox, engine client and router client, wired as `assemble` does; no engine is
started and nobody enrolls. Ends with the first SIGTERM.
"""

import os
import signal
import sys
import time
from pathlib import Path

import trio

from xim_agent.clock import SystemClock
from xim_agent.engine.client import EngineClient
from xim_agent.health import Health
from xim_agent.heap import settle_heap
from xim_agent.identity.bearer import Bearer
from xim_agent.mesh.client import RouterClient
from xim_agent.mesh.messages import Load
from xim_agent.work.link import Link
from xim_agent.work.poller import Poller
from xim_agent.work.sender import Sender
from xim_agent.work.spool import Spool


class Credentials:
    def __init__(self, url: str) -> None:
        self._bearer = Bearer(url, "e" * 400, "bench")

    async def wait_bearer(self) -> Bearer:
        await trio.lowlevel.checkpoint()
        return self._bearer

    async def refused(self, token: str) -> None:
        raise SystemExit("the router refuses the token")


class Engine:
    """One that is always ready."""

    ready, degraded = True, False

    def __init__(self, client: EngineClient, ceiling: int) -> None:
        self.client, self.ceiling = client, ceiling

    def load(self) -> Load:
        return Load()


async def run(socket: str, url: str, ceiling: int, directory: Path) -> None:
    clock, health = SystemClock(), Health(now=time.time)
    client = EngineClient()
    client.attach(socket)
    engine = Engine(client, ceiling)
    async with RouterClient(insecure=False, clock=clock, on_skew=lambda s: None) as router, trio.open_nursery() as tree:
        router.credentials = Credentials(url)
        link = Link(health=health)
        sender = Sender(router=router, boot="bench", link=link, spool=Spool(directory))
        poller = Poller(
            router=router, sender=sender, engine=engine, link=link, health=health, clock=clock, boot="bench",
            generation_seen=lambda generation: None, model=lambda: None, progress=lambda: None,
        )  # fmt: skip
        tree.start_soon(sender.run)
        async with trio.open_nursery() as work:
            tree.start_soon(poller.run, work)  # noqa: ASYNC111
            with trio.open_signal_receiver(signal.SIGTERM) as signals:
                await anext(signals)
            work.cancel_scope.cancel()
        tree.cancel_scope.cancel()


def main() -> None:
    settle_heap()  # as `run` does
    if profile := os.environ.get("XIM_BENCH_PROFILE"):
        import cProfile

        with cProfile.Profile() as found:
            trio.run(run, sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
        found.dump_stats(profile)
    else:
        trio.run(run, sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))


if __name__ == "__main__":
    main()
