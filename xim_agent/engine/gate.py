"""The restart gate: vLLM starts as if none had run here before, or does not start."""

import logging
from collections.abc import Callable, Collection, Sequence

import trio

from xim_agent.engine.command import Plan, shown
from xim_agent.engine.guard import Guard
from xim_agent.engine.leftovers import Leftovers
from xim_agent.engine.planner import NoPlace, Planner
from xim_agent.engine.process import Ended, EngineRun
from xim_agent.errors import AgentError
from xim_agent.hardware.memory import CardMemory, shortage

log = logging.getLogger("xim_agent.engine")

# The driver gives back the memory of a killed process when its last thread has left the GPU: seconds, seldom more.
MEMORY_SECONDS, LOOK_SECONDS = 30.0, 0.5
# vLLM refuses below what it is told to take; its own look comes later and may differ by this.
SLACK = 64 << 20

ReadMemory = Callable[[Collection[str]], Sequence[CardMemory]]


class Shut(AgentError):
    """The engine cannot be started now; it may be later."""

    def __init__(self, why: str) -> None:
        super().__init__("engine_gate", why)


class Gate:
    """`memory`: blocking; of the cards with these uuids."""

    def __init__(self, guard: Guard, planner: Planner, memory: ReadMemory) -> None:
        self._guard, self._planner, self._memory = guard, planner, memory

    async def run(self, run: EngineRun, plan: Plan) -> Ended:
        """Through the gate, then `run` to its end. Raises GuardLost, and AgentError as `Planner.own_runtime` does."""
        try:
            leftovers = await self._passed(plan, lambda: run.stopping)
        except (Shut, NoPlace) as error:
            return Ended(None, error.message, "", 0.0)
        log.info("starting vLLM", extra={"command": shown(plan)})
        place = self._planner
        try:
            return await run.run(plan.argv, place.environment(plan), str(place.runtime), leftovers)
        except OSError as error:
            return Ended(None, f"{plan.argv[0]} cannot be executed: {error}", "", 0.0)

    async def _passed(self, plan: Plan, stopping: Callable[[], bool]) -> Leftovers:
        """Kills what still lives of an earlier engine, sweeps what it left, waits until the GPUs have its memory back.

        Returns what is to be swept after the next; soon, once `stopping`.
        """
        if left := await self._guard.kill_all():
            raise Shut(f"processes {left} of an earlier engine cannot be killed")
        leftovers = await self._planner.clean()
        await self._memory_back(plan, stopping)
        return leftovers

    async def _memory_back(self, plan: Plan, stopping: Callable[[], bool]) -> None:
        needed = needed_memory(plan)
        give_up = trio.current_time() + MEMORY_SECONDS
        while needed and not stopping():
            cards = await trio.to_thread.run_sync(self._memory, needed.keys(), abandon_on_cancel=True)
            if not (why := shortage(cards, needed)):
                return
            if trio.current_time() >= give_up:
                raise Shut(why)
            log.debug("waiting for the GPU's memory", extra={"reason": why})
            await trio.sleep(LOOK_SECONDS)


def needed_memory(plan: Plan) -> dict[str, int]:
    """Bytes by the card's uuid, as vLLM works out what must be free; empty where it takes another number of bytes."""
    flags = dict(zip(plan.argv, plan.argv[1:], strict=False))  # the last wins, as in vLLM
    if "--gpu-memory-utilization" not in flags or any(word.startswith("--kv-cache-memory-bytes") for word in plan.argv):
        return {}
    share = float(flags["--gpu-memory-utilization"])
    used = plan.wishes.devices[: plan.wishes.tensor_parallel * plan.wishes.pipeline_parallel]
    return {card.uuid: int(share * card.memory_total_bytes) - SLACK for card in used if card.memory_total_bytes}
