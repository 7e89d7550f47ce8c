"""What a failure's class does to the service, over the scripted launcher writing real tails."""

from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from fakes.engine import Bench, until

from xim_agent.engine import state
from xim_agent.engine.output import TAIL_BYTES
from xim_agent.engine.state import EngineState

TAILS = Path(__file__).parent / "tails"


def failures(error_logs: list[Any]) -> list[Any]:
    """The agent's own; vLLM's lines are relayed beside them."""
    return [record for record in error_logs if record.name == "xim_agent.engine"]


@pytest.mark.parametrize("name", ["weights_truncated", "gpu_driver_too_old", "kv_cache_no_memory"])
async def test_what_cannot_work_is_not_tried_again_until_something_changes(
    bench: Bench, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, error_logs: list[Any], name: str
) -> None:
    monkeypatch.setattr(state, "FIRST_DELAY", 0.01)
    tail = (TAILS / f"{name}.txt").read_text()
    bench.env |= {"FAKE_VLLM_EXIT": "1", "FAKE_VLLM_EXIT_FIRST": "1", "FAKE_VLLM_STDERR": tail}
    service = bench.service()
    nursery.start_soon(service.run)
    with trio.fail_after(20):
        await service.switch(bench.target())
    await until(lambda: bool(failures(error_logs)))
    await trio.testing.wait_all_tasks_blocked(0.3)  # many delays of the restart budget
    assert len(bench.starts) == 1
    assert (service.state, service.degraded) == (EngineState.FAILED, True)
    assert failures(error_logs)[0].next_start_seconds is None
    assert [c.code for c in bench.health.conditions()] == ["engine_failed"]
    assert bench.health.hints["engine_failed"] == failures(error_logs)[0].remedy != ""
    with trio.fail_after(20):
        await service.switch(bench.target())  # the same once more: another generation of the assignment
        await service.wait_ready()
    assert len(bench.starts) == 2
    assert bench.health.conditions() == []
    await service.stop()


async def test_what_may_pass_is_tried_again(
    bench: Bench, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, error_logs: list[Any]
) -> None:
    monkeypatch.setattr(state, "FIRST_DELAY", 0.01)
    tail = (TAILS / "gpu_memory_taken.txt").read_text()
    bench.env |= {"FAKE_VLLM_EXIT": "1", "FAKE_VLLM_EXIT_FIRST": "2", "FAKE_VLLM_STDERR": tail}
    service = bench.service()
    nursery.start_soon(service.run)
    with trio.fail_after(20):
        await service.switch(bench.target())
        await service.wait_ready()
    assert [r.error_class for r in failures(error_logs)] == ["gpu_memory_taken"] * 2
    await service.stop()


async def test_an_unknown_failure_is_shown_whole(bench: Bench, nursery: trio.Nursery, error_logs: list[Any]) -> None:
    """In the log, up to 64 KiB from the end; its last error in the condition, with the place of the rest."""
    lines = [f"line {n} {'x' * 100}" for n in range(1000)]
    bench.env |= {"FAKE_VLLM_EXIT": "1", "FAKE_VLLM_STDERR": "\n".join([*lines, "StrangeError: never seen"])}
    service = bench.service()
    nursery.start_soon(service.run)
    with trio.fail_after(20):
        await service.switch(bench.target())
    await until(lambda: bool(failures(error_logs)))
    logged = failures(error_logs)[0].getMessage()
    first = int(logged.splitlines()[1].split()[1])
    assert logged.splitlines()[1:-1] == lines[first:], "no line between is lost"
    assert TAIL_BYTES - 200 < len(logged.partition("\n")[2]) <= TAIL_BYTES
    (condition,) = bench.health.conditions()
    assert condition.text == "vLLM exited (1): StrangeError: never seen"
    assert "log" in bench.health.hints["engine_failed"]
    await service.stop()
