"""`router agents`: what the local router's operator does with agents."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from xim_agent.cli.router_store import DATA, open_store
from xim_agent.cli.table import JSON, ago, cell, show

_AGENT = click.argument("agent", metavar="AGENT")


@click.group("agents")
def command() -> None:
    """Agents that joined. AGENT is an id, the beginning of one, or a name that only one agent has."""


@command.command("ls")
@click.option("--all", "removed", is_flag=True, help="Also those that left or were removed")
@JSON
@DATA
def ls(removed: bool, as_json: bool, data: Path) -> None:
    """All agents: pending (never polled), active, draining, suspended, disconnected (75 s silent), dead (10 min)."""
    from xim_agent.router import roster
    from xim_agent.router.jobs import Limits

    now = time.time()
    with open_store(data, old=True) as store:
        found = roster.listed(store.db, now, Limits(), removed=removed)
    columns = {
        **{name.upper(): cell(name) for name in ("id", "name", "status", "credential", "project", "region")},
        "WORKER": cell("worker_id"),
        "LAST SEEN": lambda agent: ago(agent["last_seen"], now),
    }
    show(found, columns, as_json)


def _act(data: Path, wanted: str, done: str, change: Callable[[Any, str], None]) -> None:
    """Finds the agent, changes it and says what happened."""
    from xim_agent.router import roster

    with open_store(data, old=True) as store:
        agent = roster.find(store.db, wanted)
        change(store.db, agent["agent_id"])
    click.echo(f"agent {agent['agent_id']} ({agent['name']}) {done}", err=True)


@command.command()
@_AGENT
@DATA
def suspend(agent: str, data: Path) -> None:
    """Give it no work until `resume`. Requests that it has it finishes, and its credential stays fresh."""
    from xim_agent.router import roster

    _act(data, agent, "is suspended", partial(roster.suspend, now=time.time()))


@command.command()
@_AGENT
@DATA
def resume(agent: str, data: Path) -> None:
    """Give it work again; it notices within 30 s."""
    from xim_agent.router import roster

    _act(data, agent, "may take work again", partial(roster.resume, now=time.time()))


@command.command()
@_AGENT
@DATA
def drain(agent: str, data: Path) -> None:
    """Have it finish what it has and take nothing new until `undrain`. Its engine stays up."""
    from xim_agent.router import roster

    _act(data, agent, "drains", partial(roster.drain, now=time.time()))


@command.command()
@_AGENT
@DATA
def undrain(agent: str, data: Path) -> None:
    """End what `drain` began."""
    from xim_agent.router import roster

    _act(data, agent, "does not drain any more", partial(roster.undrain, now=time.time()))


@command.command()
@_AGENT
@DATA
def remove(agent: str, data: Path) -> None:
    """Remove it for good: it stops at once (exit code 12) and can only come back with a new join key."""
    from xim_agent.router import roster

    _act(data, agent, "is removed", partial(roster.remove, now=time.time()))


@command.command("revoke-credentials")
@_AGENT
@DATA
def revoke_credentials(agent: str, data: Path) -> None:
    """Make its tokens open nothing any more, at once.

    It enrolls again by itself when its join key is still configured and good, else it stops (exit code 11). To shut out
    who has copied the join key, too, revoke that first: `router join-key revoke`.
    """
    from xim_agent.router import roster

    _act(data, agent, "must enroll again", partial(roster.revoke_credentials, now=time.time()))
