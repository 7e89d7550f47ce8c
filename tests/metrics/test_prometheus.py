"""The shipped rules and what we expose, by Prometheus' own tools and a real server."""

import json
import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from fakes.monitoring import PLACE, Prometheus, prometheus, queries, rules
from fakes.scripted import Scripted, serving
from fakes.stack import free_port
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.openmetrics.exposition import generate_latest as generate_open

from xim_agent.metrics.histogram import Histogram
from xim_agent.metrics.names import METRICS, ROUTER_METRICS
from xim_agent.metrics.registry import _histogram
from xim_agent.metrics.server import MetricsServer

pytestmark = pytest.mark.full

VLLM = Path(__file__).with_name("vllm-0.32.prom").read_bytes()
TRACE = "0af7651916cd43dd8448eb211c80319c"


def series(name: str, **labels: str) -> str:
    where = {"job": "xim-router" if "router_" in name[:11] else "xim-agent", "instance": "a:9094"} | labels
    return name + "{" + ", ".join(f'{key}="{value}"' for key, value in where.items()) + "}"


def first_token(slow: int) -> dict[str, str]:
    """So many of 100 requests a minute take 15 s, the rest half a second."""
    found = {bound: 100 if float(bound) > 10 else 100 - slow for bound in ("0.5", "10.0", "20.0", "+Inf")}
    return {series("xim_agent_first_token_seconds_bucket", le=le): f"0+{n}x120" for le, n in found.items()}


def ended(**reasons: int) -> dict[str, str]:
    return {series("xim_agent_leases_ended_total", reason=reason): f"0+{n}x120" for reason, n in reasons.items()}


def at_router(**endings: int) -> dict[str, str]:
    return {series("xim_router_requests_total", ending=ending): f"0+{n}x120" for ending, n in endings.items()}


def fetch(done: str) -> dict[str, str]:
    return {series("xim_agent_cache_fetch_done_bytes"): done, series("xim_agent_cache_fetch_total_bytes"): "1e9+0x120"}


def fleet(**states: int) -> dict[str, str]:
    return {series("xim_router_agents", state=state): f"{n}+0x120" for state, n in states.items()}


# A minute apart. What runs well for two hours, a model that is being fetched included.
HEALTHY: dict[str, str] = {
    series("up"): "1+0x120",
    series("up", job="xim-router"): "1+0x120",
    series("xim_agent_ready"): "0+0x20 1+0x100",
    series("xim_agent_link_up"): "1+0x30 0 1+0x90",
    series("xim_agent_token_expiry_seconds"): "3600+0x29 5400+0x29 7200+0x29 9000+0x29",
    series("xim_agent_engine_degraded"): "0+0x120",
    series("xim_agent_engine_failures_total"): "0+0x60 2+0x60",
    series("xim_agent_cache_bytes"): "5e9+0x120",
    series("xim_agent_cache_bound_bytes"): "10e9+0x120",
    series("xim_agent_cache_evictions_total", kind="ready", reason="bound"): "0+0x60 2+0x60",
    series("xim_agent_cache_last_eviction_age_seconds"): "60+0x120",
    series("xim_agent_cache_disk_free_bytes"): "9e9+0x120",
    **fetch("0+1e6x120"),
    series("xim_agent_router_clock_skew_seconds"): "-0.5+0x120",
    **ended(complete=95, cancelled=10, invalid_request=50, engine_lost=2),
    **first_token(0),
    series("xim_agent_unacknowledged_bytes"): "1e6+0x120",
    series("xim_agent_draining"): "0+0x50 1+0x5 0+0x65",
    series("xim_agent_leases_running"): "3+0x120",
    **fleet(online=3, draining=1, disconnected=0, dead=0),
    series("xim_router_oldest_queued_seconds"): "0.2+0x120",
    **at_router(complete=100, left=20, capacity_exceeded=2),
}
SICK: dict[str, dict[str, str]] = {
    "XimAgentDown": {series("up"): "0+0x120"},
    "XimAgentNotReady": {series("xim_agent_ready"): "0+0x120"},
    "XimAgentLinkDown": {series("xim_agent_link_up"): "0+0x120"},
    "XimAgentCredentialEnds": {series("xim_agent_token_expiry_seconds"): "3600+0x120"},
    "XimAgentEngineDegraded": {series("xim_agent_engine_degraded"): "1+0x120"},
    "XimAgentEngineCrashLoop": {series("xim_agent_engine_failures_total"): "0+0x50 1 2 3 4 4+0x60"},
    "XimAgentGpuTrouble": {series("xim_agent_condition", code="gpu_lost"): "1+0x120"},
    "XimAgentCacheNearBound": {series("xim_agent_cache_bytes"): "9.9e9+0x120"},
    "XimAgentCacheThrash": {series("xim_agent_cache_evictions_total", kind="ready", reason="bound"): "0+0x10 0+1x110"},
    "XimAgentDiskLow": {series("xim_agent_cache_disk_free_bytes"): "9e8+0x120"},
    "XimAgentFetchStalled": fetch("5e8+0x120"),
    "XimAgentClockSkew": {series("xim_agent_router_clock_skew_seconds"): "-45+0x120"},
    "XimAgentErrors": ended(complete=80, engine_lost=15, internal=5),
    "XimAgentFirstTokenSlow": first_token(5),
    "XimAgentUnacknowledgedGrows": {series("xim_agent_unacknowledged_bytes"): "2e7+1e5x120"},
    "XimAgentDrainStuck": {series("xim_agent_draining"): "1+0x120"},
    "XimRouterDown": {series("up", job="xim-router"): "0+0x120"},
    "XimRouterNoAgent": fleet(online=0, draining=1, disconnected=0, dead=0),
    "XimRouterAgentsGone": fleet(online=3, disconnected=1, dead=0),
    "XimRouterQueueSlow": {series("xim_router_oldest_queued_seconds"): "30+0x120"},
    "XimRouterRefuses": at_router(complete=80, endpoint_inactive=20),
}


