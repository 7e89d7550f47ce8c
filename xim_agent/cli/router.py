"""The local router's commands. Data goes to stdout alone, everything else to stderr."""

from pathlib import Path
from typing import Any

import click

from xim_agent.cli import router_admin_link, router_agents, router_join_key, router_models
from xim_agent.cli.router_store import DATA, check_url, open_store, project_name

_PEM = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group("router", help="The local router: for trying out, for tests and for small private fleets.")
def command() -> None:
    pass


command.add_command(router_join_key.command)
command.add_command(router_admin_link.command)
command.add_command(router_agents.command)
command.add_command(router_models.command)


def _networks(ctx: click.Context, param: click.Parameter, words: tuple[str, ...]) -> tuple[Any, ...]:
    import ipaddress

    try:
        return tuple(ipaddress.ip_network(word) for word in words)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@command.command()
@click.option("--listen", default="127.0.0.1:8080", show_default=True, metavar="HOST:PORT", help="Where to listen")
@click.option(
    "--public-url",
    "public_urls",
    multiple=True,
    metavar="URL",
    help="Where agents and clients reach it (repeatable, kept with the data)  [default: http://LISTEN]",
)
@click.option("--tls-cert", type=_PEM, help="Certificate chain, PEM; needs --tls-key")
@click.option("--tls-key", type=_PEM, help="Private key of the certificate, PEM")
@click.option(
    "--dashboard-from",
    "viewers",
    multiple=True,
    callback=_networks,
    metavar="NETWORK",
    help="Network whose browsers count as on this machine, as 172.17.0.0/16: no warning about plain http (repeatable)",
)
@DATA
def serve(
    listen: str,
    public_urls: tuple[str, ...],
    tls_cert: Path | None,
    tls_key: Path | None,
    viewers: tuple[Any, ...],
    data: Path,
) -> None:
    """Run the router until SIGINT or SIGTERM."""
    import trio

    from xim_agent.cli.private import keep_private
    from xim_agent.engine.guard import die_with_parent
    from xim_agent.router.server import raise_file_limit
    from xim_agent.router.store import Store, router_lock

    keep_private()
    die_with_parent()
    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key go together")
    for url in public_urls:
        check_url(url, "--public-url")
    raise_file_limit()
    with router_lock(data), Store.open(data) as store:
        trio.run(_serve, store, listen, public_urls, tls_cert, tls_key, viewers)


async def _serve(
    store: Any,
    listen: str,
    public_urls: tuple[str, ...],
    tls_cert: Path | None,
    tls_key: Path | None,
    viewers: tuple[Any, ...],
) -> None:
    import signal
    import time
    from functools import partial

    import trio

    from xim_agent.router.app import make_app
    from xim_agent.router.app import serve as run
    from xim_agent.router.dashboard import sessions

    app = make_app(store)
    app.dashboard.also = viewers
    token = sessions.make_link(store.db, time.time(), at_start=True)
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            go = partial(run, app, listen, public_urls=public_urls, tls_cert=tls_cert, tls_key=tls_key)
            bound = await nursery.start(go)
            click.echo(f"router is listening on {' '.join(bound)}", err=True)
            click.echo(f"agents and clients use {' '.join(store.public_urls)}", err=True)
            link = sessions.link(store.public_urls[0], token)
            click.echo(f"the dashboard opens once by {link} (`router admin-link` makes another)", err=True)
            async for _ in signals:
                break
            click.echo("router stops", err=True)
            nursery.cancel_scope.cancel()


@command.command("rotate-signing-key")
@click.option("--compromised", is_flag=True, help="Take every older key out of use at once, not after two rotations")
@DATA
def rotate_signing_key(compromised: bool, data: Path) -> None:
    """Sign tokens and assignments with a new key.

    Agents follow without enrolling again, also those that are off meanwhile: the root key, which they were told with
    the join key, vouches for the new one. Prints the new key's id.
    """
    import time

    from xim_agent.router import keyring

    now = time.time()
    with open_store(data) as store:
        store.keys(now)  # there is a first one
        kid = keyring.rotate(store.db, now, keep=0 if compromised else keyring.KEEP)
    older = "no older one is accepted any more" if compromised else f"the {keyring.KEEP} before it are still accepted"
    click.echo(f"a new key signs from now on; {older}", err=True)
    click.echo(kid)


@command.command()
@click.argument("target", metavar="NAME[@REV]")
@click.option("--agent", metavar="ID", help="[default: all agents, present and future]")
@DATA
def assign(target: str, agent: str | None, data: Path) -> None:
    """Have agents serve a published model; its newest revision unless REV is given."""
    from xim_agent.router import catalog

    name, _, revision = target.rpartition("@") if "@" in target else (target, "", "")
    with open_store(data) as store:
        done = catalog.assign(store.db, name, revision or None, agent)
    whom = f"agent {agent}" if agent else "all agents"
    click.echo(f"{done.model.name}@{done.model.revision} goes to {whom}, generation {done.generation}", err=True)


@command.group("api-key")
def api_key() -> None:
    """Keys of clients."""


@api_key.command("create")
@click.option("--project", required=True, help="Project whose agents answer its requests")
@DATA
def create_api_key(project: str, data: Path) -> None:
    """Print a new API key. It cannot be shown again."""
    import time

    from xim_agent.router import catalog

    with open_store(data) as store:
        key = catalog.create_api_key(store.db, project_name(project), time.time())
    click.echo(key)
