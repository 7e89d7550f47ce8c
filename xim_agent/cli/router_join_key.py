"""`router join-key`: what lets agents join the local router."""

import re
from pathlib import Path

import click

from xim_agent.cli.router_store import DATA, open_store
from xim_agent.cli.table import JSON, cell, moment, show
from xim_agent.router.names import project_name

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _seconds(ctx: click.Context, param: click.Parameter, value: str) -> float:
    """`90s`, `30m`, `24h`, `7d`."""
    match = re.fullmatch(r"0*([1-9][0-9]{0,8})([smhd])", value)
    if match is None:
        raise click.BadParameter(f"{value!r} is no time like 90s, 30m, 24h or 7d")
    return float(int(match[1]) * _UNITS[match[2]])


@click.group("join-key")
def command() -> None:
    """Keys that let an agent join."""


@command.command("create")
@click.option("--project", required=True, help="Project its agents belong to")
@click.option("--region", default="local", show_default=True, help="Region of its agents")
@click.option("--uses", type=click.IntRange(1), default=1, show_default=True, help="How many agents may join by it")
@click.option("--expires", callback=_seconds, default="24h", show_default=True, help="How long it is valid")
@DATA
def create(project: str, region: str, uses: int, expires: float, data: Path) -> None:
    """Print a new join key. It cannot be shown again."""
    import time

    now = time.time()
    with open_store(data) as store:
        urls = store.public_urls
        if not store.served_before:
            click.echo(f"this router never ran: the key says {urls[0]}, where it listens by default", err=True)
        number, key = store.create_join_key(
            project=project_name(project), region=region, uses=uses, expires_at=now + expires, now=now
        )
    click.echo(f"key {number}, for {uses} agent{'s' if uses > 1 else ''}, by way of {' '.join(urls)}", err=True)
    click.echo(key)


@command.command("ls")
@JSON
@DATA
def ls(as_json: bool, data: Path) -> None:
    """All join keys: their numbers and what is left of them, never the keys themselves."""
    import time

    from xim_agent.router import join_keys

    now = time.time()
    with open_store(data, old=True) as store:
        found = join_keys.listed(store.db, now)
    columns = {
        **{name.upper(): cell(name) for name in ("id", "project", "region", "state")},
        "USES LEFT": cell("uses_left"),
        "AGENTS": cell("agents"),
        "CREATED": lambda key: moment(key["created"]),
        "EXPIRES": lambda key: moment(key["expires"]),
    }
    show(found, columns, as_json)


@command.command("revoke")
@click.argument("number", type=click.IntRange(1))
@DATA
def revoke(number: int, data: Path) -> None:
    """Make join key NUMBER open nothing any more. Agents that it enrolled are unaffected."""
    import time

    from xim_agent.router import join_keys

    with open_store(data, old=True) as store:
        join_keys.revoke(store.db, number, time.time())
    click.echo(f"join key {number} is revoked; agents that it enrolled are unaffected", err=True)