def firing(values: dict[str, str], alerts: dict[str, int], minutes: tuple[int, ...]) -> dict[str, Any]:
    """One test of promtool's: which alerts fire how often at these times; all others must not."""
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": numbers} for name, numbers in values.items()],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": f"{minute}m",
                "exp_samples": [{"labels": f'{{alertname="{a}"}}', "value": n} for a, n in alerts.items()],
            }
            for minute in minutes
        ],
    }


def promtool(*arguments: str | Path, text: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["promtool", *arguments], input=text, capture_output=True, check=False)


def run(tmp_path: Path, tests: list[dict[str, Any]]) -> None:
    file = tmp_path / "tests.yml"
    files = [str(PLACE / name) for name in ("recording.yml", "alerts.yml")]
    file.write_text(json.dumps({"rule_files": files, "evaluation_interval": "1m", "tests": tests}))
    done = promtool("test", "rules", file)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()


def test_prometheus_takes_configuration_and_rules() -> None:
    for arguments in (
        ("config", PLACE / "prometheus.yml"),
        ("rules", PLACE / "alerts.yml"),
        ("rules", PLACE / "recording.yml"),
    ):
        done = promtool("check", *arguments)
        assert done.returncode == 0, (done.stdout + done.stderr).decode()


def test_nothing_fires_while_all_is_well(tmp_path: Path) -> None:
    run(tmp_path, [firing(HEALTHY, {}, (10, 25, 40, 55, 62, 75, 90, 119))])


@pytest.mark.parametrize("alert", SICK)
def test_what_is_sick_fires_its_alert_and_no_other(alert: str, tmp_path: Path) -> None:
    assert SICK.keys() == {rule["alert"] for rule in rules("alerts.yml")}
    run(tmp_path, [firing(HEALTHY | SICK[alert], {alert: 1}, (58 if alert == "XimAgentEngineCrashLoop" else 110,))])


class Everything:
    """One sample of every series that there can be, growing; histograms with a trace."""

    def __init__(self) -> None:
        self.scrapes = 0

    def collect(self) -> Any:
        self.scrapes += 1
        for row in (*METRICS, *ROUTER_METRICS):
            if row.buckets:
                histogram = Histogram(row.buckets)
                for n in range(10 * self.scrapes):
                    histogram.observe(row.buckets[n % 5], TRACE)
                yield _histogram(row, histogram)
                continue
            family = (CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily)(
                row.name, row.help, labels=row.labels
            )
            family.add_metric(["engine_lost" for _ in row.labels], self.scrapes)
            yield family

    def text(self) -> bytes:
        return generate_latest(self._registry())

    def openmetrics(self) -> bytes:
        found: bytes = generate_open(self._registry())
        return found

    def _registry(self) -> CollectorRegistry:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return registry


@asynccontextmanager
async def exposing(engine: bytes) -> AsyncIterator[str]:
    collect: Any = Everything()
    server = MetricsServer(collect=collect, ready=list, status=dict, engine_text=lambda: engine, redact=str)
    async with trio.open_nursery() as nursery:
        (url,) = await nursery.start(server.run, "127.0.0.1", 0)
        yield url.removeprefix("http://")
        nursery.cancel_scope.cancel()


