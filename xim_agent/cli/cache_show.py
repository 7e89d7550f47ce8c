"""What `cache ls` and `cache verify` print for people."""

from collections.abc import Callable, Mapping
from typing import Any

import click

from xim_agent.cli.progress import size
from xim_agent.cli.table import Row, ago, cell, plain, show

_TIERS = {
    "blobs": "chunks",
    "ready": "ready files",
    "partial": "unfinished",
    "quarantine": "quarantine",
    "compile": "compile caches",
    "other": "index and directories",
}


def show_listing(found: Mapping[str, Any], partials: bool, now: float) -> None:
    """`now`: Unix seconds."""
    if found["disk_size"] is None:
        click.echo(f"there is no model cache in {plain(found['directory'])} yet")
        return
    rows = [row for row in found["models"] if partials or row["state"] != "partial"]
    hidden = len(found["models"]) - len(rows)
    columns: dict[str, Callable[[Row], str]] = {
        "MODEL": cell("model"),
        "REVISION": cell("revision"),
        "STATE": _state,
        "SIZE": lambda row: size(row["size"]),
        "ON DISK": lambda row: size(row["stored_bytes"] + row["ready_bytes"] + row["partial_bytes"]),
        "SAVED": lambda row: "" if row["saved"] is None else f"{row['saved']:.0%}",
        "LAST USED": lambda row: "now" if row["state"] == "in use" else ago(row["last_used"], now),
    }
    if rows:
        show(rows, columns, False)
    else:
        click.echo("no models")
    if hidden:
        click.echo(f"{hidden} unfinished not shown: --partials")
    parts = [f"{name} {size(found['tiers'][tier])}" for tier, name in _TIERS.items() if found["tiers"][tier]]
    click.echo(f"\nused {size(found['used'])} of {size(found['bound'])}: {', '.join(parts)}")
    free = f"disk {size(found['disk_free'])} free of {size(found['disk_size'])}"
    click.echo(f"{free}, {size(found['reserve'])} of it left to others")


def _state(row: Row) -> str:
    state = str(row["state"])
    return f"{state} {row['percent']} %" if state in ("preparing", "partial") else state


def show_verified(result: Mapping[str, Any]) -> None:
    for damage in result["damaged"]:
        of = f" of {', '.join(damage['models'])}" if damage["models"] else ""
        click.echo(plain(f"damaged {damage['what']} {damage['name']}{of}: {damage['done']}"))
    for name in result["unchecked"]:
        click.echo(plain(f"cannot be checked, its manifest is lost: ready copy of {name}"))
    what = f"{result['chunks']} chunks and {result['files']} files, {size(result['bytes'])}"
    if result["damaged"]:
        click.echo(f"{what}: {len(result['damaged'])} damaged")
    else:
        rest = ", what could be checked" if result["unchecked"] else ""
        click.echo(f"{what}: all as they should be{rest}")
