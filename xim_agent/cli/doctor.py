"""`doctor`: what would keep the agent from working here, each with a cure. The form of --json: doctor/report.py."""

import os
from typing import Any

import click

from xim_agent import __version__
from xim_agent.cli.common import configured
from xim_agent.cli.options import AgentCommand
from xim_agent.errors import AgentError

_HELP = """Look for what would keep the agent from working here, and say what to do about it.

Takes the settings of `run`. Run it as the agent's user and with the agent's variables: it tells what that user may do.
Nothing is changed, made, locked or started, and the router is asked one question without a credential. It works beside
a running agent, without a router, a GPU or root, and ends within 70 s whatever hangs.

\b
Exit codes:
  0   all is well, or there are warnings only
  2   wrong usage
  13  no router speaks this agent's protocol
  69  no router answers
  77  a directory cannot be used
  78  a setting, or this machine, must be changed
The code is that of the first failure, from top to bottom.
"""


@click.command("doctor", cls=AgentCommand, help=_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object")
def command(as_json: bool, **flags: Any) -> int:
    from xim_agent.config.config import unknown_variables
    from xim_agent.doctor.report import from_error, ok, warning

    unknown = unknown_variables(list(os.environ))
    config = None
    try:
        config = configured(flags)
        checked = ok("configuration", "every setting is valid")
        if unknown:
            checked = warning("configuration", "; ".join(unknown), "correct or remove it")
    except AgentError as error:
        checked = from_error("configuration", error)

    import json

    import trio

    from xim_agent.cli.doctor_look import examine
    from xim_agent.doctor.report import document, exit_code, lines
    from xim_agent.log import redact

    found = trio.run(examine, config, checked, dict(os.environ))
    shown = json.dumps(document(found, __version__), indent=2) if as_json else "\n".join(lines(found))
    click.echo(redact(shown))
    return exit_code(found)
