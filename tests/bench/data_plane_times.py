"""When each piece of each answer was sent and came, in memory that the processes of the benchmark share.

One clock (CLOCK_MONOTONIC) for all of them, and nothing in the bytes that are measured.
"""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

DONE = 1  # `data: [DONE]` after the pieces


class Times:
    """`asked`, `crc`, `length`: by request; `sent`, `came`: by request and piece, 0 while it has not been."""

    def __init__(self, path: Path, requests: int, pieces: int) -> None:
        """`pieces`: the most that an answer has; the last of them is `[DONE]`."""
        self.requests, self.pieces = requests, pieces + DONE
        size = 8 * requests * (3 + 2 * self.pieces)
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(fd, size)
        values = memoryview(mmap.mmap(fd, size)).cast("d")
        os.close(fd)
        n, m = requests, requests * self.pieces
        self.asked, self.crc, self.length = values[:n], values[n : 2 * n], values[2 * n : 3 * n]
        self.sent, self.came = values[3 * n : 3 * n + m], values[3 * n + m :]

    def delays(self, begin: float, end: float) -> "Delays":
        """Of the pieces that came between two moments."""
        found = Delays()
        for request in range(self.requests):
            base = request * self.pieces
            last_sent = last_came = 0.0
            for at in range(base, base + int(self.length[request])):
                came, sent = self.came[at], self.sent[at]
                if not came:
                    break
                if begin <= came < end:
                    if last_came:
                        found.gap.append(max(0.0, (came - last_came) - (sent - last_sent)))
                    else:
                        found.first.append(came - self.asked[request])
                    if sent:
                        found.hop.append(came - sent)
                last_sent, last_came = sent, came
        return found

    def count(self, begin: float, end: float) -> int:
        return sum(begin <= came < end for came in self._all())

    def _all(self) -> Iterator[float]:
        return iter(self.came)


class Delays:
    """Seconds. `first`: from the request to the first piece; `gap`: how much later than the engine's own gap the next
    piece came; `hop`: from the engine's send to us."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.gap: list[float] = []
        self.hop: list[float] = []

    def shown(self) -> dict[str, float]:
        return {f"{name}{q}": share(getattr(self, name), q / 100) for name in ("first", "gap", "hop") for q in (50, 99)}


def share(values: list[float], quantile: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * quantile))] if ordered else float("nan")
