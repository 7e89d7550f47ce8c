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
def command(as_json: bool, **flags: Any) -> None:
    found = ask(flags, "requests", {})
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    from xim_agent.cli.progress import size
    from xim_agent.cli.table import cell, show

    if not found["requests"]:
        click.echo("no request runs")
        return
    columns = {
        "REQUEST": cell("request"),
        "LEASE": cell("lease"),
        "AGE": lambda row: f"{row['seconds']:.1f} s",
        "PHASE": cell("phase"),
        "CHUNKS": cell("chunks"),
        "SIZE": lambda row: size(row["bytes"]),
        "PATH": cell("path"),
    }
    show(found["requests"], columns, as_json=False)
