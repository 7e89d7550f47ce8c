"""An engine in the test's own process: event streams over a Unix socket, known byte for byte from a request's body."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import trio
from fakes.tcp_faults import BROKEN, Left, Wire

WORDS = ("the", "größer", "naïve", "日本語", "🙂", "of", "a", "Ω", "\\n", "token")
HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n"
)


def answer(body: bytes) -> list[bytes]:
    """The chunks, cut anywhere: inside of events and of characters."""
    dice = random.Random(body)
    tokens = [" ".join(dice.choices(WORDS, k=dice.randint(1, 12))) for _ in range(dice.randint(0, 12))]
    if dice.random() < 0.02:
        tokens.append("long " * 40_000)
    text = "".join(f'data: {{"n": {n}, "text": "{token}"}}\n\n' for n, token in enumerate(tokens)) + "data: [DONE]\n\n"
    whole = text.encode()
    cuts = sorted({0, len(whole), *(dice.randrange(len(whole)) for _ in tokens)})
    return [whole[a:b] for a, b in pairwise(cuts)]


def paced(body: bytes) -> Iterator[tuple[float, bytes]]:
    """(seconds before it, chunk); an empty chunk is a pause."""
    dice = random.Random(body + b"!")
    for chunk in answer(body):
        yield dice.choice((0.0, 0.005, 0.02, 0.1)), chunk


class SseEngine:
    """`script`: what is said to a body. `sent`: bytes of answers that a connection has taken, by body."""

    def __init__(self, path: Path, script: Callable[[bytes], Iterator[tuple[float, bytes]]] = paced) -> None:
        self.path = path
        self.script = script
        self.head = HEAD
        self.sent: Counter[bytes] = Counter()
        self.asked: Counter[bytes] = Counter()
        self.open_now = 0
        self._scope = trio.CancelScope()

    async def run(  # noqa: ASYNC128
        self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Until it is killed or cancelled."""
        self.path.unlink(missing_ok=True)
        with trio.CancelScope() as self._scope, trio.socket.socket(trio.socket.AF_UNIX) as listening:
            await listening.bind(str(self.path))
            listening.listen(1024)
            await trio.serve_listeners(
                self._connection,
                [trio.SocketListener(listening)],
                task_status=task_status,  # type: ignore[arg-type]
            )

    def kill(self) -> None:
        """All of its connections end at once, wherever they are."""
        self._scope.cancel()

    async def _connection(self, stream: trio.SocketStream) -> None:
        self.open_now += 1
        try:
            body = (await Wire(stream).message()).partition(b"\r\n\r\n")[2]
            self.asked[body] += 1
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._left, stream, nursery.cancel_scope)
                with suppress(*BROKEN):
                    await self._answer(stream, body)
                nursery.cancel_scope.cancel()
        except (Left, *BROKEN):
            pass
        finally:
            self.open_now -= 1
            stream.socket.close()

    async def _answer(self, stream: trio.SocketStream, body: bytes) -> None:
        await stream.send_all(self.head)
        for seconds, chunk in self.script(body):
            if seconds:
                await trio.sleep(seconds)
            if not chunk:
                continue
            await stream.send_all(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            self.sent[body] += len(chunk)
        await stream.send_all(b"0\r\n\r\n")

    async def _left(self, stream: trio.SocketStream, scope: trio.CancelScope) -> None:
        """As vLLM does: a request whose connection is closed is aborted."""
        with suppress(*BROKEN):
            while await stream.receive_some(1024):
                pass
        scope.cancel()
