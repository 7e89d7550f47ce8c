"""What lives on after its end: because somebody still has it, or until the garbage collector comes."""

import gc
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def none_left(*kinds: type) -> Iterator[None]:
    """Fails when an object of these kinds was made inside and is still there, or one of ours is there in a circle."""
    gc.collect()
    gc.disable()
    before = _all_of(kinds)
    try:
        yield
        kept = [thing for thing in _all_of(kinds) if all(thing is not earlier for earlier in before)]
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        circles = Counter(kind for kind in map(_kind, gc.garbage) if kind.startswith("xim_agent."))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not circles, "they wait for the collector"
    assert not kept


@contextmanager
def watched(size: int) -> Iterator[Callable[[], list[str]]]:
    """Gives what tells where the blocks of this many bytes or more were made that were made inside and are still there,
    whoever has them."""
    gc.collect()
    tracemalloc.start(12)
    try:
        yield lambda: [
            "\n".join(trace.traceback.format()) for trace in tracemalloc.take_snapshot().traces if trace.size >= size
        ]
    finally:
        tracemalloc.stop()


def _all_of(kinds: tuple[type, ...]) -> list[object]:
    return [thing for thing in gc.get_objects() if isinstance(thing, kinds)]


def _kind(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
