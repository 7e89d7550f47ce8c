"""What the histograms count, from a value up to real answers over the whole data path in virtual time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trio
from fakes.agent import until
from fakes.data_path import DataPath, data_path
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse_classic

from xim_agent.mesh.trace import trace_id, traced
from xim_agent.metrics.histogram import Histogram
from xim_agent.metrics.names import METRICS
from xim_agent.metrics.registry import Collector
from xim_agent.router.jobs import Limits

BOUNDS = {row.attr: row.buckets for row in METRICS if row.buckets}
TRACE = trace_id(traced({}, "r1")["traceparent"])


@given(st.lists(st.floats(-1, 1e9)), st.lists(st.floats(0, 1e6), min_size=1, max_size=9, unique=True))
def test_a_value_counts_in_the_first_bucket_that_holds_it(values: list[float], bounds: list[float]) -> None:
    histogram = Histogram(tuple(sorted(bounds)))
    for value in values:
        histogram.observe(value)
    added = [sum(histogram.counts[: n + 1]) for n in range(len(bounds))]
    assert added == [sum(max(0, v) <= bound for v in values) for bound in histogram.bounds]
    assert sum(histogram.counts) == len(values)
    assert histogram.sum >= 0


def collector(histogram: Histogram) -> Collector:
    class Report:
        queue = first = duration = call = histogram

    rows = [row for row in METRICS if row.name == "xim_agent_queue_seconds"]
    return Collector({"times": Report}, rows)


def test_both_formats_add_the_buckets_up_and_one_has_exemplars() -> None:
    histogram = Histogram(BOUNDS["queue"])
    for value, trace in ((0.0005, ""), (0.003, "a" * 32), (0.004, "b" * 32), (99.0, "c" * 32)):
        histogram.observe(value, trace)
    expected = {"0.001": 1, "0.002": 1, "0.005": 3, "30.0": 3, "+Inf": 4}
    for text, parse in ((collector(histogram).text(), parse_classic), (collector(histogram).openmetrics(), parse_open)):
        [family] = parse(text.decode())
        assert family.type == "histogram"
        found = {s.labels.get("le", s.name): s for s in family.samples}
        assert {le: found[le].value for le in expected} == expected
        assert found["xim_agent_queue_seconds_count"].value == 4
        assert found["xim_agent_queue_seconds_sum"].value == 99.0075
        told = {le: s.exemplar.labels["trace_id"] for le, s in found.items() if s.exemplar}
        assert told == ({} if parse is parse_classic else {"0.005": "b" * 32, "+Inf": "c" * 32}), "the last of each"


def buckets(histogram: Histogram) -> dict[float, int]:
    """How many, by the bucket's upper bound; without empty ones."""
    bounds = (*histogram.bounds, float("inf"))
    return {bound: n for bound, n in zip(bounds, histogram.counts, strict=True) if n}


def paused(*seconds: float) -> Any:
    """A script of an engine: one event after each pause."""

    def script(body: bytes) -> Iterator[tuple[float, bytes]]:
        for number, pause in enumerate(seconds):
            yield pause, b"data: %d\n\n" % number
        yield 0.0, b"data: [DONE]\n\n"

    return script


async def answered(path: DataPath, *seconds: float) -> None:
    path.engine.script = paused(*seconds)
    client = await path.ask(b"{}")
    await path.flushed()
    assert client.data.endswith(b"[DONE]\n\n")


async def test_an_answer_is_timed_from_its_lease_to_its_end(autojump_clock: Any, tmp_path: Path) -> None:
    async with data_path(tmp_path) as path:
        await answered(path, 3.0, 0.08, 0.08, 0.4, 7.0)
        times = path.agent.sender.times
        assert buckets(times.first) == {5.0: 1}
        assert buckets(times.duration) == {30.0: 1}
        assert sum(times.queue.counts) == 1
        assert times.queue.sum < 1, "nothing had to be waited for"
        # What follows the last pause at once may be a piece of its own.
        gaps = buckets(path.view.client.streams.gaps)
        assert {bound: n for bound, n in gaps.items() if bound > 0.05} == {0.1: 2, 0.5: 1, 10.0: 1}
        assert 10.5 <= times.duration.sum <= 12
        assert 2.9 <= times.first.sum <= 3.5
        for histogram in (times.first, times.duration, times.queue):
            assert [trace for _, trace in histogram.exemplars.values()] == [TRACE]
        slow = path.view.client.streams.gaps.exemplars
        assert [trace for _, trace in slow.values()] == [TRACE, TRACE], "of what was slow, and of nothing else"
        assert times.call.sum < sum(times.call.counts) * 0.1, "events calls, which nobody holds"
        assert sum(times.call.counts) == path.agent.statistics.calls - path.agent.statistics.failed_calls


async def test_an_answer_that_is_no_stream_has_no_first_token(autojump_clock: Any, tmp_path: Path) -> None:
    async with data_path(tmp_path) as path:
        path.engine.head = path.engine.head.replace(b"text/event-stream", b"application/json")
        await answered(path, 1.0, 1.0)
        assert buckets(path.agent.sender.times.first) == {}
        assert buckets(path.view.client.streams.gaps) == {}
        assert buckets(path.agent.sender.times.duration) == {2.5: 1}


async def test_a_first_token_that_waits_for_credit_counts_when_it_leaves(autojump_clock: Any, tmp_path: Path) -> None:
    async with data_path(tmp_path, limits=Limits(window=0)) as path:
        path.engine.script = paused(0.1, 0.1)
        with trio.move_on_after(15):
            await path.ask(b"{}")
        times = path.agent.sender.times
        assert sum(times.first.counts) == 0, "no credit ever came"
        [out] = path.agent.sender._running.values()
        path.agent.sender.apply({out.id: 1000}, ())
        await until(lambda: sum(times.first.counts))
        assert buckets(times.first) == {20.0: 1}


async def test_a_slow_client_is_no_slow_engine(autojump_clock: Any, tmp_path: Path) -> None:
    """While the credit is used up nobody reads, which is no delay between tokens."""
    async with data_path(tmp_path) as path:
        piece = b"data: " + b"x" * 60_000 + b"\n\n"

        def script(body: bytes) -> Iterator[tuple[float, bytes]]:
            yield from ((0.03, piece) for _ in range(40))

        path.engine.script = script
        await path.ask(b"{}", read=lambda taken: 0.0 if taken < 200_000 or taken > 500_000 else 40.0)
        await path.flushed()
        assert max(buckets(path.agent.sender.times.duration)) >= 60, "it did wait"
        assert max(buckets(path.view.client.streams.gaps)) <= 1.0
