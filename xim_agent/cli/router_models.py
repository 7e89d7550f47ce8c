"""`router model`: what the local router's operator does with published models."""

import json
import time
from pathlib import Path
from typing import Any

import click

from xim_agent.cli.router_store import DATA, open_store
from xim_agent.cli.table import JSON, ago, cell, plain, show


@click.group("model")
def command() -> None:
    """Models that agents can be given."""


@command.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="What clients call it")
@click.option("--revision", metavar="REV", help="[default: made from the content]")
@DATA
def publish(path: Path, name: str, revision: str | None, data: Path) -> None:
    """Compress the model in directory PATH into chunks and a manifest. Prints NAME@REV.

    Several may run at once, beside a running router. One that was cut off is simply run again.
    """
    from xim_agent.cli.progress import Display
    from xim_agent.engine.guard import die_with_parent
    from xim_agent.router.publish import check_name

    die_with_parent()
    check_name(name)
    with open_store(data) as store, Display() as display:
        done = publish_model(store, path, name, revision, display)
    click.echo(f"{done.name}@{done.revision}")


def publish_model(store: Any, path: Path, name: str, revision: str | None, display: Any) -> Any:
    """Publishes below the store's directory and registers what came of it (`catalog.Published`). Blocks."""
    from xim_agent.cli.progress import bytes_text
    from xim_agent.router import catalog
    from xim_agent.router.models import changing
    from xim_agent.router.publish import publish

    def show_progress(done: int, total: int) -> None:
        display.show("compressing the model", done=done, total=total, detail=bytes_text(done, total, 0))

    def waits() -> None:
        display.say("waiting for `router model rm` or `gc`, which runs")

    path = path.expanduser()
    task = catalog.task_of(_config(path), [p.name for p in path.iterdir()] if path.is_dir() else [])
    with changing(store.directory, waits, alone=False):
        done = publish(path, name, revision, store.directory, progress=show_progress)
        manifest = f"sha256:{done.manifest_sha256}"
        row = (done.name, done.revision, done.id, manifest, done.size_bytes, done.stored_bytes, task, time.time())
        published = catalog.Published(*row)
        catalog.register(store.db, published)
    for dropped in done.dropped:
        display.say(plain(f"left out: {dropped}"))
    share = done.stored_bytes / done.size_bytes if done.size_bytes else 1.0
    display.say(f"{done.size_bytes:,} bytes, {share:.0%} of that stored, task {task}")
    return published


def _config(path: Path) -> dict[str, Any]:
    try:
        value = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


@command.command()
@JSON
@DATA
def ls(as_json: bool, data: Path) -> None:
    """Published models, newest first: size of the files, size as stored, and who has it assigned."""
    from xim_agent.cli.progress import size
    from xim_agent.router.models import listed

    now = time.time()
    with open_store(data, old=True) as store:
        found = listed(store.db)
    columns = {
        "MODEL": cell("model"),
        "REVISION": cell("revision"),
        "TASK": cell("task"),
        "SIZE": lambda row: size(row["size"]),
        "STORED": lambda row: size(row["stored"]),
        "SHARE": lambda row: f"{row['stored'] / row['size']:.0%}" if row["size"] else "",
        "ASSIGNED TO": lambda row: "all" if "*" in row["agents"] else ", ".join(row["agents"]),
        "PUBLISHED": lambda row: ago(row["published"], now),
    }
    show(found, columns, as_json)


@command.command()
@click.argument("target", metavar="NAME[@REV]")
@DATA
def rm(target: str, data: Path) -> None:
    """Remove a model and every chunk that no other one needs. Refused (exit 4) while it is assigned.

    Agents that still serve it go on; they need no router for that.
    """
    from xim_agent.router.models import changing, unregister

    name, _, revision = target.rpartition("@") if "@" in target else (target, "", "")
    with open_store(data, old=True) as store, changing(store.directory, _waits, alone=True):
        done = unregister(store.db, name, revision or None)
        click.echo(f"{done.name}@{done.revision} is removed", err=True)
        _collect(store, dry_run=False)


@command.command()
@click.option("--dry-run", is_flag=True, help="Only say what would go")
@DATA
def gc(dry_run: bool, data: Path) -> None:
    """Remove what no published model needs: left by a publish that was cut off, or by one that replaced a revision."""
    from xim_agent.router.models import changing

    with open_store(data, old=True) as store, changing(store.directory, _waits, alone=True):
        _collect(store, dry_run=dry_run)


def _waits() -> None:
    click.echo("waiting for a publish that runs", err=True)


def _collect(store: Any, *, dry_run: bool) -> None:
    from xim_agent.cli.progress import size
    from xim_agent.router.models import garbage, sweep

    found = garbage(store.db, store.directory)
    if not dry_run:
        sweep(found)
    others = len(found.paths) - found.chunks
    more = f" and {others} other files" if others else ""
    click.echo(f"{found.chunks} chunks{more}, {size(found.bytes)}, {'would go' if dry_run else 'are gone'}", err=True)
