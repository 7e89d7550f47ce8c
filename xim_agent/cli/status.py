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
@click.option("--watch", is_flag=True, help="Go on until Ctrl-C; with --json a line a second, else where it changes")
def command(as_json: bool, watch: bool, **flags: Any) -> None:
    if watch:
        from xim_agent.cli import watching

        draw, key = (json.dumps, None) if as_json else (_text, _news)
        watching.watch(flags, "status", draw, key, absent=_parked)
        return
    try:
        found = ask(flags, "status", {})
    except AgentError as error:
        if error.code != "agent_absent" or (found := _parked()) is None:
            raise
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(_text(found))


def _text(found: Any) -> str:
    from xim_agent.cli.table import plain

    if found.get("parked"):
        shown = [("idle", reason) for reason in found["idle"]]
    else:
        from xim_agent.cli.status_show import lines

        shown = list(lines(found, time.time()))
    return "\n".join(plain(f"{name:<10}{text}") for name, text in shown)


def _news(found: Any) -> object:
    """What is worth a block where nothing can be redrawn: no clocks, no counters."""
    if found.get("parked"):
        return found["idle"]
    reasons = [reason.partition(":")[0] for reason in found["idle"]]
    return found["agent"], found["history"], found["health"], reasons


def _parked() -> Any:
    """What an agent says that stays after a final error: it has no cache, so only its metrics port is left to ask."""
    with suppress(AgentError, ValueError):
        found = json.loads(over_http("/status", {})[1])
        return found if isinstance(found, dict) and found.get("parked") is True else None
    return None
