"""A fleet on one local router: real calls over real sockets; by hand: `PYTHONPATH=. python tests/bench/fleet.py`.

The router runs as an operator starts it, in a process of its own; 1,000 agents and their clients are in this one
(`own`, `own lag`: its CPU, and how late it is, which every time includes). First single calls, beside the waiting
fleet: CPU and bytes of each, and the sums of larger fleets from them. Then the fleet idle, then with requests whose
answers take 2 s in ten events calls; `dispatch` is from the client's send to the lease at the agent. `--seconds 300`
for the long run, `--ramp` doubles the requests until something breaks, `--files 300` shows a router with too few open
files.

What breaks first is the router's one core, by events calls and not by polls: an idle agent costs one connection and
one poll in 25 s, about 1.4 kB; 100,000 of them are 4,000 polls and 6 MB a second, 100,000 connections, and 3 to 4
cores of this router's kind, so some processes behind a balancer. But an agent sends each chunk of its only stream in
a call of its own, of 1.2 kB for 190 bytes: 20 calls a second from each of 1,000 agents are 20,000, for one core about
15 times too many here. 64 streams on one agent take no more calls than that one. A router for a fleet must have a
cheaper way for events than one HTTP/1.1 call each: a connection's headers said once (HTTP/2), or a longer pause
between calls, told by the router.
"""

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fleet_agents import MODEL, Agent, Clients, Load, Traffic

from xim_agent.identity import jose
from xim_agent.router import catalog, enrollment
from xim_agent.router.store import Store
from xim_agent.router.tokens import Proof

PORT = 18490
URL = f"http://127.0.0.1:{PORT}"
TICK = os.sysconf("SC_CLK_TCK")


def prepare(data: Path, agents: int) -> tuple[list[str], str]:
    """Tokens of agents enrolled by the router's own code, and an API key."""
    now, tokens = time.time(), []
    with Store.open(data) as store:
        store.db.execute("PRAGMA synchronous = OFF")
        store.serve_at([URL], URL)
        digest = f"sha256:{'0' * 64}"
        catalog.register(store.db, catalog.Published(MODEL, "r1", MODEL, digest, 1000, 700, "generate", now))
        catalog.assign(store.db, MODEL, None, None)
        _, join_key = store.create_join_key(project="bench", region="local", uses=agents, expires_at=None, now=now)
        keys = store.keys(now)
        for number in range(agents):
            jwk = jose.jwk_of(Ed25519PrivateKey.generate().public_key())
            body = {
                "join_key": join_key,
                "nonce": jose.b64u(uuid.uuid4().bytes),
                "public_key": jwk,
                "protocols": [1],
                "agent": {"name": f"node{number}", "version": "0", "os": "linux", "arch": "x", "hostname": "n"},
                "hardware": {"accelerator": "nvidia", "devices": [{"name": "H100"}], "tier": "self_hosted"},
                "max_concurrent": None,
            }
            proof = Proof(jose.thumbprint(jose.public_key(jwk)), jwk, uuid.uuid4().hex, URL)
            tokens.append(enrollment.enroll(store.db, keys, body, proof, now, "127.0.0.1")["token"])
        return tokens, catalog.create_api_key(store.db, "bench", now)


class RouterProcess:
    """As an operator starts it. Figures from /proc, of all its threads."""

    def __init__(self, data: Path, options: argparse.Namespace) -> None:
        words = [sys.executable, *(["-m", "cProfile", "-o", options.profile] if options.profile else [])]
        words += ["-m", "xim_agent", "router", "serve", "--data", str(data), "--listen", f"127.0.0.1:{PORT}"]
        if options.files:
            words = ["bash", "-c", f'ulimit -n {options.files}; exec "$@"', "limited", *words]
        self.log = (data / "router.log").open("w+")
        self._process = subprocess.Popen(words, stderr=self.log, cwd=data)
        self.pid = self._process.pid

    async def ready(self) -> None:
        with trio.fail_after(30):
            while True:
                try:
                    await (await trio.open_tcp_stream("127.0.0.1", PORT)).aclose()
                    return
                except OSError:
                    await trio.sleep(0.05)

    def cpu(self) -> float:
        """Seconds."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def rss(self, what: str = "VmRSS") -> float:
        """MiB."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return int(next(x for x in lines if x.startswith(what)).split()[1]) / 1024

    def files(self) -> int:
        """Open ones: its connections, and about ten."""
        return sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(30)


