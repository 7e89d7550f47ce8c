"""Asks AMD's tools again and again whether the cards that the engine uses are still there."""

from dataclasses import dataclass, replace

from xim_agent.hardware import amd
from xim_agent.hardware.drivers import Drivers
from xim_agent.hardware.look import Look, Trouble
from xim_agent.hardware.report import Card, Device

_BACK = (
    "look at dmesg | grep amdgpu; reset it once nothing uses it (amd-smi reset --gpureset --gpu NUMBER), or restart "
    "the machine; if it is lost again: power, cooling and seat of the card, then replace it"
)
_RAS = (
    "nothing if it happened once (a dead engine is started again); if it comes back, restart the machine, which "
    "retires bad memory pages (amd-smi bad-pages shows them), then replace the card"
)
_TOOL = "look at dmesg | grep amdgpu; restart the machine if it stays so"
# A tool fails once for reasons of its own, say while it is being upgraded.
FAILURES = 2


@dataclass(frozen=True)
class _Known:
    """`answered`: it has told of its memory, which not every card does. `errors`: uncorrectable ones so far."""

    card: Card
    answered: bool
    errors: int | None = None


class AmdCards:
    """Cards are known by their PCI address from the first look on: their numbers move up when one is gone."""

    hung = Trouble("the AMD driver has not answered for 30 s", _TOOL)

    def __init__(self, devices: tuple[Device, ...], drivers: Drivers) -> None:
        self.indices = frozenset(device.index for device in devices)
        self._drivers = drivers
        self._known = {d.index: _Known(Card(d.index, d.name, d.uuid, ""), d.memory_free_bytes > 0) for d in devices}
        self._failures = 0

    async def ask(self) -> Look:
        """Raises nothing for a broken card, driver or tool: it says so. Seconds; cancellation kills a running tool."""
        try:
            rows = await self._rows()
        except FileNotFoundError:  # a machine that runs is not broken by that
            return Look()
        except TimeoutError as error:
            return Look(self._all(f"does not answer: {error}"))
        except (OSError, ValueError) as error:
            self._failures += 1
            return Look(self._all(f"cannot be asked: {error}") if self._failures >= FAILURES else ())
        self._failures = 0
        judged = [self._judge(index, rows) for index in sorted(self._known)]
        return Look(
            tuple(one for one in judged if one and not one.passing), tuple(one for one in judged if one and one.passing)
        )

    async def _rows(self) -> dict[str, amd.State]:
        """By PCI address. A tool that hangs tells enough: the other would too."""
        output = self._drivers.output
        try:
            return amd.states_of_amd_smi(await output(amd.AMD_SMI_LIST), await output(amd.AMD_SMI_STATE))
        except TimeoutError:
            raise
        except (OSError, ValueError) as error:
            try:
                return amd.states_of_rocm_smi(await output(amd.ROCM_SMI_STATE))
            except FileNotFoundError:
                raise error from None

    def _judge(self, index: int, rows: dict[str, amd.State]) -> Trouble | None:
        known = self._known[index]
        bus = known.card.bus or next((bus for bus, row in rows.items() if row.index == index), "")
        card = replace(known.card, bus=bus)
        state = rows.get(bus)
        if state is None:
            return self._lost(card if bus else known.card, "is gone from its driver")
        fresh = None if state.errors is None or known.errors is None else state.errors - known.errors
        self._known[index] = _Known(
            card, known.answered or state.answers, known.errors if state.errors is None else state.errors
        )
        if known.answered and not state.answers:
            return self._lost(card, "does not answer: its driver tells nothing of its memory")
        if fresh is not None and fresh > 0:
            return Trouble(f"{card}: {fresh} uncorrectable memory error(s) (RAS)", _RAS, passing=True)
        return None

    def _all(self, what: str) -> tuple[Trouble, ...]:
        return tuple(Trouble(f"{known.card} {what}", _TOOL) for _, known in sorted(self._known.items()))

    def _lost(self, card: Card, what: str) -> Trouble:
        return Trouble(f"{card} {what}", _BACK.replace("NUMBER", str(card.index)))
