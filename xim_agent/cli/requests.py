import json
from typing import Any

import click

from xim_agent.cli.operate import CODES, ONLY, ask
from xim_agent.cli.options import AgentCommand


@click.command(
    "requests",
    cls=AgentCommand,
    only=ONLY,
    help="List what the running agent serves now, oldest first: nothing of the content.\n\nPhases: waiting (for its "
    "body), prefill (asked, no answer yet), streaming, ending (over, the router has not said that it knows). A "
    "chunk is one piece of the answer, for most models a token." + CODES,
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: schema, requests")
@click.option("--watch", is_flag=True, help="Go on until Ctrl-C; with --json a line a second, else where it changes")
def command(as_json: bool, watch: bool, **flags: Any) -> None:
    if watch:
        from xim_agent.cli import watching

        watching.watch(flags, "requests", json.dumps if as_json else _text, None if as_json else _news)
        return
    found = ask(flags, "requests", {})
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(_text(found))


def _news(found: Any) -> object:
    return [(row["lease"], row["phase"]) for row in found["requests"]]


def _text(found: Any) -> str:
    from xim_agent.cli.progress import size
    from xim_agent.cli.table import aligned, cell

    if not found["requests"]:
        return "no request runs"
    columns = {
        "REQUEST": cell("request"),
        "LEASE": cell("lease"),
        "AGE": lambda row: f"{row['seconds']:.1f} s",
        "PHASE": cell("phase"),
        "CHUNKS": cell("chunks"),
        "SIZE": lambda row: size(row["bytes"]),
        "PATH": cell("path"),
    }
    return aligned(found["requests"], columns)
