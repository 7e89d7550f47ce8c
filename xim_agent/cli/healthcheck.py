"""`healthcheck`: asks the metrics port. For containers, often; so it imports nothing of the stack."""

import os
from collections.abc import Mapping
from typing import Any

import click

from xim_agent.cli.options import AgentCommand
from xim_agent.config import sources
from xim_agent.errors import AgentError, Exit

METRICS = ("metrics_host", "metrics_port", "disable_metrics_server")
_SECONDS = 5.0
_HELP = """Ask whether the running agent is ready, and print the reasons when it is not.

The agent is found by the settings of its metrics server, as `run` got them.

\b
Exit codes:
  0   ready
  1   not ready, or nobody answers
  2   wrong usage
"""


def ask(path: str, flags: Mapping[str, Any]) -> tuple[int, str]:
    """Status and text of the agent's answer to a GET of `path`. Raises AgentError (exit 1) when it cannot be asked."""
    from http.client import HTTPConnection, HTTPException

    host, port, off = (sources.alone(attr, flags, os.environ) for attr in METRICS)
    if off or port == 0:
        why = "DISABLE_METRICS_SERVER is set" if off else "METRICS_PORT is 0, so its port is not known"
        raise AgentError("metrics_unknown", f"the agent cannot be asked: {why}", exit_code=Exit.MISSING)
    # 0.0.0.0 and ::, too, are addresses of this host.
    connection = HTTPConnection(host, port, timeout=_SECONDS)
    try:
        connection.request("GET", path)
        reply = connection.getresponse()
        return reply.status, reply.read().decode(errors="replace")
    except (OSError, HTTPException) as error:
        reason = str(error) or type(error).__name__
        raise AgentError(
            "metrics_unreachable", f"no agent answers on {host} port {port}: {reason}", exit_code=Exit.MISSING
        ) from error
    finally:
        connection.close()


@click.command("healthcheck", cls=AgentCommand, only=frozenset(METRICS), help=_HELP)
@click.option("--path", default="/readyz", show_default=True, help="What to ask for; of a router: /dashboard/")
def command(path: str, **flags: Any) -> int:
    status, text = ask(path, flags)
    if status == 200:
        return Exit.OK
    click.echo(text, nl=False)
    return Exit.MISSING
