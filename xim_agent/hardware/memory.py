"""How much of a GPU's memory is free now, and who holds the rest. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Holder:
    """A process; `used` in bytes, 0 when the driver does not tell (in a container it may not)."""

    pid: int
    name: str
    used: int

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid}{f', {self.used / GIB:.1f} GiB' if self.used else ''})"


@dataclass(frozen=True)
class CardMemory:
    """Of one GPU, or of one MIG slice. Bytes."""

    uuid: str
    name: str
    total: int
    free: int
    holders: tuple[Holder, ...] = ()


def shortage(cards: Iterable[CardMemory], needed: Mapping[str, int]) -> str:
    """Empty when each card has free what is needed of it (bytes by uuid), else a sentence that names the holders."""
    for card in cards:
        if card.free >= needed.get(card.uuid, 0):
            continue
        held = ", ".join(map(str, card.holders)) or "nobody that the driver names"
        return (
            f"{card.name} ({card.uuid}) has {card.free / GIB:.1f} of {card.total / GIB:.1f} GiB free, "
            f"{needed[card.uuid] / GIB:.1f} are needed; it is held by {held}"
        )
    return ""
