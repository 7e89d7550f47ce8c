import sys
from functools import partial
from typing import Any

from xim_agent.cli.common import configured
from xim_agent.cli.options import agent_command
from xim_agent.cli.park import or_park


async def _run(config: Any, guard: Any) -> None:
    import trio

    from xim_agent import agent
    from xim_agent.assemble import assemble
    from xim_agent.cli.bar import show_transfers
    from xim_agent.heap import settle_heap

    async with assemble(config, guard) as made, trio.open_nursery() as nursery:
        settle_heap()
        if sys.stderr.isatty():
            nursery.start_soon(show_transfers, lambda: made.assignment.progress)
        await agent.run(made.parts, stop=made.stop)
        nursery.cancel_scope.cancel()


def _serve(flags: dict[str, Any]) -> None:
    config = configured(flags)

    from xim_agent.engine.guard import Guard, die_with_parent

    die_with_parent()
    # Forked before trio starts and before the state is locked: a later child would keep the lock.
    guard = Guard.start()

    import trio

    try:
        trio.run(_run, config, guard)
    finally:
        guard.close()


@agent_command("run", "Serve models as a worker of a router; enrolls first when there is no credential.")
def command(**flags: Any) -> None:
    or_park(partial(_serve, flags), flags)
