"""Which requests bring the engine down. Pure.

One that was running at two crashes in a row is refused from then on, until another engine is started. A request is
known by its path and body: a client, or the router, that asks again asks with another identifier.
"""

import hashlib
from collections.abc import Iterable

from xim_agent.errors import AgentError

MOST = 1000  # refused at once; the oldest are forgotten first


class Poisonous(AgentError):
    def __init__(self) -> None:
        super().__init__("poison_request", "the engine crashed twice in a row while it worked on this request")


def mark(path: str, body: bytes) -> bytes:
    """1 ms a megabyte, so it is asked for only while there is a suspicion."""
    return hashlib.blake2b(body, digest_size=16, key=hashlib.blake2b(path.encode()).digest()).digest()


class Poison:
    """`mark`s of requests."""

    def __init__(self) -> None:
        self._suspects: frozenset[bytes] = frozenset()
        self._refused: dict[bytes, None] = {}

    @property
    def watchful(self) -> bool:
        """There is a request that is refused, or may be after the next crash."""
        return bool(self._suspects or self._refused)

    def refuses(self, request: bytes) -> bool:
        return request in self._refused

    def crashed(self, running: Iterable[bytes]) -> int:
        """Returns how many of those that were running are refused from now on."""
        now = frozenset(running)
        guilty = now & self._suspects
        self._refused |= dict.fromkeys(guilty)
        for oldest in list(self._refused)[:-MOST]:
            del self._refused[oldest]
        self._suspects = now - guilty
        return len(guilty)

    def served(self, request: bytes) -> None:
        """It has got its whole answer, so it was not the cause."""
        self._suspects -= {request}

    def forget(self) -> None:
        self._suspects = frozenset()
        self._refused.clear()