async def traced(server: Prometheus, series: str) -> set[str]:
    """Trace ids of its exemplars."""
    found = await server.ask("query_exemplars", query=series, start="0", end="99999999999")
    return {exemplar["labels"]["trace_id"] for one in found for exemplar in one["exemplars"]}


def test_promtool_finds_nothing_to_better_in_our_names() -> None:
    done = promtool("check", "metrics", text=Everything().text())
    found = (done.stdout + done.stderr).decode().splitlines()
    assert [line for line in found if line.startswith("xim_")] == []


async def test_a_real_prometheus_takes_both_formats_and_gives_exemplars_back(tmp_path: Path) -> None:
    odd = b"# TYPE vllm:odd gauge\nvllm:odd 1 1900000000000\n"  # which cannot be converted, so that all goes as text
    async with exposing(VLLM) as converted, exposing(odd) as plain:
        targets = {"xim-agent": converted, "xim-router": plain}
        async with prometheus(tmp_path, free_port(), targets) as server:
            for job in targets:
                await server.until(f'up{{job="{job}"}} == 1')
            await server.until('xim_agent_first_token_seconds_count{job="xim-agent"} > 20')
            assert await server.query('vllm:generation_tokens_total{job="xim-agent"}')
            told = await server.ask("metadata", metric="vllm:generation_tokens")  # so OpenMetrics calls a counter
            assert told["vllm:generation_tokens"][0]["type"] == "counter"
            assert await traced(server, 'xim_agent_first_token_seconds_bucket{job="xim-agent"}') == {TRACE}
            assert await traced(server, 'xim_agent_first_token_seconds_bucket{job="xim-router"}') == set()
            names = {one["__name__"] for one in await server.ask("series", **{"match[]": '{job="xim-router"}'})}
            assert "xim_agent_first_token_seconds_bucket" in names


async def test_every_panel_has_data(tmp_path: Path) -> None:
    """Of an agent and a router that expose everything."""
    async with (
        exposing(VLLM) as agent,
        exposing(b"") as router,
        prometheus(tmp_path, free_port(), {"xim-agent": agent, "xim-router": router}) as server,
    ):
        await server.until('ALERTS{alertstate="firing"}')
        await server.until('xim_agent_first_token_seconds_count{job="xim-agent"} > 60')
        empty = [(title, expr) for title, expr in queries() if not await server.query(expr)]
        assert empty == []


async def test_an_agent_that_loses_its_router_is_told_of(agent_exe: Path, tmp_path: Path) -> None:
    """Executables, of which only the engine is scripted, and the shipped rules."""
    with serving(Scripted, agent_exe, tmp_path) as stack:
        targets = {"xim-agent": f"127.0.0.1:{stack.metrics_port}"}
        async with prometheus(tmp_path, free_port(), targets) as server:
            await server.until("xim_agent_link_up == 1")
            await server.until("xim_agent_ready == 1")
            assert await server.query("vllm:num_requests_running"), "passed through"
            headers = {"Authorization": f"Bearer {stack.api_key}", "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
            body = {"model": "toy", "prompt": "hi", "stream": True, "max_tokens": 5}
            async with httpx.AsyncClient(base_url=stack.url, trust_env=False, timeout=60) as client:
                assert (await client.post("/v1/completions", json=body, headers=headers)).status_code == 200
            await server.until("xim_agent_first_token_seconds_count == 1")
            assert await traced(server, "xim_agent_first_token_seconds_bucket") == {TRACE}
            assert await traced(server, "xim_agent_queue_seconds_bucket") == {TRACE}
            assert await server.query('ALERTS{alertname=~"XimAgentLinkDown|XimAgentNotReady|XimAgentDown"}') == []
            stack.proxy.cut()
            await server.until('ALERTS{alertname="XimAgentLinkDown", alertstate="firing"}')
            told = {a["labels"]["alertname"]: a for a in (await server.ask("alerts"))["alerts"]}
            words = told["XimAgentLinkDown"]["annotations"]["description"]
            assert re.search(r"^127\.0\.0\.1:\d+ has had no answer .* is 0\); it takes no work\.$", words)
            stack.proxy.restore()
            await server.until("xim_agent_link_up == 1")
            await server.until('absent(ALERTS{alertname="XimAgentLinkDown", alertstate="firing"})')
