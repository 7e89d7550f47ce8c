"""The last hour of an agent: quantiles within the stated error, fixed memory, gaps, clocks that jump."""

import json
import math
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xim_agent.mesh.messages import Load
from xim_agent.router.series import BUCKETS, CODES, ERROR, LEAST, MOST, SECONDS, Quantiles, Series

SPAN = BUCKETS * SECONDS


def column(series: Series, name: str, now: float) -> list[float | None]:
    found: list[float | None] = series.report(now)["columns"][name]
    return found


def filled(series: Series, name: str, now: float) -> dict[int, float]:
    """What is there by age in buckets, 0 the newest."""
    return {BUCKETS - 1 - i: v for i, v in enumerate(column(series, name, now)) if v}


@given(
    st.lists(st.floats(LEAST * 1.01, MOST * 0.99), min_size=1, max_size=200),
    st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]),
)
def test_quantiles_are_within_the_stated_error(values: list[float], part: float) -> None:
    counted = Quantiles()
    for value in values:
        counted.add(value)
    exact = sorted(values)[max(1, math.ceil(part * len(values))) - 1]
    assert abs(counted.at(part) / exact - 1) <= ERROR * 1.001


@pytest.mark.parametrize("value", [-1.0, 0.0, 1e-9, MOST, 1e300, float("inf"), float("nan")])
def test_senseless_durations_count_as_the_nearest(value: float) -> None:
    counted = Quantiles()
    counted.add(value)
    assert LEAST <= counted.at(0.5) <= MOST


def test_bounds_of_the_quantiles_are_used() -> None:
    short, long = Quantiles(), Quantiles()
    short.add(0.0)
    long.add(1e9)
    assert short.at(1.0) < LEAST * 1.1
    assert long.at(1.0) > MOST / 1.1


def test_what_polls_say_is_averaged_and_peaks_are_kept() -> None:
    series = Series()
    for tokens, kv, running, waiting in ((10.0, 0.25, 3, 5), (20.0, 0.75, 1, None)):
        series.polled(Load(None, waiting, kv, tokens), running, 1001.0)
    series.polled(Load(), 2, 1009.0)
    found = {name: filled(series, name, 1009.0) for name in ("tokens_per_s", "kv_usage", "running", "waiting")}
    assert found == {"tokens_per_s": {0: 15.0}, "kv_usage": {0: 0.5}, "running": {0: 3.0}, "waiting": {0: 5.0}}


def test_idle_is_zero_and_unheard_is_nothing() -> None:
    series = Series()
    series.polled(Load(0, 0, 0.0, 0.0), 0, 1000.0)
    newest = {name: values[-1] for name, values in series.report(1000.0)["columns"].items()}
    assert newest == {
        **dict.fromkeys(("tokens_per_s", "kv_usage", "running", "waiting", "ended", "errors"), 0.0),
        **dict.fromkeys(("ttft_p50", "ttft_p99", "gap_p99")),
    }


@given(st.lists(st.tuples(st.floats(0, 2 * SPAN), st.sampled_from(["", "engine_lost", "x"])), max_size=40))
def test_buckets_are_those_of_the_last_hour(found: list[tuple[float, str]]) -> None:
    series, times = Series(), sorted(found)
    for at, code in times:
        series.ended(code, at)
    now = max([at for at, _ in times], default=0.0)
    ages = [(math.floor(now / SECONDS) - math.floor(at / SECONDS), code) for at, code in times]
    for name, counted in (("ended", ages), ("errors", [a for a in ages if a[1]])):
        kept = [age for age, _ in counted if age < BUCKETS]
        assert filled(series, name, now) == {age: kept.count(age) for age in kept}
    codes = [code for age, code in ages if age < BUCKETS]
    want = {"engine_lost": codes.count("engine_lost"), "internal": codes.count("x")}
    assert series.report(now)["codes"] == {code: n for code, n in want.items() if n}


@pytest.mark.parametrize("gap", [SECONDS * 3, SPAN - SECONDS, SPAN, SPAN * 1000])
def test_after_a_gap_nothing_old_is_taken_for_new(gap: float) -> None:
    series = Series()
    series.polled(Load(1, 1, 0.5, 9.0), 1, 0.0)
    series.data(1.0, 0.0, first=True)
    series.polled(Load(1, 1, 0.5, 4.0), 1, gap)
    kept = {0: 4.0} | ({round(gap / SECONDS): 9.0} if gap < SPAN else {})
    assert filled(series, "tokens_per_s", gap) == kept
    assert len(filled(series, "ttft_p99", gap)) == (1 if gap < SPAN else 0), "and it is no time of the newest bucket"
    assert 0 not in filled(series, "ttft_p99", gap)


def test_a_clock_that_goes_back_spoils_nothing() -> None:
    series = Series()
    series.ended("", 5000.0)
    series.ended("", 100.0)
    series.data(0.5, -1e9, first=False)
    assert filled(series, "ended", 5000.0) == {0: 2}
    assert len(filled(series, "gap_p99", 0.0)) == 1


NUMBERS = st.one_of(st.none(), st.floats(), st.integers(-(2**63), 2**64 - 1))


@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), max_size=10))
def test_no_poll_breaks_a_chart(loads: list[tuple[Any, Any, Any]]) -> None:
    series = Series()
    for number, (waiting, kv, tokens) in enumerate(loads):
        series.polled(Load(None, waiting if isinstance(waiting, int) else None, kv, tokens), 0, number * 5.0)
        report = json.loads(json.dumps(series.report(number * 5.0), allow_nan=False))
        assert all(v is None or 0 <= v <= 1e9 for values in report["columns"].values() for v in values)


def test_memory_is_fixed() -> None:
    """The numbers of the module's docstring."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        many = [Series() for _ in range(20)]
        for series in many:
            for at in (1.0, SPAN):
                series.polled(Load(3, 5, 0.3, 1e6), 4, at)
                series.data(0.3, at, first=True)
        plain = (tracemalloc.get_traced_memory()[0] - before) / 20
        for series in many:
            for number in range(3000):
                series.ended(CODES[number % len(CODES)], SPAN + number)
                series.ended(f"made up {number}", SPAN + number)
                series.data(number / 100, SPAN + number, first=False)
        worst = (tracemalloc.get_traced_memory()[0] - before) / 20
    finally:
        tracemalloc.stop()
    assert plain < 19_000
    assert worst < 27_000
