"""What both drivers share: requests of known number, a warm-up, a window in which is measured, a report at the end."""

import json
import os
import random
import time
from dataclasses import dataclass, field
from typing import Any

from data_plane_times import Times

WARM_UP = 2.0
RAMP = 1.0


@dataclass
class Load:
    """`streams` requests run at any time; the first ones are shorter, so that their successors do not begin at once."""

    times: Times
    streams: int
    pieces: int
    seconds: float
    given: int = 0
    whole: int = 0
    wrong: int = 0
    wire: int = 0
    chunks: int = 0
    # Of real vLLM; then nothing is known of when it sent what.
    model: str = field(default_factory=lambda: os.environ.get("XIM_BENCH_MODEL", ""))
    began: float = field(default_factory=time.monotonic)
    dice: random.Random = field(default_factory=lambda: random.Random(2))

    def body(self) -> tuple[int, bytes]:
        """The next request's number and body."""
        n, self.given = self.given, self.given + 1
        pieces = self.dice.randint(2, self.pieces) if n < self.streams else self.pieces
        messages = [{"role": "user", "content": f"Tell me about {self.dice.random()}."}]
        asked: dict[str, Any] = {"model": self.model or "toy", "stream": True, "messages": messages}
        if self.model:
            # With the first event, which names the role, and the last one, which names the reason, it has all slots.
            asked |= {"max_tokens": max(1, pieces - 2), "ignore_eos": True}
            self.times.length[n] = pieces
        else:
            asked |= {"n": n, "pieces": pieces}
        self.times.asked[n] = time.monotonic()
        return n, json.dumps(asked).encode()

    def due(self, running: int) -> bool:
        """Whether one more may begin: all of them within the ramp."""
        now = time.monotonic() - self.began
        most = self.streams * min(1.0, now / RAMP)
        return running < most and now < WARM_UP + self.seconds and self.given < self.times.requests

    def piece(self, n: int, at: int, count: int, now: float) -> None:
        """Pieces `at` to `at + count` of request `n` came."""
        base = n * self.times.pieces + at
        for i in range(base, min(base + count, (n + 1) * self.times.pieces)):
            self.times.came[i] = now
        self.chunks += count

    @property
    def window(self) -> tuple[float, float]:
        begin = self.began + WARM_UP
        return begin, begin + self.seconds

    def tell(self, what: str) -> None:
        print(json.dumps({what: time.monotonic(), "chunks": self.chunks, "wire": self.wire}), flush=True)

    def report(self) -> None:
        delays = self.times.delays(*self.window)
        print(json.dumps({"report": delays.shown(), "whole": self.whole, "wrong": self.wrong}), flush=True)
