"""`support-bundle`: one file for support. Written at once, after every part was looked through for secrets."""

import os
import time
from pathlib import Path
from typing import Any

import click

from xim_agent import __version__
from xim_agent.cli.common import configured
from xim_agent.cli.options import AgentCommand
from xim_agent.errors import AgentError, Exit

_HELP = """Write one file that tells support how this agent and this machine are.

In it, as JSON: status, requests without content, the last lines of the agent and of vLLM, configuration, cache, plan,
doctor, hardware and versions. Takes the settings of `run`, works beside a running agent and without one, and changes
nothing; what could not be had is named. Secrets are taken out; then all of it is searched for each secret that is known
here or to the agent, as it is and as base64, hexadecimal or in a URL. Where one is found nothing is written.

\b
Exit codes:
  0   written
  2   wrong usage
  3   a secret was found: member and kind are named, nothing is written
  77  the file cannot be written, or is there already
"""


@click.command("support-bundle", cls=AgentCommand, help=_HELP)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The file to make, mode 0600  [default: xim-support-TIME.tar.gz here]",
)
def command(output: Path | None, **flags: Any) -> None:
    from xim_agent.doctor.report import from_error, ok

    config = None
    try:
        config = configured(flags)
        finding = ok("configuration", "every setting is valid")
    except AgentError as error:
        finding = from_error("configuration", error)

    import trio

    from xim_agent import log
    from xim_agent.cli.support_collect import checked, collect

    if config is None or config.log_level in ("info", "warning"):
        log.set_level("error")
    found = trio.run(collect, config, finding, dict(os.environ))
    members = checked(found)
    path = output or Path(time.strftime("xim-support-%Y%m%d-%H%M%S.tar.gz"))
    write(path, members)
    for name, problem in found.problems.items():
        click.echo(f"without {name}: {problem}", err=True)
    click.echo(path)


def write(path: Path, members: dict[str, str]) -> None:
    """Raises AgentError `bundle_write` (exit 77). Nothing is left of a file that could not be written whole."""
    import io
    import tarfile

    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, text in sorted(members.items()):
            data = text.encode(errors="replace")
            entry = tarfile.TarInfo(f"xim-support-{__version__}/{name}")
            entry.size, entry.mode, entry.mtime = len(data), 0o600, int(time.time())
            tar.addfile(entry, io.BytesIO(data))
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(packed.getvalue())
        except OSError:
            path.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise AgentError(
            "bundle_write",
            f"cannot write {path}: {error.strerror or error}",
            hint="name another file with --output",
            exit_code=Exit.STATE,
        ) from error
