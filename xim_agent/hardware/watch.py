"""Watches the engine's cards while the agent runs: while one is lost or in error, no work is taken."""

import logging
from collections.abc import Callable, Iterable

import trio

from xim_agent.config.fields import Config
from xim_agent.hardware.cards import Cards, Look, Trouble
from xim_agent.hardware.report import Hardware
from xim_agent.hardware.visible import visible
from xim_agent.health import Health

log = logging.getLogger("xim_agent.hardware")

LOOK_SECONDS = 5.0
# NVML answers in milliseconds; where a card hangs on the bus a call may never return.
HUNG_SECONDS = 30.0
# After an Xid the card may work on or not: so long without another one, and it is trusted again.
QUIET_SECONDS = 30.0
_HUNG = Trouble("the NVIDIA driver has not answered for 30 s", "look at dmesg; restart the machine if it stays so")


class CardWatch:
    """`in_trouble` is true while work must not be taken; `changed` is called, synchronously, when that changes.

    Conditions: `gpu_lost` (a card does not answer, or its driver asks for recovery), `gpu_error` (Xid), both name the
    card; `gpu_unusable`: what was found broken at the start, for as long as the agent runs.
    """

    def __init__(self, cards: Cards, health: Health, changed: Callable[[], None] = lambda: None) -> None:
        self._cards, self._health, self.changed = cards, health, changed
        self._errors: dict[str, tuple[float, Trouble]] = {}  # by what it says: when last seen
        self._limiter = trio.CapacityLimiter(1)
        self.in_trouble = False

    @property
    def watched(self) -> frozenset[int]:
        """NVML indices."""
        return self._cards.indices

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Never returns where there are cards. Cancelled: a look that hangs is left to its thread, NVML stays open."""
        task_status.started()
        while self._cards.indices:
            found = Look((_HUNG,))
            with trio.move_on_after(HUNG_SECONDS):
                found = await trio.to_thread.run_sync(self._cards.look, abandon_on_cancel=True, limiter=self._limiter)
            self.note(found, trio.current_time())
            await trio.sleep(LOOK_SECONDS)

    def note(self, found: Look, now: float) -> None:
        """`now`: seconds of trio's clock."""
        for event in found.events:
            log.warning("%s", event.what, extra={"cure": event.cure})
            self._errors[event.what] = now, event
        self._errors = {what: (at, e) for what, (at, e) in self._errors.items() if now - at < QUIET_SECONDS}
        self._say("gpu_lost", found.lost)
        self._say("gpu_error", [event for _, event in self._errors.values()])
        before, self.in_trouble = self.in_trouble, bool(found.lost or self._errors)
        if self.in_trouble != before:
            log.warning("no work is taken: %s" if self.in_trouble else "the GPUs are back%s", self._reason(found))
            self.changed()

    def _reason(self, found: Look) -> str:
        return "; ".join(t.what for t in (*found.lost, *(e for _, e in self._errors.values())))

    def _say(self, code: str, troubles: Iterable[Trouble]) -> None:
        every = list(troubles)
        if not every:
            self._health.clear(code)
            return
        cures = dict.fromkeys(trouble.cure for trouble in every)
        self._health.set(code, "; ".join(trouble.what for trouble in every), "; ".join(cures))


def watch_for(hardware: Hardware, config: Config, health: Health) -> CardWatch:
    """Of the cards that the engine uses: the first visible ones, as many as it is spread over."""
    if hardware.notes:
        health.set("gpu_unusable", "; ".join(hardware.notes), "repair what it names, then restart the agent")
    devices = hardware.devices if hardware.accelerator == "nvidia" else ()
    if config.cuda_visible_devices is not None:
        devices, _ = visible(devices, "nvidia", {"CUDA_VISIBLE_DEVICES": config.cuda_visible_devices})
    used = devices[: config.tensor_parallel_size * config.pipeline_parallel_size]
    return CardWatch(Cards(frozenset(device.index for device in used)), health)
