import socket
from dataclasses import dataclass
from functools import partial
from types import NoneType
from typing import Any, get_args, get_type_hints

import pytest
import trio
from fakes.metrics_port import OPEN, FakeAgent, Told, serving
from prometheus_client.parser import text_string_to_metric_families

from xim_agent.assignment.service import AssignmentStatistics
from xim_agent.cache.service import CacheStatistics
from xim_agent.cache.transfer import Counters
from xim_agent.engine.statistics import EngineStatistics
from xim_agent.engine.streams import Streams
from xim_agent.errors import AgentError, Exit
from xim_agent.identity.bearer import IdentityStatistics
from xim_agent.mesh.transport import ClientStatistics
from xim_agent.metrics.histogram import Histogram
from xim_agent.metrics.names import METRICS, Metric
from xim_agent.metrics.registry import Collector
from xim_agent.metrics.server import MetricsServer
from xim_agent.work.poller import WorkStatistics
from xim_agent.work.times import Times

REPORTS: dict[str, type] = {
    "identity": IdentityStatistics,
    "work": WorkStatistics,
    "mesh": ClientStatistics,
    "cache": CacheStatistics,
    "engine": EngineStatistics,
    "assignment": AssignmentStatistics,
}


def kind_at(report: type, path: str) -> Any:
    for name in path.split("."):
        report = get_type_hints(report)[name]
    return report


# Of these only histograms are shown.
TIMED: dict[str, Any] = {"times": Times(), "streams": Streams(), "transfers": Counters()}


@pytest.mark.parametrize("row", [r for r in METRICS if r.buckets], ids=lambda r: r.name)
def test_every_histogram_is_kept_with_the_buckets_of_the_table(row: Metric) -> None:
    kept = getattr(TIMED[row.part], row.attr)
    assert isinstance(kept, Histogram)
    assert kept.bounds == row.buckets == tuple(sorted(set(row.buckets)))
    assert row.name.endswith(("_seconds", "_per_second"))


@pytest.mark.parametrize("row", [r for r in METRICS if r.part in REPORTS], ids=lambda r: r.name)
def test_every_row_points_into_the_statistics_of_its_part(row: Any) -> None:
    kind = kind_at(REPORTS[row.part], row.attr)
    kinds = [k for k in get_args(kind) if k is not NoneType] or [kind]
    if row.labels:
        for _ in row.labels:
            of, kind = get_args(kind)
            assert of is str
        assert kind is int
    else:
        assert set(kinds) <= {int, float, bool}


def test_names_follow_prometheus_rules() -> None:
    names = [row.name for row in METRICS]
    assert {row.part for row in METRICS} == {*REPORTS, *TIMED, "agent", "health", "ready"}
    assert len(names) == len(set(names))
    assert all(name.startswith("xim_agent_") and name == name.lower() for name in names)
    assert all(row.help and not row.help.endswith(".") for row in METRICS)


@dataclass(frozen=True)
class FakeClient:
    calls: int = 7
    failures: Any = None
    bytes_sent: int = 1
    bytes_received: int = 2
    skew: float | None = None


