import click

from xim_agent import PROTOCOL, __version__


@click.command("version", help="Print the version")
def command() -> None:
    click.echo(f"xerotier-xim-agent {__version__} (XIM protocol {PROTOCOL})")
