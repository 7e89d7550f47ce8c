import json
import time
from typing import Any

import click

from xim_agent.cli.operate import CODES, ONLY, ask
from xim_agent.cli.options import AgentCommand


@click.command(
    "status",
    cls=AgentCommand,
    only=ONLY,
    help="Show how the running agent is: link, model, engine, requests, and why it is idle." + CODES,
)
@click.option("--json", "as_json", is_flag=True, help="Print all of it as one JSON object, as `/status` has it")
def command(as_json: bool, **flags: Any) -> None:
    found = ask(flags, "status", {})
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    from xim_agent.cli.status_show import lines
    from xim_agent.cli.table import plain

    for name, text in lines(found, time.time()):
        click.echo(plain(f"{name:<10}{text}"))
