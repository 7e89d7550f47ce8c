"""A fleet on one local router: real calls over real sockets; by hand: `PYTHONPATH=. python tests/bench/fleet.py`."""

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
from dataclasses import dataclass, replace
from pathlib import Path

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fleet_agents import MODEL, Agent, Clients, Load

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
            words = ["bash", "-c", f'ulimit -Sn {options.files}; exec "$@"', "limited", *words]
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

    def sockets(self) -> int:
        return sum(str(fd.readlink()).startswith("socket:") for fd in Path(f"/proc/{self.pid}/fd").iterdir())

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
    sockets: int
    dispatch: list[float]
    first: list[float]
    lag: list[float]
    failures: dict[str, int]

    def show(self) -> None:
        def ms(found: list[float]) -> str:
            return f"{at(found, 50) * 1000:6.1f} {at(found, 99) * 1000:7.1f}" if found else f"{'-':>6} {'-':>7}"

        print(
            f"{self.name:14} {self.cpu:5.2f} {self.own:5.2f} {self.polls:7.0f} {self.events:7.0f} {self.requests:6.0f}"
            f" {self.rss:5.0f} {self.sockets:6} {ms(self.dispatch)} {ms(self.first)} {ms(self.lag)}  "
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
        router.sockets(),
        list(load.dispatch),
        list(load.first),
        list(load.lag),
        dict(load.failures),
    )
    row.show()
    return row


HEAD = (
    f"{'phase':14} {'CPU':>5} {'own':>5} {'polls/s':>7} {'events/s':>7} {'req/s':>6} {'MiB':>5} {'conns':>6}"
    f" {'dispatch p50 p99':>14} {'first byte':>14} {'own lag, ms':>14}  failures"
)


async def measure(options: argparse.Namespace, load: Load, router: RouterProcess) -> None:
    part, count = options.seconds / 4, options.agents
    print(HEAD)
    polls = await phase("polls", part, load, router)
    traffic = replace(load.polls)
    load.wait_ms = 25_000
    await trio.sleep(count / options.polls)
    idle = await phase("idle", part, load, router)
    load.rate, load.calls = options.rate, 2
    few = await phase("2 events", part, load, router)
    load.calls = 10
    many = await phase("10 events", part, load, router)
    print(f"peak {router.rss('VmHWM'):.0f} MiB")
    poll = (polls.cpu - idle.cpu) / max(1.0, polls.polls - idle.polls) * 1e6
    event = (many.cpu - few.cpu) / max(1.0, many.events - few.events) * 1e6
    request = (few.cpu - idle.cpu) / max(1.0, few.requests) * 1e6 - 2 * event
    print(f"router's CPU: {poll:.0f} us per poll, {event:.0f} us per events call with its chunk to the client,")
    print(f"{request:.0f} us per request with its polls and without its events")
    sums(traffic.up / traffic.calls, traffic.down / traffic.calls, poll, load, event)
    if options.ramp:
        await ramp(options, load, router)


def sums(up: float, down: float, poll: float, load: Load, event: float) -> None:
    """What a router for a fleet must bear, from the bytes and the CPU measured here."""
    events = load.events
    e_up, e_down = events.up / max(1, events.calls), events.down / max(1, events.calls)
    print(f"\nbytes: {up:.0f} + {down:.0f} per poll, {e_up:.0f} + {e_down:.0f} per events call with one chunk")
    print(
        f"{'agents':>8} {'each':22} {'conns':>7} {'polls/s':>8} {'events/s':>9} {'MB/s up':>8} {'MB/s down':>9} cores"
    )
    for agents in (1_000, 10_000, 100_000):
        for each, streams, calls in (
            ("idle", 0, 0.0),
            ("1 stream, 20 chunks/s", 1, 20.0),
            ("busy, 100 calls/s", 64, 100.0),
        ):
            asked = agents / 25
            called = agents * calls
            row = (asked * up + called * e_up) / 1e6, (asked * down + called * e_down) / 1e6
            cores = (asked * poll + called * event) / 1e6
            conns = agents * (1 + (streams > 0))
            print(f"{agents:8} {each:22} {conns:7} {asked:8.0f} {called:9.0f} {row[0]:8.1f} {row[1]:9.1f} {cores:5.1f}")


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
    tokens, key = prepare(data, options.agents)
    print(f"{options.agents} agents enrolled in {time.perf_counter() - began:.1f} s", flush=True)
    load = Load("127.0.0.1", PORT, key, wait_ms=max(1000, int(options.agents / options.polls * 1000)))
    router = RouterProcess(data, options)
    try:
        await router.ready()
        print(f"router is {router.pid}", flush=True)
        start = router.cpu()
        with trio.move_on_after(options.seconds * 3 + 200):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(load.watch_lag)
                for number, token in enumerate(tokens):
                    nursery.start_soon(Agent(load, number, token).run)
                await load.all_polled(options.agents)
                spent = (router.cpu() - start) / options.agents * 1e6
                print(f"first polls: {spent:.0f} us of CPU each, their connection included; {load.failures or ''}")
                nursery.start_soon(Clients(load).run)
                await measure(options, load, router)
                nursery.cancel_scope.cancel()
    finally:
        router.stop()
        router.log.seek(0)
        lines = router.log.read().splitlines()
        print(json.dumps(lines[:12], indent=0))


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("--agents", type=int, default=1000)
    parse.add_argument("--seconds", type=float, default=60, help="of measuring, in four parts")
    parse.add_argument("--rate", type=float, default=40, help="requests per second")
    parse.add_argument("--polls", type=float, default=300, help="polls per second in the part that measures them")
    parse.add_argument("--files", type=int, help="soft limit of open files of the router")
    parse.add_argument("--ramp", action="store_true", help="raise the load until something breaks")
    parse.add_argument("--profile", help="write the router's cProfile there")
    options = parse.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as scratch:
        trio.run(run, options, Path(scratch))


if __name__ == "__main__":
    main()
