"""What the local router's commands share: `--data`, and the database behind it."""

import re
from pathlib import Path
from typing import Any

import click

from xim_agent.errors import AgentError, Exit

DATA = click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    metavar="DIR",
    help="The router's directory: database, models",
)


def open_store(data: Path, *, old: bool = False) -> Any:
    """For commands, which work before the router ever ran: says so, in case that DIR was mistyped.

    `old`: for those that make no sense then. Raises AgentError `router_unknown`, exit 2.
    """
    from xim_agent.router.store import FILE, Store

    new = not (data / FILE).exists()
    if new and old:
        hint = "give the --data of the router that is meant"
        raise AgentError("router_unknown", f"there is no router in {data}", hint=hint, exit_code=Exit.USAGE)
    store = Store.open(data)
    if new:
        click.echo(f"there was no router in {data}: this is a new one", err=True)
    return store


def project_name(name: str) -> str:
    """Raises AgentError `project_invalid`, exit 2."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
        raise AgentError(
            "project_invalid",
            f"{name!r} is no project name",
            hint="letters, digits, `.`, `_` and `-`, at most 63, the first one a letter or digit",
            exit_code=Exit.USAGE,
        )
    return name


def check_url(url: str, option: str) -> None:
    """Of a router. Raises AgentError `public_url_invalid`, exit 2."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        good = good and not parts.query and not parts.fragment and parts.username is None
    except ValueError:
        good = False
    if not good:
        hint = "for example https://router.example:8443"
        raise AgentError("public_url_invalid", f"{option} {url!r} is no URL", hint=hint, exit_code=Exit.USAGE)
