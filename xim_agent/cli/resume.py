from typing import Any

import click

from xim_agent.cli.operate import CODES, ONLY, ask, runs
from xim_agent.cli.options import AgentCommand


@click.command(
    "resume",
    cls=AgentCommand,
    only=ONLY,
    help="End the drain of an operator: the running agent takes requests again.\n\nWithout one nothing changes. A "
    "drain that the router asked for, or a stop, goes on." + CODES,
)
def command(**flags: Any) -> None:
    found = ask(flags, "resume", {})
    if found["drained_by"]:
        click.echo(f"still draining, because {' and '.join(found['drained_by'])} asked for it; {runs(found)}")
    else:
        click.echo(f"takes requests; {runs(found)}")
