"""What a look at the engine's cards has found. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Trouble:
    """`what` is a sentence that names the card, `cure` what brings it back; `passing`: the card may work on."""

    what: str
    cure: str
    passing: bool = False


@dataclass(frozen=True)
class Look:
    """`lost`: cards that cannot be used now; `events`: errors that the driver told of since the look before."""

    lost: tuple[Trouble, ...] = ()
    events: tuple[Trouble, ...] = ()
