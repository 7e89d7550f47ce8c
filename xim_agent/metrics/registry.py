"""Statistics of the parts → Prometheus text. Asks the parts only when somebody scrapes; keeps no numbers itself."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, Exemplar, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.utils import floatToGoString

from xim_agent.metrics.histogram import Histogram
from xim_agent.metrics.names import METRICS, Metric

Parts = Mapping[str, Callable[[], Any]]


class Collector:
    """`parts`: name → `statistics`, with the names of `rows`; a part that is left out has no series.

    Raises AttributeError at the scrape when a report lacks what the table says: a bug, seen by the test of the table.
    """

    def __init__(self, parts: Parts, rows: Sequence[Metric] = METRICS) -> None:
        self._parts = parts
        self._rows = rows

    def collect(self) -> Iterator[Family]:
        reports = {name: report() for name, report in self._parts.items()}
        for row in self._rows:
            if row.part in reports:
                yield _family(row, reports[row.part])

    def text(self) -> bytes:
        """Text exposition format 0.0.4, which knows no exemplars."""
        return generate_latest(self._registry())

    def openmetrics(self) -> bytes:
        """OpenMetrics 1.0, exemplars included."""
        text: bytes = openmetrics.generate_latest(self._registry())  # type: ignore[no-untyped-call]
        return text

    def _registry(self) -> CollectorRegistry:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return registry


def _family(row: Metric, report: Any) -> Family:
    if row.buckets:
        return _histogram(row, reduce(getattr, row.attr.split("."), report))
    kind = CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily
    family = kind(row.name, row.help, labels=row.labels)
    for labels, number in _samples(row, report):
        family.add_metric(labels, number)
    return family


def _histogram(row: Metric, value: Histogram) -> Family:
    assert value.bounds == row.buckets, row.name
    family = HistogramMetricFamily(row.name, row.help, labels=())
    buckets: list[tuple[str, float, Exemplar | None]] = []
    total = 0
    for n, bound in enumerate((*value.bounds, float("inf"))):
        total += value.counts[n]
        last = value.exemplars.get(n)
        exemplar = Exemplar({"trace_id": last[1]}, last[0]) if last else None
        buckets.append((floatToGoString(bound), total, exemplar))  # type: ignore[no-untyped-call]
    family.add_metric((), buckets, value.sum)  # type: ignore[arg-type]  # None for no exemplar is what it keeps
    return family


def _samples(row: Metric, report: Any) -> list[tuple[list[str], float]]:
    if row.info:
        return [([str(getattr(report, label)) for label in row.labels], 1.0)]
    value = reduce(getattr, row.attr.split("."), report) if row.attr else report
    if value is None:
        return []
    return list(_labelled(value, len(row.labels)))


def _labelled(value: Any, labels: int) -> Iterator[tuple[list[str], float]]:
    if labels == 0:
        yield [], float(value)
        return
    for key, inner in sorted(value.items()):
        for rest, number in _labelled(inner, labels - 1):
            yield [str(key), *rest], number
