"""The five states of an agent that operators know from the product, and one for those that are gone. Pure."""

from typing import Literal

Lifecycle = Literal["pending", "active", "suspended", "disconnected", "dead", "removed"]


def lifecycle(state: str, silent: float | None, disconnected: float, dead: float) -> Lifecycle:
    """`state`: of table agents; `silent`: seconds since it was heard, None when it never polled; the others: from how
    many on it counts as what. What its owner decided comes before what can be heard of it.
    """
    if state == "removed":
        return "removed"
    if state == "suspended":
        return "suspended"
    if silent is None:
        return "pending"
    if silent >= dead:
        return "dead"
    return "disconnected" if silent >= disconnected else "active"
