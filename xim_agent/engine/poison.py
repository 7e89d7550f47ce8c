"""Which requests bring the engine down. Pure.

One that was running at two crashes in a row is refused from then on, until another engine is started. A request is
known by its path and body: a client, or the router, that asks again asks with another identifier.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable

from xim_agent.errors import AgentError

MOST = 1000  # refused at once; the oldest are forgotten first
LOSS_SECONDS = 10.0  # from the end of vLLM's engine core to that of its API server (it looks every 5 s)


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


class Losses:
    """Requests, by `mark`, whose answers were lost a moment ago: the engine may be about to end. `now`: in seconds, of
    any clock that does not go back.
    """

    def __init__(self) -> None:
        self._at: OrderedDict[bytes, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._at)

    def note(self, request: bytes, now: float) -> None:
        self._at[request] = now
        self._at.move_to_end(request)
        self._prune(now)

    def recent(self, now: float) -> list[bytes]:
        self._prune(now)
        return list(self._at)

    def _prune(self, now: float) -> None:
        while self._at and next(iter(self._at.values())) <= now - LOSS_SECONDS:
            self._at.popitem(last=False)
