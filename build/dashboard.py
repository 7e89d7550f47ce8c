#!/usr/bin/env python3
"""Writes compose/monitoring/grafana/dashboards/xim.json: `.venv/bin/python build/dashboard.py`. A test compares them.

One line for each panel; all of Grafana's words around them are made here.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLACE = Path(__file__).resolve().parents[1] / "compose/monitoring/grafana/dashboards/xim.json"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
AGENT = 'instance=~"$instance"'
WIDTH = 24
TRACE = """A dot in a chart is one request; its link puts the trace id into the field *trace* above. With that:

`docker compose -f compose.local.yaml logs | grep '${trace:raw}'`, or the same id where your traces are."""


@dataclass(frozen=True)
class Panel:
    """`queries`: legend → expression. `exemplars`: asked for with them. `low` and `high`: where a value turns red."""

    title: str
    queries: dict[str, str]
    unit: str = "short"
    width: int = 8
    kind: str = "timeseries"
    stacked: bool = False
    exemplars: bool = False
    low: float | None = None
    high: float | None = None
    most: float | None = None
    hint: str = ""


def rate(metric: str, by: str, labels: str = AGENT) -> str:
    return f"sum by ({by}) (rate({metric}{{{labels}}}[$__rate_interval]))"


def quantile(q: float, metric: str, by: str = "", labels: str = AGENT) -> str:
    return f"histogram_quantile({q}, {rate(f'{metric}_bucket', f'le, {by}' if by else 'le', labels)})"


FIRING = 'count by (alertname) (ALERTS{alertstate="firing"})'
FIRST, GAP = "xim_agent_first_token_seconds", "xim_agent_inter_token_seconds"
CALL = "xim_agent_events_call_seconds"
DONE, TOTAL = "xim_agent_cache_fetch_done_bytes", "xim_agent_cache_fetch_total_bytes"
NETWORK, HITS = "xim_agent_cache_network_bytes_total", "xim_agent_cache_hit_bytes_total"
ROWS: dict[str, tuple[Panel, ...]] = {
    "Overview": (
        Panel("Up", {"{{instance}}": f'up{{job="xim-agent", {AGENT}}}'}, "bool_on_off", 4, "stat", low=1),
        Panel("Ready", {"{{instance}}": f"xim_agent_ready{{{AGENT}}}"}, "bool_yes_no", 4, "stat", low=1),
        Panel("Link to the router", {"{{instance}}": f"xim_agent_link_up{{{AGENT}}}"}, "bool_on_off", 4, "stat", low=1),
        Panel("Running requests", {"{{instance}}": f"xim_agent_leases_running{{{AGENT}}}"}, width=4, kind="stat"),
        Panel("Agents by state", {"{{state}}": "sum by (state) (xim_router_agents)"}, width=4, kind="stat"),
        Panel("Alerts", {"{{alertname}}": FIRING}, width=4, kind="stat", high=1),
        Panel("Requests", {"{{reason}}": rate("xim_agent_leases_ended_total", "reason")}, "reqps", stacked=True),
        Panel("Errors", {
            "{{reason}}": rate("xim_agent_leases_ended_total", "reason", f'{AGENT}, reason!~"complete|cancelled"'),
            "router: {{code}}": rate("xim_agent_router_failures_total", "code"),
        }, "cps", stacked=True),
        Panel("Tokens", {"{{instance}}": rate("vllm:generation_tokens_total", "instance")}, "short", stacked=True),
        Panel("Time to first token", {"p50": quantile(0.5, FIRST), "p99": quantile(0.99, FIRST)}, "s", exemplars=True),
        Panel("Between two pieces, p99", {"{{instance}}": quantile(0.99, GAP, "instance")}, "s", exemplars=True,
              hint="A piece has all tokens of 20 ms."),
        Panel("Whole requests", {
            "p50": quantile(0.5, "xim_agent_request_seconds"), "p99": quantile(0.99, "xim_agent_request_seconds"),
        }, "s", exemplars=True),
        Panel("Queue", {
            "wait at vLLM": f"sum(vllm:num_requests_waiting{{{AGENT}}})",
            "wait at the router": "sum(xim_router_queued_requests)",
        }),
        Panel("Time in the queue, p99", {
            "router": quantile(0.99, "xim_router_dispatch_seconds", labels=""),
            "agent": quantile(0.99, "xim_agent_queue_seconds"),
            "vLLM": quantile(0.99, "vllm:request_queue_time_seconds"),
        }, "s", exemplars=True),
        Panel("Requests at the router", {"{{ending}}": rate("xim_router_requests_total", "ending", "")}, "reqps",
              stacked=True),
        Panel("Calls to the router, p99", {"{{instance}}": quantile(0.99, CALL, "instance")}, "s"),
        Panel("Answers not acknowledged", {"{{instance}}": f"xim_agent_unacknowledged_bytes{{{AGENT}}}"}, "bytes"),
        Panel("Token ends in", {"{{instance}}": f"xim_agent_token_expiry_seconds{{{AGENT}}} - time()"}, "s", low=900),
    ),
    "Cache": (
        Panel("Space", {
            "{{instance}} {{tier}}": f"xim_agent_cache_tier_bytes{{{AGENT}}}",
            "{{instance}} bound": f"xim_agent_cache_bound_bytes{{{AGENT}}}",
        }, "bytes"),
        Panel("Free on the disk", {"{{instance}}": f"xim_agent_cache_disk_free_bytes{{{AGENT}}}"}, "bytes", low=2**30),
        Panel("Step at work", {"{{instance}}": f"{DONE}{{{AGENT}}} / {TOTAL}{{{AGENT}}}"}, "percentunit", most=1),
        Panel("Fetched and found", {"fetched": rate(NETWORK, "job"), "found": rate(HITS, "job")}, "Bps"),
        Panel("Speed of a blob", {
            "p50": quantile(0.5, "xim_agent_cache_blob_bytes_per_second"),
            "p10": quantile(0.1, "xim_agent_cache_blob_bytes_per_second"),
        }, "Bps"),
        Panel("Evictions", {"{{kind}}, {{reason}}": rate("xim_agent_cache_evictions_total", "kind, reason")}, "cps"),
    ),
    "Engine and GPU": (
        Panel("KV cache in use", {"{{instance}}": f"max by (instance) (vllm:kv_cache_usage_perc{{{AGENT}}})"},
              "percentunit", most=1),
        Panel("Requests in vLLM", {
            "{{instance}} running": f"sum by (instance) (vllm:num_requests_running{{{AGENT}}})",
            "{{instance}} waiting": f"sum by (instance) (vllm:num_requests_waiting{{{AGENT}}})",
            "{{instance}} ceiling": f"xim_agent_engine_ceiling{{{AGENT}}}",
        }),
        Panel("Between two tokens in vLLM", {
            "p50": quantile(0.5, "vllm:inter_token_latency_seconds"),
            "p99": quantile(0.99, "vllm:inter_token_latency_seconds"),
        }, "s"),
        Panel("Prompt tokens", {
            "{{instance}}": rate("vllm:prompt_tokens_total", "instance"),
            "{{instance}} from the cache": rate("vllm:prompt_tokens_cached_total", "instance"),
        }, "short"),
        Panel("Preemptions", {"{{instance}}": rate("vllm:num_preemptions_total", "instance")}, "cps",
              hint="More than none: the KV cache is too small for what runs."),
        Panel("Conditions", {"{{instance}} {{code}}": f"xim_agent_condition{{{AGENT}}}"}, kind="stat", high=1,
              hint="Health conditions that hold: gpu_lost, engine_failed, clock_skew and so on."),
        Panel("Starts and failures in an hour", {
            "{{instance}} starts": f"increase(xim_agent_engine_starts_total{{{AGENT}}}[1h])",
            "{{instance}} failures": f"increase(xim_agent_engine_failures_total{{{AGENT}}}[1h])",
        }),
        Panel("Start took", {"{{instance}}": f"xim_agent_engine_ready_seconds{{{AGENT}}}"}, "s"),
    ),
}  # fmt: skip


def target(number: int, panel: Panel, legend: str, expr: str) -> dict[str, Any]:
    ref = chr(ord("A") + number)
    instant = panel.kind == "stat"
    found = {"refId": ref, "datasource": SOURCE, "expr": expr, "legendFormat": legend}
    found |= {"instant": instant, "range": not instant}
    return found | ({"exemplar": True} if panel.exemplars else {})


def field_config(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.low is not None:
        steps = [{"color": "red", "value": None}, {"color": "green", "value": panel.low}]
    if panel.high is not None:
        steps.append({"color": "red", "value": panel.high})
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.most is not None:
        defaults["max"] = panel.most
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
        defaults["custom"] = {"drawStyle": "line", "fillOpacity": 20 if panel.stacked else 0, "stacking": stacking}
    return {"defaults": defaults, "overrides": []}


def options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "stat":
        reduce = {"values": False, "calcs": ["lastNotNull"], "fields": ""}
        return {"reduceOptions": reduce, "colorMode": "background", "graphMode": "none", "textMode": "value_and_name"}
    legend = {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}
    return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}


def at(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def panels() -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        made.append({"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": at(0, y, WIDTH, 1)})
        x, y, line = 0, y + 1, 0
        for panel in row:
            if x + panel.width > WIDTH:
                x, y = 0, y + line
            line = 4 if panel.width == 4 else 8
            made.append(
                {
                    "type": panel.kind,
                    "title": panel.title,
                    "description": panel.hint,
                    "datasource": SOURCE,
                    "gridPos": at(x, y, panel.width, line),
                    "targets": [target(n, panel, *query) for n, query in enumerate(panel.queries.items())],
                    "fieldConfig": field_config(panel),
                    "options": options(panel),
                }
            )
            x += panel.width
        y += line
    words = {"mode": "markdown", "content": TRACE}
    made.append({"type": "text", "title": "One request", "gridPos": at(0, y, WIDTH, 4), "options": words})
    return [{"id": number, **panel} for number, panel in enumerate(made, 1)]


def dashboard() -> dict[str, Any]:
    instance = {
        "name": "instance", "label": "agent", "type": "query", "datasource": SOURCE, "multi": True, "includeAll": True,
        "allValue": ".*", "refresh": 2, "sort": 1, "query": "label_values(xim_agent_info, instance)",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }  # fmt: skip
    return {
        "uid": "xim",
        "title": "XIM agents",
        "tags": ["xim"],
        "timezone": "browser",
        "editable": True,
        "graphTooltip": 1,
        "schemaVersion": 39,
        "version": 1,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "source", "type": "datasource", "query": "prometheus", "refresh": 1},
                instance,
                {"name": "trace", "label": "trace", "type": "textbox", "query": ""},
            ]
        },
        "panels": panels(),
    }


def text() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    PLACE.write_text(text())
