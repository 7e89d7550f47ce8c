from typing import Any

import click

from xim_agent.cli.common import IDENTITY, configured, identity
from xim_agent.cli.options import agent_command
from xim_agent.errors import AgentError, Exit


async def _leave(config: Any) -> None:
    async with identity(config) as (service, router):
        if not service.enrolled:
            raise AgentError(
                "not_enrolled",
                f"no credential in {config.config_path}",
                hint="nothing to leave; --config-path names another directory",
                exit_code=Exit.CONFIG,
            )
        await service.enroll_once()
        await router.leave()
        kept = await service.left()
        click.echo(f"left the router; the old credential is kept as {kept}", err=True)


@agent_command(
    "leave",
    "Deregister this agent at the router and set its credential aside.\n\nA plain stop never does this.",
    only=IDENTITY - {"join_key", "join_key_file"},
)
def command(**flags: Any) -> None:
    import trio

    trio.run(_leave, configured(flags))
