"""Named health conditions: what is wrong now, since when, what cures it. Shown by `/readyz`, polls and `status`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from xim_agent.log import redact
from xim_agent.mesh.messages import Condition


@dataclass
class Health:
    """Conditions by code. Synchronous; `on_change` runs after a change (a `Watch.bump`)."""

    now: Callable[[], float]
    on_change: Callable[[], None] = lambda: None
    _conditions: dict[str, Condition] = field(default_factory=dict)

    def set(self, code: str, text: str, hint: str = "") -> None:
        """Raises or updates a condition; `since` stays that of its first appearance."""
        text, hint = redact(text), redact(hint)  # polls carry it to the router, /readyz and /status to anybody here
        old = self._conditions.get(code)
        if old is not None and old.text == text:
            return
        self._conditions[code] = Condition(code, text, old.since if old else self.now(), hint)
        self.on_change()

    def clear(self, code: str) -> None:
        if self._conditions.pop(code, None) is not None:
            self.on_change()

    def conditions(self) -> list[Condition]:
        return sorted(self._conditions.values(), key=lambda c: (c.since, c.code))

    @property
    def hints(self) -> dict[str, str]:
        """What cures each condition, by its code; empty where nothing is known."""
        return {code: condition.hint for code, condition in self._conditions.items()}

    def report(self) -> list[dict[str, Any]]:
        """For people at this machine."""
        return [{"code": c.code, "text": c.text, "hint": c.hint, "since": c.since} for c in self.conditions()]

    def sentences(self) -> list[str]:
        return [f"{row['code']}: {row['text']}" + (f"; {row['hint']}" if row["hint"] else "") for row in self.report()]
