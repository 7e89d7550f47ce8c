import json
import time
from contextlib import suppress
from typing import Any

import click

from xim_agent.cli.healthcheck import ask as over_http
from xim_agent.cli.operate import CODES, ONLY, ask
from xim_agent.cli.options import AgentCommand
from xim_agent.errors import AgentError


@click.command(
    "status",
    cls=AgentCommand,
    only=ONLY,
    help="Show how the running agent is: link, model, engine, requests, and why it is idle." + CODES,
)
@click.option("--json", "as_json", is_flag=True, help="Print all of it as one JSON object, as `/status` has it")
def command(as_json: bool, **flags: Any) -> None:
    try:
        found = ask(flags, "status", {})
    except AgentError as error:
        if error.code != "agent_absent" or (found := _parked()) is None:
            raise
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    from xim_agent.cli.table import plain

    if found.get("parked"):
        shown = [("idle", reason) for reason in found["idle"]]
    else:
        from xim_agent.cli.status_show import lines

        shown = list(lines(found, time.time()))
    for name, text in shown:
        click.echo(plain(f"{name:<10}{text}"))


def _parked() -> Any:
    """What an agent says that stays after a final error: it has no cache, so only its metrics port is left to ask."""
    with suppress(AgentError, ValueError):
        found = json.loads(over_http("/status", {})[1])
        return found if isinstance(found, dict) and found.get("parked") is True else None
    return None
