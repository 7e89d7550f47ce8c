"""What a person reads when something failed. Imports nothing of ours, so that every layer can raise these."""

from collections.abc import Iterator
from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of the executable; systemd does not restart on those of `FINAL`: 2, 10-15, 77 and 78."""

    OK = 0
    MISSING = 1
    USAGE = 2
    DAMAGED = 3
    BUSY = 4
    JOIN_KEY_REFUSED = 10
    CREDENTIAL_REVOKED = 11
    REMOVED = 12
    PROTOCOL = 13
    ALREADY_RUNNING = 14
    TOKEN_REFUSED = 15
    NO_ROUTER = 69
    BUG = 70
    STATE = 77
    CONFIG = 78


# Trying the same again would end the same way: a person has to act first.
FINAL = frozenset(
    {
        *(Exit.USAGE, Exit.JOIN_KEY_REFUSED, Exit.CREDENTIAL_REVOKED, Exit.REMOVED, Exit.PROTOCOL),
        *(Exit.ALREADY_RUNNING, Exit.TOKEN_REFUSED, Exit.STATE, Exit.CONFIG),
    }
)


class AgentError(Exception):
    """A failure with a name.

    `code` is stable snake case (logs, metrics, tests), `message` says what failed and with which value, `hint` what to
    do next, `exit_code` how the process ends when nobody handles it.
    """

    def __init__(self, code: str, message: str, *, hint: str = "", exit_code: int = Exit.BUG) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.exit_code = int(exit_code)


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The exceptions inside nested groups, or the exception itself."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error
