"""One blob over the network: resumed, watched for silence, tried again for as long as trying can help."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Protocol

import trio

from xim_agent.backoff import Backoff
from xim_agent.cache.memory import Received
from xim_agent.metrics.histogram import Histogram
from xim_agent.metrics.names import FETCH_BYTES_PER_SECOND
from xim_agent.outcome import Action, RouterError

log = logging.getLogger("xim_agent.cache")

STALL = 30.0  # wire-protocol §1: blobs, seconds without a byte
_SUSPENDED = 30.0
_AGAIN = {Action.RETRY, Action.REFRESH, Action.CLOCK, Action.WAIT}


class Pieces(Protocol):
    """Bytes as they arrive; closing it ends the transfer."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...
    async def __anext__(self) -> bytes: ...
    async def aclose(self) -> None: ...


class BlobReply(Protocol):
    """`start`: offset of the first byte that comes; `total`: size of the blob where the router says it."""

    @property
    def status(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def total(self) -> int | None: ...
    def chunks(self) -> Pieces: ...


class BlobSource(Protocol):
    """The router, or whatever it redirects to. Both raise RouterError."""

    async def manifest(self, sha256_hex: str) -> bytes: ...
    def blob(self, sha256_hex: str, offset: int) -> AbstractAsyncContextManager[BlobReply]: ...


class WrongBlob(Exception):
    """What came cannot be the blob: too long, too short, or from the wrong place."""


@dataclass
class Counters:
    """Since the start of the process."""

    network_bytes: int = 0
    hit_bytes: int = 0  # stored bytes that were here already
    stalls: int = 0
    retries: int = 0
    wrong_blobs: int = 0
    speed: Histogram = field(default_factory=lambda: Histogram(FETCH_BYTES_PER_SECOND))


class Retry:
    """Waits between attempts for what the error says; an error that no waiting cures is raised again."""

    def __init__(
        self,
        backoff: Callable[[], Backoff],
        rand: Callable[[], float],
        counters: Counters,
        trouble: Callable[[str | None], None],
    ) -> None:
        self._backoff, self._rand, self._counters, self._trouble = backoff(), rand, counters, trouble

    def reset(self) -> None:
        if self._backoff.failures:
            self._backoff.reset()
            self._trouble(None)

    async def wait(self, error: RouterError) -> None:
        """Raises `error` unless its class is to try again."""
        if error.action not in _AGAIN:
            raise error
        delay = self._backoff.next(self._rand(), error.retry_after)
        delay = max(delay, _SUSPENDED) if error.action is Action.WAIT else delay
        self._counters.retries += 1
        self._trouble(error.message)
        first = self._backoff.failures == 1  # of many transfers that fail for long, one line each; the rest is counted
        extra = {"code": error.code, "error": error.message, "seconds": round(delay, 1)}
        log.log(logging.INFO if first else logging.DEBUG, "transfer failed, trying again", extra=extra)
        await trio.sleep(delay)


async def get_blob(
    source: BlobSource,
    digest: str,
    stored: int,
    retry: Retry,
    counters: Counters,
    arrived: Callable[[int], None],
    into: Received | None = None,
) -> memoryview:
    """`stored` bytes, not verified. `arrived` is told of every piece (negative when bytes are dropped to start over).

    `into`: empty memory for them, which the result is a view of.

    Raises WrongBlob, and RouterError where trying again cannot help. Cancellation drops what has come.
    """
    data = Received(bytearray(stored)) if into is None else into
    transfer = _Transfer(source, digest, stored, retry, counters, arrived, data)
    began = trio.current_time()
    try:
        view = await transfer.run()
        counters.speed.observe(stored / max(1e-6, trio.current_time() - began))
        return view
    except WrongBlob:
        arrived(-len(data))
        raise


@dataclass
class _Transfer:
    """`far`: how much of the blob was ever here. Only what lies beyond it is progress: a router that ignores Range and
    always breaks off at the same place is asked ever more seldom.
    """

    source: BlobSource
    digest: str
    stored: int
    retry: Retry
    counters: Counters
    arrived: Callable[[int], None]
    data: Received
    far: int = 0

    async def run(self) -> memoryview:
        while True:
            before = self.far
            try:
                await self._continue()
                short = RouterError("blob_short", f"a blob ended after {len(self.data)} of {self.stored} bytes")
            except RouterError as e:
                if e.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    raise WrongBlob(f"it ends before byte {len(self.data)} of {self.stored}") from e
                short = e
            else:
                # Without a length, the end is all that shows of a cut connection.
                if len(self.data) < self.stored and self.far == before:
                    raise WrongBlob(f"{len(self.data)} bytes instead of {self.stored}")
            if len(self.data) == self.stored:  # if nothing is missing but a clean end of the reply, all is well
                return self.data.view()
            await self.retry.wait(short)

    async def _continue(self) -> None:
        data = self.data
        async with self.source.blob(self.digest, len(data)) as reply:
            if reply.start > len(data) or reply.total not in (None, self.stored):
                raise WrongBlob(
                    f"{reply.total} bytes from {reply.start} are offered, {self.stored} from {len(data)} wanted"
                )
            self.arrived(reply.start - len(data))
            del data[reply.start :]
            async with aclosing(reply.chunks()) as pieces:
                while (piece := await _next(pieces, self.counters)) is not None:
                    if len(data) + len(piece) > self.stored:
                        raise WrongBlob(f"more than {self.stored} bytes")
                    data += piece
                    self.counters.network_bytes += len(piece)
                    self.arrived(len(piece))
                    if len(data) > self.far:
                        self.far = len(data)
                        self.retry.reset()


async def _next(pieces: Pieces, counters: Counters) -> bytes | None:
    """None at the end. Raises RouterError (class retry) when nothing comes for `STALL` seconds."""
    with trio.move_on_after(STALL):
        return await anext(pieces, None)
    counters.stalls += 1
    log.warning("transfer stalls", extra={"seconds": STALL})
    raise RouterError("blob_stalled", f"no byte of a blob for {STALL:.0f} s")
