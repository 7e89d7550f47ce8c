"""The command line: one lazily imported file per command, so that `--help` and errors come at once."""

import importlib
from collections.abc import Sequence

import click

from xim_agent import PROTOCOL, __version__
from xim_agent.cli.options import write_options
from xim_agent.cli.render import guarded

_COMMANDS = {
    "run": "Serve models as a worker of a router; enrolls first when there is no credential",
    "enroll": "Enroll with a join key and exit",
    "leave": "Deregister this agent at the router and set its credential aside",
    "healthcheck": "Whether the running agent is ready, by its exit code; for containers",
    "status": "How the running agent is, and why it is idle",
    "requests": "What the running agent serves now: age, phase, size, no content",
    "drain": "Have the running agent take no more requests, and wait until none runs",
    "resume": "Have it take requests again",
    "doctor": "Look for what would keep the agent from working here, with a cure for each",
    "support-bundle": "Write one file that tells support how this agent and this machine are, without secrets",
    "plan": "Print how vLLM would be started for a model, and the sum behind every number",
    "cache": "The model cache: ls, verify, rm, prune, path",
    "local": "Router and agent in one process, for a try-out without an account",
    "router": "The local router: serve, admin-link, join-key, model, assign, api-key, agents, …",
    "version": "Print the version",
    "licenses": "Print the licences of everything in this program",
}


class LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"xim_agent.cli.{cmd_name.replace('-', '_')}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        formatter.write_paragraph()
        formatter.write_text("Options of `run` (a flag wins over its variable, an empty one counts as unset):")
        write_options(formatter)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, message=f"%(prog)s %(version)s (XIM protocol {PROTOCOL})")
def cli() -> None:
    """Serves language models with vLLM as a worker of a XIM router, without an open port."""


def main(args: Sequence[str]) -> int:
    """Runs one command; returns the exit code. Every exception becomes a message here and nowhere else."""
    return guarded(lambda: _run(list(args)))


def _run(args: list[str]) -> object:
    """Without click's own `main`, which ends with 1 where the reader of the output went away (`| head`)."""
    with cli.make_context("xerotier-xim-agent", args) as ctx:
        return cli.invoke(ctx)