def samples(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(text.decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_text_holds_gauges_counters_labels_and_leaves_out_what_is_unknown() -> None:
    client = FakeClient(failures={"timeout": 2, 'odd"one\n': 1})
    parts = {"agent": FakeAgent, "mesh": lambda: client, "health": lambda: {"clock_skew": 1}}
    found = samples(Collector(parts).text())
    assert found["xim_agent_info", (("protocol", "1"), ("version", "1.2.3"))] == 1
    assert found["xim_agent_start_time_seconds", ()] == 12.5
    assert found["xim_agent_condition", (("code", "clock_skew"),)] == 1
    assert found["xim_agent_router_calls_total", ()] == 7
    assert found["xim_agent_router_failures_total", (("code", 'odd"one\n'),)] == 1
    assert not [name for name, _ in found if "skew" in name and "condition" not in name]  # None: no sample
    assert not [name for name, _ in found if "cache" in name]  # that part was not given


def test_two_labels_are_a_mapping_in_a_mapping() -> None:
    @dataclass(frozen=True)
    class Report:
        evictions: Any
        fetch_rate: float | None = None

        def __getattr__(self, name: str) -> Any:
            return {} if name in ("tiers", "evicted_bytes") else 0

    report = Report({"ready": {"bound": 2, "operator": 1}, "chunks": {"disk": 3}})
    found = samples(Collector({"cache": lambda: report}).text())
    name = "xim_agent_cache_evictions_total"
    assert {labels: value for (n, labels), value in found.items() if n == name} == {
        (("kind", "ready"), ("reason", "bound")): 2,
        (("kind", "ready"), ("reason", "operator")): 1,
        (("kind", "chunks"), ("reason", "disk")): 3,
    }
    assert not [n for n, _ in found if n == "xim_agent_cache_fetch_bytes_per_second"], "None: no sample"


def test_statistics_are_read_at_the_scrape_and_not_kept() -> None:
    calls = iter(range(1, 10))
    collector = Collector({"mesh": lambda: FakeClient(calls=next(calls), failures={})})
    assert [samples(collector.text())["xim_agent_router_calls_total", ()] for _ in range(3)] == [1, 2, 3]


def test_a_report_without_the_attribute_is_an_error_and_no_silent_gap() -> None:
    with pytest.raises(AttributeError, match="bytes_used"):
        Collector({"cache": FakeClient}).text()


async def test_metrics_joins_the_agents_series_with_vllms() -> None:
    told = Told()
    async with serving(told) as client:
        told.engine = b'# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{model_name="m"} 3.0\n'
        reply = await client.get("/metrics")
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = samples(reply.content)
    assert found["vllm:num_requests_running", (("model_name", "m"),)] == 3
    assert found["xim_agent_start_time_seconds", ()] == 12.5


async def test_readyz_gives_every_reason_and_livez_does_not_care() -> None:
    told = Told()
    async with serving(told) as client:
        told.reasons = ["link: no poll answered yet", "engine: loading weights"]
        reply = await client.get("/readyz")
        assert reply.status_code == 503
        assert reply.text == "not ready: link: no poll answered yet\nnot ready: engine: loading weights\n"
        assert (await client.get("/livez")).status_code == 200
        told.reasons = []
        assert (await client.get("/readyz")).status_code == 200


async def test_status_is_json_of_the_parts() -> None:
    told = Told()
    async with serving(told) as client:
        told.status = {"agent": FakeAgent(), "address": ("127.0.0.1", 1), "error": OSError("gone")}
        reply = await client.get("/status")
    assert reply.json() == {
        "agent": {"version": "1.2.3", "protocol": 1, "started": 12.5},
        "address": ["127.0.0.1", 1],
        "error": "gone",
    }


async def test_only_reading_is_possible_and_other_paths_are_unknown() -> None:
    async with serving(Told()) as client:
        assert (await client.post("/metrics")).status_code == 405
        assert (await client.get("/")).status_code == 404


NOTHING: Any = {
    "collect": Collector({}), "ready": list, "status": dict, "engine_text": bytes, "redact": str
}  # fmt: skip


async def test_a_taken_port_is_an_error_for_people(free_port: int) -> None:
    server = MetricsServer(**NOTHING)
    with socket.create_server(("127.0.0.1", free_port)), pytest.raises(AgentError) as caught:
        await server.run("127.0.0.1", free_port)
    assert caught.value.code == "metrics_address"
    assert caught.value.exit_code == Exit.CONFIG
    assert str(free_port) in caught.value.message


async def test_the_port_is_free_again_after_cancellation(free_port: int) -> None:
    server = MetricsServer(**NOTHING)
    for _ in range(2):
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(server.run, "127.0.0.1", free_port))
            nursery.cancel_scope.cancel()


async def test_no_answer_has_a_secret_in_it() -> None:
    told = Told()
    told.reasons, told.status, told.engine = ["hunter2"], {"x": "hunter2"}, b"# HELP x hunter2\n"
    async with serving(told) as client:
        told.engine += b"# TYPE x gauge\nx 1.0\n"
        for path, accept in (("/metrics", "*/*"), ("/metrics", OPEN), ("/readyz", "*/*"), ("/status", "*/*")):
            text = (await client.get(path, headers={"accept": accept})).text
            assert "***" in text
            assert "hunter2" not in text
