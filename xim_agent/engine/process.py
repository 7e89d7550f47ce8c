"""One run of vLLM, from its start until nothing of it is left. The nursery here is CHILD in the tree."""

import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import trio

from xim_agent.engine import scrape, tree
from xim_agent.engine.client import EngineClient
from xim_agent.engine.guard import Child, Guard
from xim_agent.engine.leftovers import Leftovers
from xim_agent.engine.liveness import Liveness, Sign
from xim_agent.engine.oom import LATELY_SECONDS, Counts, OomKills, Where
from xim_agent.engine.output import Lines, Tail, level_of, phase_of
from xim_agent.engine.probe import Answer, Probe, ProbeFailed
from xim_agent.engine.scrape import Scrape

log = logging.getLogger("xim_agent.engine")
vllm_log = logging.getLogger("xim_agent.engine.vllm")

TERM_SECONDS, KILL_SECONDS = 10.0, 5.0
CANARY_SECONDS = 30.0
REFUSALS = 3  # looks in a row at which nobody accepts, a second apart
BUSY_SHARE = 0.02  # of one core: more is work, less may be a thread that only waits


@dataclass(frozen=True)
class Ended:
    """`status` None: we ended it, because of `why` or (`why` empty) because it was asked for. Seconds."""

    status: int | None
    why: str
    tail: str
    ready_for: float
    oom: Where = ""


@dataclass(frozen=True)
class Hooks:
    """What a run tells while it lasts; synchronous."""

    phase: Callable[[str], None]
    ready: Callable[[], None]
    over: Callable[[], None]
    scraped: Callable[[str, Scrape], None]


