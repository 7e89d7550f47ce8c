from typing import Any

import click

from xim_agent.cli.operate import CODES, ONLY, ask, runs
from xim_agent.cli.options import AgentCommand
from xim_agent.errors import AgentError, Exit


@click.command(
    "drain",
    cls=AgentCommand,
    only=ONLY,
    help="Have the running agent take no more requests, and wait until none runs.\n\nModel and engine stay as they "
    "are. It lasts until `resume` or the agent's end; Ctrl-C ends only the wait. It is the wait that fails with 4 when "
    "somebody resumes meanwhile." + CODES,
)
@click.option("--no-wait", is_flag=True, help="Return at once")
def command(no_wait: bool, **flags: Any) -> None:
    from xim_agent.cli.progress import Display

    if no_wait:
        click.echo(f"draining: {runs(ask(flags, 'drain', {}))}")
        return
    with Display() as display:
        found = ask(flags, "drain", {"wait": True}, lambda now: display.show("draining", detail=runs(now)))
    if found["running"]:
        raise AgentError(
            "drain_ended",
            f"the drain was ended by somebody else while {runs(found)}",
            hint="`status` shows what the agent does now",
            exit_code=Exit.BUSY,
        )
    click.echo("drained: no request runs; `resume` takes requests again")
