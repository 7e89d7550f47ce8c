"""What changed last in an agent, and when: for `status`, where a log is not at hand."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MOST = 50


@dataclass(frozen=True)
class Change:
    """`at`: Unix seconds; `what`: a name of the view; empty text: there was, or is, nothing."""

    at: float
    what: str
    before: str
    after: str


class History:
    """The last 50 changes of `view`, which gives a short text by name. `look` is synchronous and cheap."""

    def __init__(self, now: Callable[[], float], view: Callable[[], Mapping[str, str]]) -> None:
        self._now, self._view = now, view
        self._seen: dict[str, str] = {}
        self._changes: deque[Change] = deque(maxlen=MOST)

    def look(self) -> None:
        found = {what: text for what, text in self._view().items() if text}
        for what in {**self._seen, **found}:
            before, after = self._seen.get(what, ""), found.get(what, "")
            if before != after:
                self._changes.append(Change(self._now(), what, before, after))
        self._seen = found

    def changes(self) -> list[Change]:
        """The latest last."""
        return list(self._changes)
