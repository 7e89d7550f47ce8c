"""Held polls that have room, so that the least loaded agent is found without a look at all the others. Pure."""

from collections.abc import Container
from heapq import heapify, heappop, heappush
from itertools import count

from xim_agent.router.fleet import Poll
from xim_agent.router.queues import Key

SPARE = 64  # entries that are over are kept until they outnumber those that hold by this many
_Entry = tuple[float, int, Poll]


class Waiting:
    """A heap for each key. An entry is never changed: `offer` again after whatever changed a poll's room or an agent's
    load. Entries that are over are met when they come up, or cleared away when there are too many of them, so that each
    step costs the logarithm of the number of polls. Of equally loaded agents the one that waited longest is first.
    """

    def __init__(self) -> None:
        self._heaps: dict[Key, list[_Entry]] = {}
        self._bounds: dict[Key, int] = {}
        self._order = count()

    def __len__(self) -> int:
        """Entries, those that are over included."""
        return sum(map(len, self._heaps.values()))

    def offer(self, poll: Poll) -> None:
        """Does nothing for a poll that takes no lease."""
        key = poll.agent.key
        if key is None or poll.closed or poll.room <= 0:
            return
        heap = self._heaps.setdefault(key, [])
        poll.turn = next(self._order)
        heappush(heap, (poll.agent.busy, poll.turn, poll))
        if len(heap) > self._bounds.get(key, SPARE):
            heap[:] = [entry for entry in heap if _holds(entry, key)]
            heapify(heap)
            self._bounds[key] = 2 * len(heap) + SPARE

    def first(self, key: Key, other_than: Container[str] = ()) -> Poll | None:
        """The poll of the least loaded agent whose id is not in `other_than`."""
        heap, passed = self._heaps.get(key, []), []
        found = None
        while heap and found is None:
            entry = heap[0]
            if _holds(entry, key) and entry[2].agent.id not in other_than:
                found = entry[2]
            elif _holds(heappop(heap), key):
                passed.append(entry)
        for entry in passed:
            heappush(heap, entry)
        if not heap:
            self._heaps.pop(key, None)
            self._bounds.pop(key, None)
        return found


def _holds(entry: _Entry, key: Key) -> bool:
    _, turn, poll = entry
    return turn == poll.turn and not poll.closed and poll.room > 0 and poll.agent.key == key
