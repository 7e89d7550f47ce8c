"""The shipped alerts, rules and dashboard name what there is; README tells of each alert what the rules say.

What needs Prometheus' own tools is in test_prometheus.py.
"""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from fakes.compose import build_module, rendered
from fakes.monitoring import DASHBOARD, PLACE, queries, read, rules
from fakes.readme import readme_part
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from xim_agent.config.fields import Config
from xim_agent.metrics.names import METRICS, ROUTER_METRICS

BEGIN, END = "<!-- alerts: written by tests/metrics/test_monitoring.py -->\n", "<!-- end of alerts -->\n"
ALERTS = rules("alerts.yml")
RECORDED = {rule["record"] for rule in rules("recording.yml")}
VLLM = Path(__file__).with_name("vllm-0.32.prom").read_text()
EXPRESSIONS = [
    *((rule.get("alert") or rule["record"], rule["expr"]) for rule in ALERTS + rules("recording.yml")),
    *queries(),
]
SELECTOR = re.compile(r"\b((?:xim_|vllm:|instance:|up\b|ALERTS\b)[a-zA-Z0-9_:]*)(?:\{([^}]*)\})?")
ALWAYS = {"instance", "job", "le"}


def known() -> dict[str, set[str]]:
    """Labels by name, of every series that there can be."""
    found: dict[str, set[str]] = {"up": set(), "ALERTS": {"alertstate", "alertname"}} | {
        name: set() for name in RECORDED
    }
    for row in (*METRICS, *ROUTER_METRICS):
        for end in ("_bucket", "_sum", "_count") if row.buckets else ("",):
            found[row.name + end] = set(row.labels)
    for name, labels in re.findall(r"^([a-zA-Z_:]\w*(?::\w+)*)(?:\{(.*)\})? ", VLLM, re.MULTILINE):
        found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return found


@pytest.mark.parametrize(("where", "expr"), EXPRESSIONS)
def test_every_series_asked_for_exists_with_its_labels(where: str, expr: str) -> None:
    series = known()
    asked = SELECTOR.findall(expr)
    assert asked
    for name, labels in asked:
        assert name in series, where
        assert set(re.findall(r"(\w+)\s*[=!]~?", labels)) <= series[name] | ALWAYS, where
    by = {word for group in re.findall(r"\bby \(([^)]*)\)", expr) for word in group.replace(" ", "").split(",")}
    assert by <= set.union(*(series[name] for name, _ in asked)) | ALWAYS, where


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_where_and_what_to_do(rule: dict[str, Any]) -> None:
    told = rule["annotations"]
    assert told.keys() == {"summary", "description", "cause", "cure", "runbook_url"}
    assert "{{ $labels.instance }}" in told["description"]
    assert "{{ $value" in told["description"] or "== 1" in rule["expr"]
    assert rule["labels"]["severity"] in ("info", "warning", "critical")
    assert told["runbook_url"] == f"README.md#{rule['alert'].lower()}"
    assert "$" not in told["summary"] + told["cause"] + told["cure"], "these stand in README"
    named = set(re.findall(r"\b(?:xim_|vllm:)\w+", " ".join(told.values())))
    assert named <= known().keys() | {name.removesuffix("_bucket") for name in known()}
    options = {field.name.upper() for field in fields(Config)}
    assert set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", told["cure"])) <= options


def table() -> str:
    rows = ["| alert | what it means | cause | what to do |", "| --- | --- | --- | --- |"]
    for rule in ALERTS:
        told = {name: " ".join(text.split()).replace("|", "\\|") for name, text in rule["annotations"].items()}
        name = f'<a id="{rule["alert"].lower()}"></a>`{rule["alert"]}` ({rule["labels"]["severity"]})'
        hold = f", for {rule['for']}" if "for" in rule else ""
        rows.append(f"| {name} | {told['summary']}{hold} | {told['cause']} | {told['cure']} |")
    return "\n".join(rows) + "\n"


def test_readme_has_cause_and_cure_of_every_alert() -> None:
    """To write it anew: XIM_WRITE_README=1."""
    text = readme_part(BEGIN, table(), END)
    for anchor in re.findall(r"\]\(#([a-z-]+)\)", text):
        titles = [
            re.sub(r"[^a-z -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)", text, re.M)
        ]
        assert anchor in titles, "where a cure sends the reader"


def test_the_dashboard_is_what_its_script_writes() -> None:
    assert DASHBOARD.read_text() == build_module("dashboard").text(), "run .venv/bin/python build/dashboard.py"


def lacks(given: Any, kept: Any, path: str = "") -> list[str]:
    """Where `kept` has not what was given."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return [gap for key, value in given.items() for gap in lacks(value, kept.get(key), f"{path}.{key}")]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        pairs = enumerate(zip(given, kept, strict=True))
        return [gap for n, (a, b) in pairs for gap in lacks(a, b, f"{path}[{n}]")]
    return [] if given == kept else [f"{path}: {given!r} is {kept!r}"]


def test_grafana_knows_every_word_of_the_dashboard() -> None:
    """By Grafana's own library, which drops what is in no schema of its."""
    register_default_plugins()
    given = json.loads(DASHBOARD.read_text())
    kept = json.loads(json.dumps(Dashboard.from_json(given), cls=JSONEncoder))
    assert lacks(given, kept) == []
    given["panels"][3]["fieldconfig"] = {}
    assert lacks(given, json.loads(json.dumps(Dashboard.from_json(given), cls=JSONEncoder))), "it does drop"


def test_panels_do_not_overlap_and_have_a_number_each() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]


def test_it_is_wired_into_the_try_out() -> None:
    services = rendered("compose.local.yaml")["services"]
    mounted = {Path(v["source"]).name: v["target"] for v in services["prometheus"]["volumes"] if v["type"] == "bind"}
    config = read("prometheus.yml")
    assert set(mounted) == {"prometheus.yml", *config["rule_files"]}
    assert {str(Path(target).parent) for target in mounted.values()} == {"/etc/prometheus"}
    assert set(config["rule_files"]) == {path.name for path in PLACE.glob("*.yml")} - {"prometheus.yml"}
    jobs = {one["job_name"]: one["static_configs"][0]["targets"] for one in config["scrape_configs"]}
    asked = {job for rule in ALERTS for job in re.findall(r'job="([^"]+)"', rule["expr"])}
    assert jobs.keys() == asked
    assert jobs["xim-router"] == ["router:9095"]
    assert "--metrics-listen 0.0.0.0:9095" in " ".join(services["router"]["command"])
    assert not [port for port in services["router"]["ports"] if port["target"] == 9095], "for Prometheus alone"
    assert "--enable-feature=exemplar-storage" in services["prometheus"]["command"]
    [source] = read("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    [link] = source["jsonData"]["exemplarTraceIdDestinations"]
    assert link["name"] == "trace_id"
    made = json.loads(DASHBOARD.read_text())
    assert link["url"].startswith(f"/d/{made['uid']}?var-trace=")
    assert "trace" in {variable["name"] for variable in made["templating"]["list"]}