class EngineRun:
    """Made for one run. `stop` may be called at any time, from any task. `client`: whose requests prove life.

    `on_cpu`: the CPU is where it computes. `oom_kills`: as `OomKills.read`.
    """

    def __init__(
        self,
        guard: Guard,
        probe: Probe,
        hooks: Hooks,
        client: EngineClient,
        *,
        stall_seconds: float,
        hang_seconds: float,
        on_cpu: bool,
        oom_kills: Callable[[], Counts] = lambda: (0, 0),
    ) -> None:
        self._guard = guard
        self._probe = probe
        self._hooks = hooks
        self._client = client
        self._stall_seconds = stall_seconds
        self._liveness = Liveness(hang_seconds)
        self._stop = trio.Event()
        self._over = trio.CancelScope()
        self._why = ""
        self._tail = Tail()
        self._written = 0
        self._ready_at: float | None = None
        self._canaries = self._canaries_back = 0
        self._on_cpu = on_cpu
        self._oom = OomKills(oom_kills, hang_seconds + LATELY_SECONDS)

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def stop(self) -> None:
        """SIGTERM to the API server alone, 10 s, SIGKILL to all; at once while it starts, when it ignores SIGTERM."""
        self._stop.set()

    async def run(self, argv: Sequence[str], env: Mapping[str, str], cwd: str, leftovers: Leftovers) -> Ended:
        """Raises OSError when the launcher cannot be executed, and GuardLost. Cancelled: all is killed, within 5 s."""
        self._oom.look(trio.current_time())
        child = await self._guard.spawn(argv, env, cwd, leftovers, background=self._on_cpu)
        status = None
        try:
            async with trio.open_nursery() as nursery:
                relays = [trio.Event(), trio.Event()]
                nursery.start_soon(self._relay, child.stdout, False, relays[0])
                nursery.start_soon(self._relay, child.stderr, True, relays[1])
                nursery.start_soon(self._obey_stop, child)
                nursery.start_soon(self._watch_start, child)
                nursery.start_soon(self._serve, child)
                with self._over:
                    status = await child.wait()
                self._hooks.over()
                oom = self._oom.lately(trio.current_time())
                ready_for = 0.0 if self._ready_at is None else trio.current_time() - self._ready_at
                await self._guard.kill_all()
                with trio.move_on_after(1.0):  # what is still in the pipes
                    for event in relays:
                        await event.wait()
                nursery.cancel_scope.cancel()
        finally:
            with trio.move_on_after(KILL_SECONDS, shield=True):
                await self._guard.kill_all()
            with trio.move_on_after(1.0, shield=True):
                await child.aclose()
                await self._probe.aclose()
        return Ended(status, self._why, self._tail.text(), ready_for, oom)

    def _fail(self, why: str) -> None:
        if not self.stopping and not self._why:
            self._why = why
            self._over.cancel()

    async def _relay(self, stream: trio.lowlevel.FdStream, stderr: bool, done: trio.Event) -> None:
        """Always reads, so that vLLM never blocks on a full pipe. Its errors may be on either of the two."""
        lines = Lines()
        async for data in stream:
            self._written += len(data)
            if stderr:
                self._tail.add(data)
            for line in lines.feed(data):
                level = level_of(line)
                if not stderr and level >= logging.ERROR:
                    self._tail.add(line.encode() + b"\n")
                # Once asked to end, vLLM reports its own end as errors with tracebacks.
                vllm_log.log(min(level, logging.INFO) if self.stopping else level, line)
                if self._ready_at is None and (phase := phase_of(line)):
                    self._hooks.phase(phase)
        done.set()

    async def _obey_stop(self, child: Child) -> None:
        await self._stop.wait()
        if self._ready_at is not None:
            await self._guard.signal(child.pid, signal.SIGTERM)
            await trio.sleep(TERM_SECONDS)
            log.warning("vLLM did not end after SIGTERM", extra={"seconds": TERM_SECONDS})
        self._over.cancel()

    async def _watch_start(self, child: Child) -> None:
        """Fails the start when vLLM neither writes nor computes. There is no limit on the whole."""
        look = min(2.0, self._stall_seconds / 4)
        seen, idle_since = (-1, 0.0), trio.current_time()
        while self._ready_at is None:
            used = await trio.to_thread.run_sync(tree.cpu_seconds, child.pid)
            now = trio.current_time()
            self._oom.look(now)
            if self._written != seen[0] or abs(used - seen[1]) > BUSY_SHARE * look:
                idle_since = now
            seen = (self._written, used)
            if now - idle_since >= self._stall_seconds:
                self._fail(f"vLLM has neither written nor computed for {now - idle_since:.0f} s while starting")
                return
            await trio.sleep(look)

    async def _serve(self, child: Child) -> None:
        while True:
            if await self._probe.health() is Answer.OK:
                break
            await trio.sleep(0.25)
        self._hooks.phase("proving it with one token")
        try:
            await self._probe.one_token()
        except ProbeFailed as error:
            self._fail(f"vLLM is up but cannot serve: {error.message}")
            return
        await self._look_at_metrics()
        self._ready_at = trio.current_time()
        self._tail.clear()  # the start's own complaints explain no later end
        self._hooks.ready()
        async with trio.open_nursery() as canaries:
            await self._stay_alive(child, canaries)

    async def _look_at_metrics(self) -> Scrape | None:
        text = await self._probe.metrics()
        if text is None:
            return None
        found = scrape.parse(text)
        self._hooks.scraped(text, found)
        return found

    async def _stay_alive(self, child: Child, canaries: trio.Nursery) -> None:
        """Looks every second: refused connections mean death, time-outs mean load, standing still means a hang."""
        refused, seen = 0, Scrape()
        proof: object = None
        core = tree.Usage(child.pid)
        while True:
            await trio.sleep(1.0)
            self._oom.look(trio.current_time())
            answer, found = await self._look()
            if answer is Answer.FAILED:
                self._fail("vLLM says that its engine core has died")
            refused = refused + 1 if answer is Answer.NONE else 0
            if refused >= REFUSALS:
                self._fail("vLLM accepts no connections any more")
            seen = found or seen
            if seen.core is None:  # a version without the counter: nothing can be said
                continue
            before, proof = proof, (seen.core, self._client.streamed, self._canaries_back)
            busy = max(seen.requests, self._client.waits.now, self._canaries)
            computing = False
            if self._on_cpu and busy and proof == before:
                share = await trio.to_thread.run_sync(core.share, trio.current_time())
                computing = share > BUSY_SHARE
            if self._liveness.hung(Sign(trio.current_time(), proof, busy, computing)):
                still = self._liveness.still
                self._fail(f"vLLM has made no step for {still:.0f} s with {busy} requests")
            if not busy and self._liveness.still >= min(CANARY_SECONDS, self._liveness.limit / 2):
                self._canaries += 1
                self._liveness.asked()
                canaries.start_soon(self._canary)

    async def _look(self) -> tuple[Answer, Scrape | None]:
        """Both at once, so that two time-outs make one look no longer."""
        answer, found = Answer.SLOW, None

        async def health() -> None:
            nonlocal answer
            answer = await self._probe.health()

        async def metrics() -> None:
            nonlocal found
            found = await self._look_at_metrics()

        async with trio.open_nursery() as both:
            both.start_soon(health)
            both.start_soon(metrics)
        return answer, found

    async def _canary(self) -> None:
        """After a quiet time: one token. Until it comes the engine counts as busy: it comes, or that is a hang."""
        try:
            await self._probe.one_token()
            self._canaries_back += 1
        except ProbeFailed as error:
            log.warning("canary failed", extra={"error": error.message})
            await trio.sleep(CANARY_SECONDS)
        finally:
            self._canaries -= 1


async def output_of(guard: Guard, argv: Sequence[str], env: Mapping[str, str], leftovers: Leftovers) -> str:
    """Runs a program to its end and returns what it wrote to stdout; empty when it fails. Cancelled: it is killed."""
    child = await guard.spawn(argv, env, "/", leftovers)
    written = bytearray()

    async def drain(stream: trio.lowlevel.FdStream, into: bytearray) -> None:
        async for data in stream:
            into += data

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain, child.stdout, written)
            nursery.start_soon(drain, child.stderr, bytearray())
        status = await child.wait()
    finally:
        with trio.move_on_after(KILL_SECONDS, shield=True):
            await guard.kill_all()
        with trio.move_on_after(1.0, shield=True):
            await child.aclose()
    return written.decode(errors="replace") if status == 0 else ""
