"""README's table of metrics is the one of names.py. To write it anew: XIM_WRITE_README=1."""

from fakes.readme import readme_part

from xim_agent.metrics.names import METRICS, ROUTER_METRICS, Metric

BEGIN, END = "<!-- metrics: written by tests/metrics/test_readme.py -->\n", "<!-- end of metrics -->\n"


def line(row: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in row.labels)
    return f"| `{row.name}` | {row.kind} | {labels} | {row.help} |"


def table() -> str:
    head = ["| metric | kind | labels | what it is |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *map(line, METRICS), *map(line, ROUTER_METRICS)]) + "\n"


def test_readme_has_every_metric() -> None:
    readme_part(BEGIN, table(), END)


def test_no_help_breaks_the_table() -> None:
    assert not [row.name for row in (*METRICS, *ROUTER_METRICS) if "|" in row.help or "\n" in row.help]
