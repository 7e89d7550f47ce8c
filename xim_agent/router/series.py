"""What the router saw of one agent during the last hour, in buckets of 10 s. Pure; seconds are monotonic.

A busy agent polls every second or so and an idle one every 25 s: 10 s are short enough to see a stall and give 360
points, as many as a chart on a phone has pixels. Memory is fixed: 19 KB per agent, 8 KB more where every kind of error
was seen (tests/router/test_series.py), so that 1,000 agents have 27 MB at most.
"""

import math
from array import array
from typing import Any

from xim_agent.mesh.messages import Load

SECONDS = 10.0
BUCKETS = 360
RATIO = 1.1  # of neighbouring bounds: a quantile is told with at most 4.9 % of error (`ERROR`)
ERROR = math.sqrt(RATIO) - 1
LEAST, MOST = 0.001, 1800.0  # seconds; what is outside counts as these. A request may take 1800 s
_SCALE = 1 / math.log(RATIO)
_BOUNDS = math.ceil(math.log(MOST / LEAST) * _SCALE) + 1

MEANS = ("tokens_per_s", "kv_usage")
PEAKS = ("running", "waiting")
TIMES = ("ttft_p50", "ttft_p99", "gap_p99")
COUNTS = ("ended", "errors")
CODES = (
    *("engine_lost", "engine_overloaded", "invalid_request", "draining", "internal"),
    *("deadline", "cancelled", "bad_answer", "response_too_large"),
)  # what is none of these counts as internal
_NAN = float("nan")


class Quantiles:
    """Durations counted between logarithmic bounds, so that one costs a logarithm and no memory."""

    def __init__(self) -> None:
        self._counts = array("Q", [0]) * _BOUNDS
        self.count = 0

    def add(self, seconds: float) -> None:
        place = int(math.log(seconds / LEAST) * _SCALE) if LEAST < seconds < MOST else 0 if seconds < MOST else -1
        self._counts[place] += 1
        self.count += 1

    def at(self, part: float) -> float:
        """The smallest duration that at least this part of all do not exceed, within ERROR; NaN while there is none."""
        left = max(1, math.ceil(part * self.count))
        for place, count in enumerate(self._counts):
            left -= count
            if left <= 0:
                return min(MOST, LEAST * math.pow(RATIO, place + 0.5))
        return _NAN

    def clear(self) -> None:
        self._counts = array("Q", [0]) * _BOUNDS
        self.count = 0


class Series:
    """Written with the time of each thing; a time that goes back counts as the newest there was.

    Rates and use of the KV cache are the mean of what the agent's polls said, `running` and `waiting` the most of it.
    """

    def __init__(self) -> None:
        self._columns = {n: array("f", [_NAN]) * BUCKETS for n in (*MEANS, *PEAKS, *TIMES)}
        self._columns |= {name: array("f", [0.0]) * BUCKETS for name in COUNTS}
        self._codes: dict[str, array[int]] = {}
        self._bucket = -1
        self._until = float("-inf")
        self._said = dict.fromkeys(MEANS, (0.0, 0))
        self._first, self._gaps = Quantiles(), Quantiles()

    def polled(self, load: Load, running: int, now: float) -> None:
        """`running`: the leases that the router counts. What an agent says senselessly is passed over."""
        place = self._place(now)
        for name in MEANS:
            value = getattr(load, name)
            if value is not None and 0 <= value < 1e9:
                total, count = self._said[name]
                self._said[name] = total + value, count + 1
                self._columns[name][place] = (total + value) / (count + 1)
        self._peak("running", place, running)
        if load.waiting is not None:
            self._peak("waiting", place, load.waiting)

    def _peak(self, name: str, place: int, value: int) -> None:
        column = self._columns[name]
        if not column[place] >= value:  # which is so of NaN
            column[place] = max(0, min(value, 1_000_000))

    def data(self, seconds: float, now: float, *, first: bool) -> None:
        """Data of a stream came, `seconds` after its lease (`first`) or after the data before."""
        if now >= self._until:
            self._roll(now)
        (self._first if first else self._gaps).add(seconds)

    def ended(self, code: str, now: float) -> None:
        """A lease ended; `code` empty: as it should."""
        place = self._place(now)
        self._columns["ended"][place] += 1
        if not code:
            return
        self._columns["errors"][place] += 1
        code = code if code in CODES else "internal"
        if code not in self._codes:
            self._codes[code] = array("H", [0]) * BUCKETS
        self._codes[code][place] = min(65535, self._codes[code][place] + 1)

    def report(self, now: float) -> dict[str, Any]:
        """`step` in seconds, `end`: how long ago the last bucket ends (negative: it is not over); a column for each
        name, oldest first, None where nothing was seen. `codes`: errors of the hour by code. JSON can hold all of it.
        """
        newest = self._place(now)
        self._settle(newest)
        columns: dict[str, list[float | None]] = {}
        for name, column in self._columns.items():
            ordered = [*column[newest + 1 :], *column[: newest + 1]]
            columns[name] = [None if math.isnan(v) else round(v, 4) for v in ordered]
        codes = {code: total for code, column in sorted(self._codes.items()) if (total := sum(column))}
        return {"step": SECONDS, "end": now - self._until, "columns": columns, "codes": codes}

    def _place(self, now: float) -> int:
        if now >= self._until:
            self._roll(now)
        return self._bucket % BUCKETS

    def _roll(self, now: float) -> None:
        """Closes the bucket, empties those that were passed over, and begins the one that it is."""
        bucket = math.floor(now / SECONDS)
        if self._bucket >= 0:
            self._settle(self._bucket % BUCKETS)
        for fresh in range(max(self._bucket + 1, bucket - BUCKETS + 1), bucket + 1):
            for name, column in self._columns.items():
                column[fresh % BUCKETS] = 0.0 if name in COUNTS else _NAN
            for counts in self._codes.values():
                counts[fresh % BUCKETS] = 0
        self._bucket, self._until = bucket, (bucket + 1) * SECONDS
        self._said = dict.fromkeys(MEANS, (0.0, 0))
        for quantiles in (self._first, self._gaps):
            if quantiles.count:
                quantiles.clear()

    def _settle(self, place: int) -> None:
        """What only the durations of the whole bucket tell."""
        if self._first.count:
            self._columns["ttft_p50"][place] = self._first.at(0.5)
            self._columns["ttft_p99"][place] = self._first.at(0.99)
        if self._gaps.count:
            self._columns["gap_p99"][place] = self._gaps.at(0.99)
