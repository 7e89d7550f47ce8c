"""Exceptions → message, hint and exit code. The only place that does."""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from xim_agent.errors import AgentError, Exit, leaves

log = logging.getLogger("xim_agent")


def show(error: AgentError) -> None:
    from xim_agent.log import redact

    click.echo(redact(f"error: {error.message} [{error.code}]"), err=True)
    if error.hint:
        click.echo(redact(f"\nhint: {error.hint}"), err=True)


def code_of(error: BaseException) -> int:
    """Prints what a person needs and returns the exit code.

    Named errors win only when every leaf is one: a bug beside them shows its traceback and counts as a bug.
    """
    found = [e for e in leaves(error) if not isinstance(e, KeyboardInterrupt)]
    if not found:
        return 130
    for leaf in found:
        if isinstance(leaf, click.ClickException):
            leaf.show()
            return Exit.USAGE
        if isinstance(leaf, click.Abort):
            return 130
        if isinstance(leaf, click.exceptions.Exit):
            return leaf.exit_code
    if bugs := [e for e in found if not isinstance(e, AgentError)]:
        log.error("a bug in the agent", exc_info=error)
        names = ", ".join(sorted({type(e).__name__ for e in bugs}))
        click.echo(f"error: unexpected {names}; this is a bug, please report it with the traceback above", err=True)
        return Exit.BUG
    named = [e for e in found if isinstance(e, AgentError)]
    for leaf in {(e.code, e.message): e for e in named}.values():  # two services may meet the same wall
        show(leaf)
    return code_of_named(named)


def code_of_named(found: Sequence[AgentError]) -> int:
    """The exit code of what may be several errors: the first that is no bug's."""
    return max((e.exit_code for e in found), key=lambda code: code != Exit.BUG)


def guarded(action: Callable[[], Any]) -> int:
    """Runs `action`; its int result is the exit code, anything else 0."""
    try:
        result = action()
    except (Exception, KeyboardInterrupt) as error:
        if all(isinstance(leaf, BrokenPipeError) for leaf in leaves(error)):
            # The reader of our output went away (`| head`); the interpreter's flush at exit must not complain again.
            sys.stdout = None
            return Exit.OK
        return int(code_of(error))
    return result if isinstance(result, int) else Exit.OK