@dataclass
class Row:
    """One phase. CPU in seconds per second, the router's and this process's own; rates per second."""

    name: str
    cpu: float
    own: float
    polls: float
    events: float
    requests: float
    rss: float
    files: int
    dispatch: list[float]
    first: list[float]
    lag: list[float]
    failures: dict[str, int]

    def show(self) -> None:
        def ms(found: list[float]) -> str:
            return f"{at(found, 50) * 1000:6.1f} {at(found, 99) * 1000:7.1f}" if found else f"{'-':>6} {'-':>7}"

        print(
            f"{self.name:14} {self.cpu:5.2f} {self.own:5.2f} {self.polls:7.0f} {self.events:7.0f} {self.requests:6.0f}"
            f" {self.rss:5.0f} {self.files:6} {ms(self.dispatch)} {ms(self.first)} {ms(self.lag)}  "
            + (", ".join(f"{count} x {what}" for what, count in self.failures.items()) or "-"),
            flush=True,
        )


def at(found: list[float], percent: int) -> float:
    return statistics.quantiles(found, n=100, method="inclusive")[percent - 1] if len(found) > 1 else sum(found)


async def phase(name: str, seconds: float, load: Load, router: RouterProcess) -> Row:
    """Lets it run in, then measures."""
    await trio.sleep(min(3.0, seconds / 4))
    load.clear()
    began, cpu, own = time.perf_counter(), router.cpu(), time.process_time()
    await trio.sleep(seconds)
    took = time.perf_counter() - began
    row = Row(
        name,
        (router.cpu() - cpu) / took,
        (time.process_time() - own) / took,
        load.polls.calls / took,
        load.events.calls / took,
        load.done / took,
        router.rss(),
        router.files(),
        list(load.dispatch),
        list(load.first),
        list(load.lag),
        dict(load.failures),
    )
    row.show()
    return row


HEAD = (
    f"{'phase':14} {'CPU':>5} {'own':>5} {'polls/s':>7} {'events/s':>7} {'req/s':>6} {'MiB':>5} {'files':>6}"
    f" {'dispatch p50 p99':>14} {'first byte':>14} {'own lag, ms':>14}  failures"
)


@dataclass(frozen=True)
class Costs:
    """Per call: the router's CPU in seconds, and bytes with all headers. `event`: with a chunk to a client."""

    poll: float
    event: float
    polls: Traffic
    events: Traffic


async def costs(load: Load, router: RouterProcess, token: str) -> Costs:
    """One call after the other beside the waiting fleet: figures that hold on a busy machine, too."""

    async def each(call: Callable[[], Awaitable[None]], count: int, poll: float) -> float:
        await call()
        load.clear()
        cpu = router.cpu()
        for _ in range(count):
            await call()
        return (router.cpu() - cpu - load.polls.calls * poll) / count

    agent, clients = Agent(load, 0, token), Clients(load)
    poll = await each(agent.poll_once, 300, 0.0)
    poll *= 300 / load.polls.calls  # the fleet's are among them
    polls = replace(load.polls)
    event = await each(agent.event_once, 400, poll)
    events = replace(load.events)
    load.calls, load.gap = 2, 0.001  # an answer that ends in its first call is no stream
    request = await each(clients.request, 100, poll)
    load.calls = 22
    chunk = (await each(clients.request, 20, poll) - request) / 20
    found = Costs(poll, chunk, polls, events)
    print(
        f"router's CPU: {poll * 1e6:.0f} us per poll, {event * 1e6:.0f} per events call, {chunk * 1e6:.0f} with a chunk"
    )
    print(f"to a client, {(request - 2 * chunk) * 1e6:.0f} per request without its poll and events")
    return found


