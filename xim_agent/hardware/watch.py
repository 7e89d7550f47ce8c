"""Watches the engine's cards while the agent runs: while one is lost or in error, no work is taken."""

import logging
from collections.abc import Callable, Iterable
from typing import Protocol

import trio

from xim_agent.hardware.amd_cards import AmdCards
from xim_agent.hardware.cards import Cards
from xim_agent.hardware.look import Look, Trouble
from xim_agent.hardware.machine import Machine
from xim_agent.health import Health

log = logging.getLogger("xim_agent.hardware")

# NVML answers in milliseconds; AMD's tools are Python programs that take seconds of CPU.
LOOK_SECONDS, TOOL_LOOK_SECONDS = 5.0, 30.0
# Where a card hangs on the bus a call may never return.
HUNG_SECONDS = 30.0
# After an error the card may work on or not: so long without another one, and it is trusted again.
QUIET_SECONDS = 30.0
# While there is nothing to start an engine on: soon enough for a driver that comes up late in the boot.
AGAIN_SECONDS = 15.0


class Watched(Protocol):
    """Cards, by their numbers. `hung`: what is said when `ask` does not return."""

    indices: frozenset[int]

    @property
    def hung(self) -> Trouble: ...
    async def ask(self) -> Look: ...


class CardWatch:
    """`in_trouble` is true while work must not be taken; `changed` is called, synchronously, when that changes.

    Conditions: `gpu_lost` (a card does not answer, or its driver asks for recovery), `gpu_error` (Xid, RAS), both name
    the card; `gpu_unusable`: what was found broken at the start. `machine`: is looked at again while it waits.
    """

    def __init__(
        self,
        cards: Watched,
        health: Health,
        changed: Callable[[], None] = lambda: None,
        machine: Machine | None = None,
        cards_of: Callable[[Machine], Watched] | None = None,
    ) -> None:
        self._cards, self._health, self.changed = cards, health, changed
        self._machine, self._cards_of = machine, cards_of
        self._errors: dict[str, tuple[float, Trouble]] = {}  # by what it says: when last seen
        self._trouble = False

    @property
    def in_trouble(self) -> bool:
        return self._trouble or (self._machine is not None and self._machine.waits)

    @property
    def watched(self) -> frozenset[int]:
        """Their drivers' numbers of the cards."""
        return self._cards.indices

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Never returns where there are cards. Cancelled: a look that hangs is left to its thread, NVML stays open."""
        task_status.started()
        if self._machine is not None and self._cards_of is not None and self._machine.waits:
            await self._wait_for(self._machine)
            self._cards = self._cards_of(self._machine)
        period = TOOL_LOOK_SECONDS if isinstance(self._cards, AmdCards) else LOOK_SECONDS
        while self._cards.indices:
            found = Look((self._cards.hung,))
            with trio.move_on_after(HUNG_SECONDS):
                found = await self._cards.ask()
            self.note(found, trio.current_time())
            await trio.sleep(period)

    async def _wait_for(self, machine: Machine) -> None:
        log.warning("no work is taken: %s", "; ".join(one.what for one in machine.broken))
        while machine.waits:
            await trio.sleep(AGAIN_SECONDS)
            await machine.look_again()
            self.tell_broken(machine)
        log.warning("the GPUs can be used now")
        self.changed()

    def tell_broken(self, machine: Machine) -> None:
        troubles = [Trouble(one.what, one.cure) for one in machine.broken]
        troubles += [Trouble(note, "repair what it names") for note in machine.hardware.notes]
        then = f"the agent looks again every {AGAIN_SECONDS:.0f} s" if machine.waits else "then restart the agent"
        self._say("gpu_unusable", troubles, then)

    def note(self, found: Look, now: float) -> None:
        """`now`: seconds of trio's clock."""
        for event in found.events:
            log.warning("%s", event.what, extra={"cure": event.cure})
            self._errors[event.what] = now, event
        self._errors = {what: (at, e) for what, (at, e) in self._errors.items() if now - at < QUIET_SECONDS}
        self._say("gpu_lost", found.lost)
        self._say("gpu_error", [event for _, event in self._errors.values()])
        before, self._trouble = self._trouble, bool(found.lost or self._errors)
        if self._trouble != before:
            log.warning("no work is taken: %s" if self._trouble else "the GPUs are back%s", self._reason(found))
            self.changed()

    def _reason(self, found: Look) -> str:
        return "; ".join(t.what for t in (*found.lost, *(e for _, e in self._errors.values())))

    def _say(self, code: str, troubles: Iterable[Trouble], then: str = "") -> None:
        every = list(troubles)
        if not every:
            self._health.clear(code)
            return
        cures = dict.fromkeys([*(trouble.cure for trouble in every), *([then] if then else [])])
        self._health.set(code, "; ".join(trouble.what for trouble in every), "; ".join(cures))


def watch_for(machine: Machine, health: Health) -> CardWatch:
    """Of the cards that the engine uses."""

    def cards_of(machine: Machine) -> Watched:
        if machine.hardware.accelerator == "amd":
            return AmdCards(machine.used, machine.drivers)
        nvidia = machine.used if machine.hardware.accelerator == "nvidia" else ()
        return Cards(frozenset(device.index for device in nvidia))

    made = CardWatch(cards_of(machine), health, machine=machine, cards_of=cards_of)
    made.tell_broken(machine)
    return made
