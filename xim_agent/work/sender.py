"""Takes leases in, carries their frames to the router, and applies what its replies say about them."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import trio
from msgspec import Raw

from xim_agent.mesh.messages import Error, EventsReply, Lease
from xim_agent.outcome import Action, RouterError
from xim_agent.watch import Watch
from xim_agent.work.batch import Batch
from xim_agent.work.lease import Leases
from xim_agent.work.link import Link
from xim_agent.work.outbox import MAX_IN_FLIGHT, Outbox
from xim_agent.work.outgoing import Outgoing
from xim_agent.work.spool import Spool
from xim_agent.work.statistics import Request, Running, SenderStatistics
from xim_agent.work.times import Times

log = logging.getLogger("xim_agent.work")

FATAL = frozenset({Action.REMOVED, Action.PROTOCOL})
LAPSE_CHECK_SECONDS = 1.0
SUSPENDED_SECONDS = 30.0
# Endings have about 100 bytes; with the longest messages this is still less than the 1 MiB of a call.
SPOOL_FRAMES = 400


class EventsTransport(Protocol):
    async def events(self, boot: str, frames: Sequence[bytes | Raw]) -> EventsReply: ...


class Sender:
    """`freed` is called when a request is over: there may be capacity again."""

    def __init__(self, *, router: EventsTransport, boot: str, link: Link, spool: Spool) -> None:
        self.leases = Leases()
        self.freed: Callable[[], None] = lambda: None
        self.times = Times()
        self._router = router
        self._boot = boot
        self._link = link
        self._spool = spool
        self._outbox = Outbox()
        self._running: dict[int, Outgoing] = {}
        self._ending: dict[int, Outgoing] = {}  # over, not acknowledged yet
        self._hops: dict[int, tuple[Outgoing, dict[str, Any]]] = {}  # for the log, until acknowledged
        self._changed = Watch()
        self._turn = trio.Lock()
        self._wake = trio.Event()
        self._sleeps_until = float("-inf")
        self._ended: Counter[str] = Counter()
        self._accepted = self._refused = self._calls = self._failed_calls = 0

    # leases

    def accept(self, lease: Lease, sent_at: float, refusal: Error | None) -> Outgoing | None:
        """Holds the lease; None when nothing is to be served: it was here before, or is refused (and ended so)."""
        if not self.leases.receive(lease, sent_at):
            return None
        out = Outgoing(lease, self._outbox, stir=self._stir, done=self._done, times=self.times)
        self._running[lease.id] = out
        if refusal is None:
            self._accepted += 1
            return out
        self._refused += 1
        told = {"request": lease.request, "lease": lease.id, "code": refusal.code, "reason": refusal.message}
        log.warning("lease refused", extra=told)
        out.end(refusal)
        return None

    @property
    def running(self) -> int:
        return len(self._running)

    def apply(self, credit: Mapping[int, int], cancel: Iterable[int], unknown: Iterable[int] = ()) -> None:
        """What a reply says; leases that are not held are passed over."""
        for lease in self._outbox.grant(credit):
            if (out := self._running.get(lease)) is not None:
                out.credited()
        for lease in cancel:
            if (out := self._running.get(lease)) is not None:
                out.abort("cancelled")
        for lease in unknown:
            self._forget(lease)

    def _forget(self, lease: int) -> None:
        if self._outbox.drop(lease):
            told = self._running.get(lease) or self._ending.get(lease)
            request = told.request if told else None
            log.info("lease dropped, the router does not know it", extra={"request": request, "lease": lease})
        if (out := self._running.get(lease)) is not None:
            out.abort("unknown")
        self._settle(lease, acknowledged=False)

    def _settle(self, lease: int, acknowledged: bool = True) -> None:
        self.leases.settle(lease)
        self._ending.pop(lease, None)
        if (over := self._hops.pop(lease, None)) is not None:
            out, hops = over
            when = out.since_received(trio.current_time()) if acknowledged else None
            log.debug("request", extra=hops | {"acknowledged_ms": when})
        self._changed.bump()

    def _done(self, out: Outgoing, name: str) -> None:
        del self._running[out.id]
        if name != "unknown":
            self._ending[out.id] = out
        self._ended[name] += 1
        if log.isEnabledFor(logging.DEBUG):
            hops = out.hops() | {"ending": name}
            if name == "unknown":  # nothing is acknowledged any more
                log.debug("request", extra=hops | {"acknowledged_ms": None})
            else:
                self._hops[out.id] = out, hops
        self._changed.bump()
        self.freed()

    def _longest(self) -> Running | None:
        out = min(self._running.values(), key=lambda out: out.received, default=None)
        seconds = 0.0 if out is None else trio.current_time() - out.received
        return None if out is None else Running(out.request, out.path, seconds, out.sent)

    def requests(self) -> list[Request]:
        """What is held now, oldest first."""
        now = trio.current_time()
        held = sorted([*self._running.values(), *self._ending.values()], key=lambda out: out.received)
        return [Request(out.request, out.id, out.path, now - out.received, out.phase, *out.totals) for out in held]

    def remains(self) -> dict[str, int]:
        """For the log of a stop: requests that run, and leases whose ending is not acknowledged."""
        return {"requests": self.running, "leases": len(self.leases)}

    async def wait_idle(self) -> None:
        """Until no request runs."""
        while self._running:
            await self._changed.wait_beyond(self._changed.version)

    async def flushed(self) -> None:
        """Until every ending is acknowledged or its lease unknown to the router."""
        while len(self.leases):
            await self._changed.wait_beyond(self._changed.version)

    # sending

    async def run(self) -> None:
        """Until cancelled. Raises RouterError when the router says that this agent must end."""
        async with trio.open_nursery() as nursery:
            for _ in range(MAX_IN_FLIGHT):
                nursery.start_soon(self._work)
            nursery.start_soon(self._end_lapsed)
            # Events without frames ask for nothing but an answer.
            nursery.start_soon(self._link.knock, lambda: self._router.events(self._boot, ()))

    async def _work(self) -> None:
        while True:
            async with self._turn:
                batch = await self._next()
            await self._deliver(batch)

    async def _next(self) -> Batch:
        while True:
            due = self._outbox.due(trio.current_time())
            if due is None or due > trio.current_time():
                self._wake = trio.Event()
                self._sleeps_until = float("inf") if due is None else due
                with trio.move_on_at(self._sleeps_until):
                    await self._wake.wait()
                self._sleeps_until = float("-inf")
                continue
            await self._link.turn()
            batch = self._outbox.take(trio.current_time())
            if batch is not None:
                return batch

    def _stir(self) -> None:
        """Wakes the task in `_next` when it would sleep too long."""
        due = self._outbox.due(trio.current_time())
        if due is not None and due < self._sleeps_until:
            self._wake.set()

    async def _deliver(self, batch: Batch) -> None:
        self._calls += 1
        try:
            with self._link.call("events"):
                reply = await self._router.events(self._boot, batch.raw)
        except RouterError as error:
            self._failed_calls += 1
            self._outbox.failed(batch)
            await self._refused_call(batch, error)
        else:
            now = trio.current_time()
            self.times.call.observe(now - batch.left)
            self.leases.renew(batch.leases, batch.left)
            for lease in self._outbox.delivered(batch, reply.acked, now):
                self._settle(lease)
            self.apply(reply.credit, reply.cancel, reply.unknown)
        self._stir()

    async def _refused_call(self, batch: Batch, error: RouterError) -> None:
        if error.action in FATAL:
            raise error
        if error.action is Action.FINAL:
            log.error("events refused", extra={"code": error.code, "reason": error.message, "leases": batch.leases})
            for lease in batch.leases:
                self._forget(lease)
        elif error.action is Action.WAIT:
            await trio.sleep(SUSPENDED_SECONDS)

    async def _end_lapsed(self) -> None:
        while True:
            await trio.sleep(LAPSE_CHECK_SECONDS)
            for lease in self.leases.lapsed(trio.current_time()):
                if (out := self._running.get(lease)) is not None:
                    message = "the lease lapsed: no call that renews it was answered in time"
                    out.abort(Error("internal", message, retryable=out.untouched))

    # across starts

    def spool(self) -> None:
        """Keeps the endings that are not acknowledged, at a clean stop; a disk that refuses must not hinder that."""
        try:
            self._spool.save(self._boot, self._outbox.unacknowledged_endings())
        except OSError as error:
            log.warning("endings are not kept for the next start", extra={"reason": str(error)})

    async def send_spooled(self) -> None:
        """Before the first poll: endings of earlier boots, until the router has taken or refused them."""
        entries = self._spool.load()
        for entry in entries:
            for start in range(0, len(entry.frames), SPOOL_FRAMES):
                await self._send_spooled(entry.boot, entry.frames[start : start + SPOOL_FRAMES])
        if entries:
            try:
                self._spool.clear()
            except OSError as error:  # they are sent again at the next start, which changes nothing
                log.warning("spool cannot be removed", extra={"reason": str(error)})

    async def _send_spooled(self, boot: str, frames: list[Raw]) -> None:
        while True:
            await self._link.turn()
            try:
                with self._link.call("events"):
                    await self._router.events(boot, frames)
            except RouterError as error:
                if error.action in FATAL:
                    raise
                if error.action is Action.FINAL:
                    log.warning("spooled endings refused", extra={"code": error.code, "reason": error.message})
                    return
                if error.action is Action.WAIT:
                    await trio.sleep(SUSPENDED_SECONDS)
            else:
                return

    def statistics(self) -> SenderStatistics:
        longest = self._longest()
        return SenderStatistics(
            accepted=self._accepted,
            refused=self._refused,
            ended=dict(self._ended),
            running=self.running,
            held=len(self.leases),
            calls=self._calls,
            failed_calls=self._failed_calls,
            oldest_running_seconds=longest.seconds if longest else 0.0,
            longest=longest,
            outbox=self._outbox.statistics(),
        )
