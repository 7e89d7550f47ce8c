"""Asks NVML again and again whether the cards that the engine uses are still there."""

import ctypes
from dataclasses import dataclass, field
from typing import Any, ClassVar

import trio

from xim_agent.hardware.look import Look, Trouble
from xim_agent.hardware.nvidia import BACK, RESET, card_of, pynvml, without_answer
from xim_agent.hardware.report import Card
from xim_agent.hardware.xid import harmless, xid

_RECOVERY = {  # nvmlGpuRecoveryAction: what the driver itself says would help
    1: RESET,
    2: "restart the machine",
    3: "drain what talks to it over NVLink, then restart the machine",
    4: "let running work end, then reset it (nvidia-smi --gpu-reset -i BUS)",
}


@dataclass
class Cards:
    """The cards with these NVML indices. One thread at a time.

    NVML stays open between two looks, for errors in between, but only while all is well: a card cannot be reset while
    any program has it open, and one that was reset must be opened anew.
    """

    indices: frozenset[int]
    nvml: Any = None
    _known: dict[int, Card] = field(default_factory=dict)
    _handles: dict[int, Any] = field(default_factory=dict)
    _events: Any = None
    _open: bool = False
    _limiter: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(1))
    hung: ClassVar[Trouble] = Trouble(
        "the NVIDIA driver has not answered for 30 s", "look at dmesg; restart the machine if it stays so"
    )

    async def ask(self) -> Look:
        """`look` in a thread. Cancelled: one that hangs is left to it, NVML stays open."""
        return await trio.to_thread.run_sync(self.look, abandon_on_cancel=True, limiter=self._limiter)

    def look(self) -> Look:
        """Raises nothing for a broken card or driver: it says so."""
        nvml = self.nvml = self.nvml or pynvml()
        try:
            events = self._drain() if self._open else ()
            lost = [] if self._open else self._reopen()
        except nvml.NVMLError as error:
            self.close()
            return Look((Trouble(f"the NVIDIA driver does not answer: {error}", "look at nvidia-smi and dmesg"),))
        asked = (self._ask(index, handle) for index, handle in self._handles.items())
        lost += [trouble for trouble in asked if trouble is not None]
        if lost:
            self.close()
        return Look(tuple(lost), events)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._handles, self._events = {}, None
            try:
                self.nvml.nvmlShutdown()
            except self.nvml.NVMLError:  # of a driver that is gone
                return

    def named(self, index: int) -> str:
        return str(self._known[index]) if index in self._known else f"GPU {index}"

    def _reopen(self) -> list[Trouble]:
        nvml = self.nvml
        nvml.nvmlInit()
        self._open = True
        self._events = nvml.nvmlEventSetCreate()
        self._handles = {}
        silent: dict[int, Exception] = {}
        for number in range(nvml.nvmlDeviceGetCount()):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(number)
                card = card_of(nvml, number, handle)
            except nvml.NVMLError as error:
                silent[number] = error
                continue
            # The numbers of the others may change when a card is gone, so one that was seen is known by its uuid.
            index = next((index for index, known in self._known.items() if known.uuid == card.uuid), number)
            if index in self.indices and self._known.setdefault(index, card).uuid == card.uuid:
                self._handles[index] = handle
        self._register()
        return [
            self._lost(index, silent[index])
            if index in silent
            else Trouble(f"{self.named(index)} is gone from its driver", BACK)
            for index in sorted(self.indices - self._handles.keys())
        ]

    def _register(self) -> None:
        for handle in self._handles.values():
            try:
                self.nvml.nvmlDeviceRegisterEvents(handle, self.nvml.nvmlEventTypeXidCriticalError, self._events)
            except self.nvml.NVMLError:  # virtual GPUs have no events; a lost one is found when it is asked
                continue

    def _drain(self) -> tuple[Trouble, ...]:
        nvml, told = self.nvml, list[Trouble]()
        while True:
            try:
                event = nvml.nvmlEventSetWait(self._events, 0)
            except nvml.NVMLError as error:
                if error.value in (nvml.NVML_ERROR_TIMEOUT, nvml.NVML_ERROR_GPU_IS_LOST):  # `_ask` finds which
                    return tuple(told)
                raise
            number = int(event.eventData)
            where = [index for index, handle in self._handles.items() if _same(handle, event.device)]
            if where and not harmless(number):
                card = self.named(where[0])
                told.append(
                    Trouble(f"{card}: Xid {number}, {xid(number).meaning}", self._on(where[0], xid(number).cure))
                )

    def _ask(self, index: int, handle: Any) -> Trouble | None:
        nvml = self.nvml
        try:
            nvml.nvmlDeviceGetMemoryInfo(handle)
        except nvml.NVMLError as error:
            if error.value not in without_answer(nvml):
                return self._lost(index, error)
        try:
            answer = nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])[0]
        except nvml.NVMLError as error:
            return None if error.value in without_answer(nvml) else self._lost(index, error)
        action = int(answer.value.uiVal) if answer.nvmlReturn == 0 else 0  # older drivers do not know it
        if not action:
            return None
        cure = _RECOVERY.get(action, f"see `nvidia-smi -q -i {index}` under recovery action")
        return Trouble(f"{self.named(index)} cannot go on: its driver asks for recovery", self._on(index, cure))

    def _lost(self, index: int, error: Exception) -> Trouble:
        needs_reset = getattr(error, "value", None) == self.nvml.NVML_ERROR_RESET_REQUIRED
        return Trouble(f"{self.named(index)} is lost: {error}", self._on(index, RESET if needs_reset else BACK))

    def _on(self, index: int, cure: str) -> str:
        return cure.replace("BUS", self._known[index].bus if index in self._known else str(index))


def _same(one: Any, other: Any) -> bool:
    return ctypes.cast(one, ctypes.c_void_p).value == ctypes.cast(other, ctypes.c_void_p).value
