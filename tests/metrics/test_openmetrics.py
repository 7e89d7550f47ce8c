"""OpenMetrics for who asks for it: ours with exemplars, vLLM's converted, both valid and with the same numbers."""

import logging
from pathlib import Path
from typing import Any

import pytest
from fakes.metrics_port import Told, serving
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse_classic

from xim_agent.metrics.openmetrics import Unconverted, converted

VLLM = Path(__file__).with_name("vllm-0.32.prom").read_text()  # of a real one, after four requests
CLASSIC = "text/plain; version=0.0.4; charset=utf-8"
OPEN = "application/openmetrics-text; version=1.0.0; charset=utf-8"
# What Prometheus 2.42 and 3 send.
PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=0.0.1;"
    "q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


def values(families: Any) -> dict[Any, float]:
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_vllms_numbers_are_the_same_in_both_formats() -> None:
    theirs = values(parse_classic(VLLM))
    ours = values(parse_open(converted(VLLM) + "# EOF\n"))
    left_out = {key for key in theirs if key[0].endswith("_created")}
    assert ours == {key: value for key, value in theirs.items() if key not in left_out}
    assert len(left_out) > 10
    assert len(ours) > 300
    kinds = {family.name: family.type for family in parse_open(converted(VLLM) + "# EOF\n")}
    assert kinds["vllm:generation_tokens"] == "counter"
    assert kinds["vllm:iteration_tokens_total"] == "histogram", "its name only looks like a counter's"
    assert kinds["http_request_size_bytes"] == "summary"


def test_odd_counters_keep_their_names_and_words_are_quoted() -> None:
    text = (
        '# HELP odd says "x" \\\\ y\n# TYPE odd counter\nodd{a="b \\"} 7 # {"} 3\n\n# a comment\n'
        "# TYPE last_created gauge\nlast_created 1\n# TYPE u untyped\nu NaN\n"
    )
    odd, last, u = parse_open(converted(text) + "# EOF\n")
    assert (odd.type, odd.documentation, odd.samples[0].value) == ("unknown", 'says "x" \\ y', 3)
    assert odd.samples[0].labels == {"a": 'b "} 7 # {'}
    assert (last.name, last.type) == ("last_created", "gauge"), "of no family's creation"
    assert u.type == "unknown"


@pytest.mark.parametrize("text", ["x\n", "x 1 1700000000000\n", "{} 1\n", "<html>\n", "# TYPE x stateset\nx 1\n"])
def test_what_is_not_known_is_not_guessed_at(text: str) -> None:
    with pytest.raises(Unconverted):
        converted(text)


@settings(max_examples=40)
@given(st.text(max_size=60))
def test_nothing_else_is_ever_raised(text: str) -> None:
    try:
        converted(text)
    except Unconverted:
        pass


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (PROMETHEUS, OPEN),
        (PROMETHEUS_3, OPEN),
        ("application/openmetrics-text", OPEN),
        ("text/plain, application/openmetrics-text;q=0", CLASSIC),
        ("text/plain;version=0.0.4", CLASSIC),
        ("*/*", CLASSIC),
        ("", CLASSIC),
    ],
)
async def test_who_asks_gets_openmetrics_and_everybody_else_the_classic_text(accept: str, kind: str) -> None:
    told = Told()
    told.engine = VLLM.encode()
    async with serving(told) as client:
        reply = await client.get("/metrics", headers={"accept": accept})
    assert reply.headers["content-type"] == kind
    parse = parse_open if kind == OPEN else parse_classic
    found = values(parse(reply.text))
    assert found["xim_agent_start_time_seconds", ()] == 12.5
    assert [key for key in found if key[0] == "vllm:generation_tokens_total"]


async def test_a_vllm_that_says_something_odd_costs_the_format_only(caplog: pytest.LogCaptureFixture) -> None:
    told = Told()
    told.engine = b"vllm:odd 1 1700000000000\n"
    caplog.set_level(logging.WARNING)
    async with serving(told) as client:
        for _ in range(3):
            reply = await client.get("/metrics", headers={"accept": PROMETHEUS})
    assert reply.headers["content-type"] == CLASSIC
    assert reply.text.endswith("vllm:odd 1 1700000000000\n")
    assert [r.getMessage() for r in caplog.records] == ["vLLM's metrics cannot be given in OpenMetrics"], "once"
