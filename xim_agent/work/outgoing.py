"""One lease's way back to the router: its request task writes here, the router's cancels and credits arrive here."""

import logging
from collections.abc import Callable
from typing import Any, Literal

import trio

from xim_agent.mesh.messages import End, EndReason, Error, Head, Lease
from xim_agent.work.outbox import Outbox
from xim_agent.work.tail import Tail
from xim_agent.work.times import Times

log = logging.getLogger("xim_agent.work")

RequestPhase = Literal["waiting", "prefill", "streaming", "ending"]
Verdict = EndReason | Error | Literal["unknown"]


class Outgoing:
    """`scope` holds the request's work and ends at the deadline; `verdict` says why it was cancelled before."""

    def __init__(
        self,
        lease: Lease,
        outbox: Outbox,
        *,
        stir: Callable[[], None],
        done: Callable[["Outgoing", str], None],
        times: Times,
    ) -> None:
        self.id = lease.id
        self.request = lease.request
        self.path = lease.path
        self.received = trio.current_time()
        self.trace = ""
        self.status: int | None = None
        self._asked: float | None = None
        self._replied: float | None = None
        self._last: float | None = None
        self.scope = trio.CancelScope(deadline=self.received + max(0, lease.deadline_ms) / 1000)
        self.verdict: Verdict | None = None
        # Of an event stream: what is looked at when it has ended.
        self.tail: Tail | None = None
        self.events = False  # the answer is an event stream
        self._outbox = outbox
        self._stir = stir
        self._done = done
        self._times = times
        self._credit = trio.Event()
        self._first: float | None = None
        self._ended = False
        self._rest = b""
        outbox.open(lease.id, lease.credit)

    @property
    def untouched(self) -> bool:
        """No data was sent, so that another agent may serve the request."""
        return self._first is None

    def asks(self, traceparent: str) -> None:
        """The engine is asked now."""
        self._asked, self.trace = trio.current_time(), traceparent.split("-")[1]
        self._times.queue.observe(self._asked - self.received, self.trace)

    def head(self, status: int, headers: dict[str, str]) -> None:
        self._replied, self.status = trio.current_time(), status
        self.events = headers.get("content-type", "").startswith("text/event-stream")
        if self._outbox.head(self.id, Head(status, headers)):
            self._stir()

    def take(self, piece: bytes) -> bool:
        """Numbers what the credit allows and keeps the rest; False while there is a rest. Synchronous."""
        if self.tail is not None:
            self.tail.add(piece)
        if self._rest:
            self._rest += piece
            return False
        size, earlier = self._outbox.data(self.id, piece)
        # The clock costs as much as all else here.
        if self._first is None or log.isEnabledFor(logging.DEBUG):
            self._last = trio.current_time()
            if size and self._first is None:
                self._first = self._last
                if self.events:
                    self._times.first.observe(self._first - self.received, self.trace)
        if earlier:
            self._stir()
        if size == len(piece):
            return True
        self._rest = piece[size:]
        return False

    async def room(self) -> None:
        """Until there is no rest. Cancellation leaves what was numbered to be sent, and drops what was not."""
        while self._rest:
            if not self._outbox.room(self.id):
                self._credit = trio.Event()
                await self._credit.wait()
            rest, tail, self._rest, self.tail = self._rest, self.tail, b"", None
            self.take(rest)
            self.tail = tail

    def credited(self) -> None:
        self._credit.set()

    def abort(self, verdict: Verdict) -> None:
        """The first verdict holds; the engine's connection is closed before the task runs again."""
        if self.verdict is None:
            self.verdict = verdict
            self.scope.cancel()

    def ending(self, reason: EndReason) -> End:
        sent, chunks = self._outbox.totals(self.id)
        return End(
            reason=reason,
            bytes=sent,
            chunks=chunks,
            ttft_ms=None if self._first is None else round((self._first - self.received) * 1000),
            duration_ms=round((trio.current_time() - self.received) * 1000),
        )

    def hops(self) -> dict[str, Any]:
        """For one line of the log: nothing of the content, times in ms since the lease came, None for what was not."""
        sent, chunks = self._outbox.totals(self.id)
        times = {"asked": self._asked, "replied": self._replied, "first": self._first, "last": self._last}
        times["ended"] = trio.current_time()
        told = {
            "request": self.request,
            "lease": self.id,
            "trace": self.trace,
            "path": self.path,
            "status": self.status,
        }
        return {**told, "bytes": sent, "chunks": chunks} | {
            f"{name}_ms": None if when is None else self.since_received(when) for name, when in times.items()
        }

    def since_received(self, when: float) -> float:
        """Milliseconds."""
        return round((when - self.received) * 1000, 1)

    @property
    def sent(self) -> int:
        """Bytes of the answer, given to the router or about to be."""
        return self.totals[0]

    @property
    def totals(self) -> tuple[int, int]:
        """Bytes of the answer so far, and the chunks they came in."""
        return self._outbox.totals(self.id)

    @property
    def phase(self) -> RequestPhase:
        """`waiting` for its body, `prefill` until there is data, `ending` until the router has acknowledged the end."""
        if self._ended:
            return "ending"
        if self._asked is None:
            return "waiting"
        return "prefill" if self._first is None else "streaming"

    def end(self, ending: End | Error) -> None:
        """The one ending; a second one changes nothing. Synchronous, so that a cancelled task can still say it."""
        if self._ended:
            return
        self._ended = True
        self.tail = None
        told = self._outbox.end(self.id, ending)
        self._times.duration.observe(trio.current_time() - self.received, self.trace)
        name = ending.reason if isinstance(ending, End) else ending.code
        self._done(self, name if told else "unknown")
        self._stir()
