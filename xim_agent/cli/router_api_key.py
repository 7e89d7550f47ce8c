"""`router api-key`: what lets clients ask the local router."""

import time
from pathlib import Path

import click

from xim_agent.cli.router_store import DATA, open_store
from xim_agent.cli.table import JSON, ago, cell, moment, show
from xim_agent.router.names import key_name, project_name


@click.group("api-key")
def command() -> None:
    """Keys of clients."""


@command.command("create")
@click.option("--project", required=True, help="Project whose agents answer its requests")
@click.option("--name", default="", help="What you call it, such as who uses it")
@DATA
def create(project: str, name: str, data: Path) -> None:
    """Print a new API key. It cannot be shown again."""
    from xim_agent.router import catalog

    project_name(project)
    with open_store(data) as store:
        key = catalog.create_api_key(store.db, project, time.time(), key_name(name))
    click.echo(key)


@command.command("ls")
@JSON
@DATA
def ls(as_json: bool, data: Path) -> None:
    """All API keys: their ids and how they begin, never the keys themselves."""
    from xim_agent.router import catalog

    now = time.time()
    with open_store(data, old=True) as store:
        found = catalog.api_keys(store.db)
    columns = {
        **{name.upper(): cell(name) for name in ("id", "name", "project", "state")},
        "BEGINS": cell("beginning"),
        "CREATED": lambda key: moment(key["created"]),
        "LAST USED": lambda key: ago(key["last_used"], now),
    }
    show(found, columns, as_json)


@command.command("revoke")
@click.argument("key_id", metavar="ID")
@DATA
def revoke(key_id: str, data: Path) -> None:
    """Make the API key with this ID open nothing any more; answers that run end as they do."""
    from xim_agent.router import catalog

    with open_store(data, old=True) as store:
        catalog.revoke_api_key(store.db, key_id, time.time())
    click.echo(f"API key {key_id} is revoked", err=True)
