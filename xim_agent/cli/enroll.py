from typing import Any

from xim_agent.cli.common import IDENTITY, configured, identity
from xim_agent.cli.options import agent_command


async def _enroll(config: Any) -> None:
    async with identity(config) as (service, _):
        await service.enroll_once()


@agent_command(
    "enroll",
    "Enroll with a join key and exit.\n\nTries each router of the join key once. With a credential that works, nothing "
    "changes and the join key is not used.",
    only=IDENTITY,
)
def command(**flags: Any) -> None:
    import trio

    trio.run(_enroll, configured(flags))
