"""`router admin-link`: what signs a browser in to the dashboard."""

from pathlib import Path

import click

from xim_agent.cli.router_store import DATA, check_url, open_store


@click.command("admin-link")
@click.option("--read-only", is_flag=True, help="For somebody who looks and changes nothing")
@click.option("--revoke-others", is_flag=True, help="End every session and every other link before")
@click.option("--url", metavar="URL", help="Where your browser reaches the router  [default: its first public URL]")
@DATA
def command(read_only: bool, revoke_others: bool, url: str | None, data: Path) -> None:
    """Print a new link to the dashboard. It works once, within 24 hours, and cannot be shown again.

    What it signs in lasts 7 days, or until nobody used it for 12 hours. A running router knows the link at once.
    """
    import time

    from xim_agent.router.dashboard import sessions

    if url is not None:
        check_url(url, "--url")
    with open_store(data) as store:
        if not store.served_before and url is None:
            click.echo(
                f"this router never ran: the link says {store.public_urls[0]}, where it listens by default", err=True
            )
        if revoke_others:
            ended = sessions.revoke(store.db)
            click.echo(f"{ended} session{'' if ended == 1 else 's'} ended", err=True)
        token = sessions.make_link(store.db, time.time(), "read-only" if read_only else "admin")
        base = url or store.public_urls[0]
    click.echo(
        f"signs in once, within {sessions.LINK_LIFE / 3600:.0f} hours{', to look only' if read_only else ''}:", err=True
    )
    click.echo(sessions.link(base, token))