async def measure(options: argparse.Namespace, load: Load, router: RouterProcess, token: str) -> None:
    found = await costs(load, router, token)
    sums(found)
    part = options.seconds / 2
    print("\n" + HEAD)
    await phase("idle", part, load, router)
    load.rate, load.calls, load.gap = options.rate, 10, 0.2
    await phase(f"{load.rate:.0f} req/s", part, load, router)
    print(f"peak {router.rss('VmHWM'):.0f} MiB")
    if options.ramp:
        await ramp(options, load, router)


def sums(found: Costs) -> None:
    """What a router for a fleet must bear, from the bytes and the CPU measured here."""
    polls, events = found.polls, found.events
    up, down = polls.up / polls.calls, polls.down / polls.calls
    e_up, e_down = events.up / events.calls, events.down / events.calls
    print(f"bytes: {up:.0f} + {down:.0f} per poll, {e_up:.0f} + {e_down:.0f} per events call with one chunk")
    names = f"{'conns':>7} {'polls/s':>7} {'events/s':>9} {'MB/s in':>8} {'out':>7} {'cores':>7}"
    print(f"\n{'agents':>7} {'each':20} {names}")
    for agents in (1_000, 10_000, 100_000):
        for each, calls in (("idle", 0.0), ("1 stream, 20 calls/s", 20.0), ("busy, 100 calls/s", 100.0)):
            asked, called = agents / 25, agents * calls
            into, out = (asked * up + called * e_up) / 1e6, (asked * down + called * e_down) / 1e6
            cores = asked * found.poll + called * found.event
            conns = agents * (2 if calls else 1)
            print(f"{agents:7} {each:20} {conns:7} {asked:7.0f} {called:9.0f} {into:8.1f} {out:7.1f} {cores:7.1f}")


async def ramp(options: argparse.Namespace, load: Load, router: RouterProcess) -> None:
    """Twice the requests each time, until something gives."""
    print("\nuntil it breaks")
    load.calls = 4
    while True:
        load.rate *= 2
        row = await phase(f"{load.rate:.0f} req/s", 8, load, router)
        slow = at(row.dispatch, 99)
        if row.failures or slow > 1 or row.cpu > 0.95:
            why = "failures" if row.failures else "the router's CPU" if row.cpu > 0.9 else "this process's CPU"
            print(f"broken at {load.rate:.0f} requests/s ({row.requests:.0f} done): {why}")
            return


async def run(options: argparse.Namespace, data: Path) -> None:
    began = time.perf_counter()
    (spare, *tokens), key = prepare(data, options.agents + 1)
    print(f"{options.agents} agents enrolled in {time.perf_counter() - began:.1f} s", flush=True)
    load = Load("127.0.0.1", PORT, key)
    router = RouterProcess(data, options)
    try:
        await router.ready()
        print(f"router is {router.pid}", flush=True)
        start = router.cpu()
        with trio.move_on_after(options.seconds * 3 + 200):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(load.watch_lag)
                for number, token in enumerate(tokens, 1):
                    nursery.start_soon(Agent(load, number, token).run)
                await load.all_polled(options.agents)
                spent = (router.cpu() - start) / options.agents * 1e6
                print(f"first polls: {spent:.0f} us of CPU each, their connection included; {load.failures or ''}")
                nursery.start_soon(Clients(load).run)
                await measure(options, load, router, spare)
                nursery.cancel_scope.cancel()
    finally:
        router.stop()
        router.log.seek(0)
        lines = router.log.read().splitlines()
        print(json.dumps(lines[:12], indent=0))


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("--agents", type=int, default=1000)
    parse.add_argument("--seconds", type=float, default=60, help="of the two phases together")
    parse.add_argument("--rate", type=float, default=40, help="requests per second")
    parse.add_argument("--files", type=int, help="limit of open files of the router")
    parse.add_argument("--ramp", action="store_true", help="raise the load until something breaks")
    parse.add_argument("--profile", help="write the router's cProfile there")
    options = parse.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the router must not be left behind
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as scratch:
        trio.run(run, options, Path(scratch))


if __name__ == "__main__":
    main()
