"""Statistics of the parts → Prometheus text. Asks the parts only when somebody scrapes; keeps no numbers itself."""

from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family

from xim_agent.metrics.names import METRICS, Metric

Parts = Mapping[str, Callable[[], Any]]


class Collector:
    """`parts`: name → `statistics`, with the names of `METRICS`; a part that is left out has no series.

    Raises AttributeError at the scrape when a report lacks what the table says: a bug, seen by the test of the table.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def collect(self) -> Iterator[Family]:
        reports = {name: report() for name, report in self._parts.items()}
        for row in METRICS:
            if row.part in reports:
                yield _family(row, reports[row.part])

    def text(self) -> bytes:
        """Text exposition format 0.0.4."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)


def _family(row: Metric, report: Any) -> Family:
    kind = CounterMetricFamily if row.is_counter else GaugeMetricFamily
    family = kind(row.name, row.help, labels=row.labels)
    for labels, number in _samples(row, report):
        family.add_metric(labels, number)
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
