"""`cache`: what lies in the model cache, and what an operator does to it. Data goes to stdout alone."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import click

from xim_agent.cli.common import asked, ignore
from xim_agent.cli.options import AgentCommand
from xim_agent.errors import Exit

_ONLY = frozenset({"model_cache_path", "model_cache_max_size_gb"})
_GONE = {
    "ready": "ready copy of",
    "chunks": "chunks of",
    "partial": "unfinished parts of",
    "quarantine": "quarantine",
    "orphans": "chunks of no model",
    "compile": "compile cache of vLLM",
}

_MODEL = click.argument("model", metavar="MODEL[@REV]")


@click.group("cache")
def command() -> None:
    """The model cache of this host's agent, while it runs (through its control socket) and while it does not.

    MODEL is a name or an id as `ls` shows it, or 12 digits or more of a manifest's digest.

    \b
    Exit codes:
      0   done
      1   no such model or cache, more than one, or no ready copy
      2   wrong usage
      3   `verify` found damage
      4   the model is in use or being prepared; a verification runs already
      14  another process holds the cache and does not answer
      77  the cache cannot be read or written, or has another format
      78  a setting is wrong
      130 Ctrl-C
    """


def _do(
    flags: Mapping[str, Any], name: str, arguments: Mapping[str, Any], report: Callable[[Any], None] = ignore
) -> Any:
    """The result; None where there is no cache and `name` is `ls`."""
    from xim_agent.cli.cache_reach import reach

    return asked(reach, flags, f"cache/{name}", arguments, report)


@command.command(cls=AgentCommand, only=_ONLY)
@click.option("--partials", is_flag=True, help="Also models of which only a part is here")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with all models; sizes in bytes")
def ls(partials: bool, as_json: bool, **flags: Any) -> None:
    """Show the models in the cache.

    STATE: in use (the engine has it open), preparing, ready (files and, as a rule, chunks), stored (compressed chunks
    only; comes back without the network), partial. SAVED: share of the size that compression saves in the chunks.
    """
    import json

    found = _do(flags, "ls", {})
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    from xim_agent.cli.cache_show import show_listing

    show_listing(found, partials, time.time())


@command.command(cls=AgentCommand, only=_ONLY)
@click.argument("model", metavar="[MODEL[@REV]]", required=False)
def verify(model: str | None, **flags: Any) -> int:
    """Read and hash what is stored and ready; of all models, or of one.

    Damaged chunks are removed (they are fetched again when they are needed). A damaged ready copy goes to the
    quarantine, unless its model is in use: then it stays, and the agent's health says so. Serving goes on meanwhile;
    Ctrl-C ends it at once. Exit code 3 when anything was damaged.
    """
    from xim_agent.cli.cache_show import show_verified
    from xim_agent.cli.progress import Display, bytes_text

    began = time.monotonic()
    with Display() as display:

        def report(progress: Any) -> None:
            done, total = progress
            rate = done / max(time.monotonic() - began, 0.001)
            display.show("verifying the cache", done=done, total=total, detail=bytes_text(done, total, rate))

        result = _do(flags, "verify", {"model": model}, report)
    show_verified(result)
    return Exit.DAMAGED if result["damaged"] else Exit.OK


@command.command(cls=AgentCommand, only=_ONLY)
@_MODEL
def rm(model: str, **flags: Any) -> None:
    """Remove a model: its files, its parts, and the chunks that no other model has.

    Refused while it is in use or being prepared (exit code 4).
    """
    _removed(_do(flags, "rm", {"model": model}), "freed")


@command.command(cls=AgentCommand, only=_ONLY)
@click.option("--dry-run", is_flag=True, help="Only show what would go")
@click.option("--all", "everything", is_flag=True, help="Also every model that is neither in use nor being prepared")
def prune(dry_run: bool, everything: bool, **flags: Any) -> None:
    """Remove what costs no download to lose.

    That is: the quarantine, chunks of no model, parts that nobody has continued for 24 h, compile caches of other
    versions of vLLM, and ready copies that are not in use and whose chunks are all stored. With --all also the rest of
    the models that are not in use. While no agent runs, the model used last is kept in any case, because the agent
    begins with it; `rm` removes that too.
    """
    gone = _do(flags, "prune", {"everything": everything, "dry_run": dry_run})
    _removed(gone, "would free" if dry_run else "freed")


@command.command(cls=AgentCommand, only=_ONLY)
@_MODEL
def path(model: str, **flags: Any) -> None:
    """Print the directory with the model's files, and nothing else.

    Exit code 1 when only compressed chunks or parts are here.
    """
    click.echo(_do(flags, "path", {"model": model}))


def _removed(gone: list[dict[str, Any]], verb: str) -> None:
    from xim_agent.cli.progress import size
    from xim_agent.cli.table import plain

    for one in gone:
        click.echo(f"{plain(' '.join(filter(None, (_GONE[one['what']], one['name']))))}: {size(one['bytes'])}")
    click.echo(f"{verb} {size(sum(one['bytes'] for one in gone))}" if gone else "nothing to remove")
