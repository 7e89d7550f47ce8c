"""The router's metrics port: the fleet and clients' requests, of a router with agents by hand."""

import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import httpx
import pytest
import trio
from fakes.agent import MODEL, answer, error, running, until
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse

from xim_agent.cli.router import _metrics
from xim_agent.clock import SystemClock
from xim_agent.errors import AgentError, Exit
from xim_agent.metrics.histogram import Histogram
from xim_agent.metrics.names import ROUTER_METRICS, Metric
from xim_agent.metrics.registry import Collector
from xim_agent.router import roster
from xim_agent.router.jobs import Limits
from xim_agent.router.metrics import STATES, Report, parts
from xim_agent.router.times import Times

ASK: dict[str, Any] = {"model": MODEL, "prompt": "hi", "stream": True}
TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.mark.parametrize("row", ROUTER_METRICS, ids=lambda row: row.name)
def test_every_row_points_into_what_is_reported(row: Metric) -> None:
    assert row.name.startswith("xim_router_")
    kind: Any = {"router": Report, "times": Times}[row.part]
    if row.buckets:
        kept = getattr(Times(), row.attr)
        assert isinstance(kept, Histogram)
        assert kept.bounds == row.buckets
    elif not row.info:
        assert row.attr in {*get_type_hints(kind), *vars(kind)}


def samples(collector: Collector) -> dict[str, Any]:
    """Values by name and labels, as they are written; exemplars behind a #."""
    found: dict[str, Any] = {}
    for family in parse(collector.openmetrics().decode()):
        for s in family.samples:
            name = s.name + "".join(f"|{value}" for key, value in sorted(s.labels.items()))
            found[name] = s.value
            if s.exemplar:
                found[f"{s.name}#"] = s.exemplar.labels["trace_id"]
    return found


async def test_requests_agents_and_the_queue(tmp_path: Path) -> None:
    async with running(tmp_path, Limits(queue_wait=30, grace=0.0)) as bench:
        collector = Collector(parts(bench.store, bench.router.dispatch, SystemClock()), ROUTER_METRICS)
        agent, other, silent = await bench.agent(), await bench.agent(), await bench.agent()
        await agent.poll(wait_ms=0, load={"running": 1, "tokens_per_s": 12.5})
        await other.poll(wait_ms=0, phase="draining", capacity=0, load={"running": 1, "tokens_per_s": 2})
        roster.suspend(bench.store.db, silent.id, time.time())
        before = samples(collector)
        assert {s: before[f"xim_router_agents|{s}"] for s in STATES} == {
            "pending": 0, "online": 1, "draining": 1, "suspended": 1, "disconnected": 0, "dead": 0
        }  # fmt: skip
        assert before[f"xim_router_tokens_per_second|{MODEL}"] == 14.5
        assert before["xim_router_dispatch_seconds_count"] == 0
        assert f"xim_router_queued_requests|{MODEL}|test" not in before

        async with trio.open_nursery() as clients, bench.http() as client:

            async def ask(**more: Any) -> None:
                headers = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
                await client.post("/v1/completions", json=ASK | more, headers=headers)

            clients.start_soon(ask)
            await until(lambda: bench.router.dispatch.statistics().queued)
            waiting = samples(collector)
            assert waiting[f"xim_router_queued_requests|{MODEL}|test"] == 1
            assert waiting["xim_router_queued_bytes"] > 10
            assert waiting["xim_router_oldest_queued_seconds"] > 0
            lease = await agent.take()
            assert samples(collector)["xim_router_running_requests"] == 1
            await agent.events(lease["id"], answer([b"data: a\n\n", b"data: [DONE]\n\n"]))
            await until(lambda: bench.router.dispatch.board.times.ended["complete"])
            clients.start_soon(ask)
            await agent.serve_one([error(0, "invalid_request")])
            await until(lambda: bench.router.dispatch.board.times.ended["invalid_request"])
            clients.start_soon(partial(ask, stream=False))
            await agent.serve_one(answer([b"{}"], kind="application/json"))
            await until(lambda: bench.router.dispatch.board.times.ended["complete"] == 2)
            clients.start_soon(ask)
            await until(lambda: bench.router.dispatch.statistics().queued)
            clients.cancel_scope.cancel()
        await until(lambda: bench.router.dispatch.board.times.ended["left"])
        after = samples(collector)
    assert {e: after[f"xim_router_requests_total|{e}"] for e in ("complete", "invalid_request", "left")} == {
        "complete": 2, "invalid_request": 1, "left": 1
    }  # fmt: skip
    assert after["xim_router_answer_bytes_total"] == len(b"data: a\n\ndata: [DONE]\n\n{}")
    assert after["xim_router_leases_total"] == after["xim_router_dispatch_seconds_count"] == 3
    assert after["xim_router_first_token_seconds_count"] == 1, "of the stream alone"
    assert after["xim_router_request_seconds_count"] == 4
    for name in ("dispatch", "first_token", "request"):
        assert after[f"xim_router_{name}_seconds_bucket#"] == TRACE


def test_the_port_is_its_own_and_only_there_when_asked_for(tmp_path: Path, free_port: int) -> None:
    command = [sys.executable, "-m", "xim_agent", "router", "serve", "--listen", "127.0.0.1:0", "--data", str(tmp_path)]
    command += ["--metrics-listen", f"127.0.0.1:{free_port}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        try:
            assert process.stderr is not None
            lines = [process.stderr.readline()]
            while lines[-1] and not lines[-1].startswith("metrics"):
                lines.append(process.stderr.readline())
            assert lines[-1] == f"metrics are on http://127.0.0.1:{free_port}/metrics\n", lines
            with httpx.Client(trust_env=False) as client:
                found = client.get(f"http://127.0.0.1:{free_port}/metrics").text
                assert 'xim_router_agents{state="online"} 0.0' in found
                (own,) = re.findall(r"agents and clients use (http://[^\s;]+)", "".join(lines))
                assert client.get(f"{own}/metrics").status_code == 404
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


async def test_a_taken_address_says_which_option(tmp_path: Path, free_port: int) -> None:
    async with running(tmp_path) as bench:
        with socket.create_server(("127.0.0.1", free_port)), pytest.raises(AgentError) as caught:
            await _metrics(bench.router, f"127.0.0.1:{free_port}", trio.TASK_STATUS_IGNORED)
    assert caught.value.exit_code == Exit.CONFIG
    assert caught.value.hint == "choose another --metrics-listen address"
