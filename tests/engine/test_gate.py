"""What must be gone before the next start: processes, GPU memory. For sockets and shared memory see test_endings."""

import logging
import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from fakes.engine import CPU_HOST, GIB, Bench, alive, until

from xim_agent.engine import gate
from xim_agent.engine.leftovers import Leftovers
from xim_agent.engine.tree import descendants
from xim_agent.hardware.holders import read_memory
from xim_agent.hardware.memory import CardMemory, Holder, shortage
from xim_agent.hardware.report import Device

A10 = Device(0, "GPU-a", "NVIDIA A10", 24 * GIB, 23 * GIB, "8.6")
HALF = ("--gpu-memory-utilization", "0.5")
TRAINER = Holder(4711, "python", 20 * GIB)


@dataclass
class Card:
    """`looks`: how much is free at each look, the last for good."""

    looks: list[int]
    asked: int = 0

    def __call__(self, uuids: Collection[str]) -> list[CardMemory]:
        assert list(uuids) == ["GPU-a"]
        self.asked += 1
        free = self.looks.pop(0) if self.looks[1:] else self.looks[0]
        return [CardMemory("GPU-a", "NVIDIA A10", 24 * GIB, free, (TRAINER,) if free < 23 * GIB else ())]


@pytest.fixture
def on_gpu(bench: Bench) -> Bench:
    bench.hardware = replace(CPU_HOST, accelerator="nvidia", devices=(A10,))
    return bench


async def test_it_waits_until_the_memory_is_back(
    on_gpu: Bench, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "LOOK_SECONDS", 0.05)
    on_gpu.gpu_memory = card = Card([3 * GIB, 3 * GIB, 23 * GIB])
    service = on_gpu.service()
    nursery.start_soon(service.run)
    with trio.fail_after(20):
        await service.switch(on_gpu.target())
        await service.wait_ready()
    assert card.asked == 3
    assert len(on_gpu.starts) == 1
    assert os.sched_getscheduler(on_gpu.starts[0]) == os.SCHED_OTHER, "what feeds a GPU gives way to nobody"
    await service.stop()


async def test_who_holds_the_memory_is_named(
    on_gpu: Bench, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, error_logs: list[logging.LogRecord]
) -> None:
    monkeypatch.setattr(gate, "MEMORY_SECONDS", 0.0)
    on_gpu.gpu_memory = Card([3 * GIB])
    service = on_gpu.service()
    nursery.start_soon(service.run)
    await service.switch(on_gpu.target())
    await until(lambda: bool(error_logs))
    text = on_gpu.health.conditions()[0].text
    assert "has 3.0 of 24.0 GiB free" in text
    assert "held by python (pid 4711, 20.0 GiB)" in text
    assert not on_gpu.starts
    await service.stop()


async def test_a_stop_does_not_wait_for_the_memory(on_gpu: Bench, nursery: trio.Nursery) -> None:
    on_gpu.gpu_memory = card = Card([3 * GIB])
    service = on_gpu.service()
    nursery.start_soon(service.run)
    await service.switch(on_gpu.target())
    await until(lambda: card.asked > 0)
    with trio.fail_after(10):
        await service.stop()


async def test_what_lives_of_an_earlier_tree_is_ended_and_a_zombie_does_not_count(
    bench: Bench, nursery: trio.Nursery
) -> None:
    env = {"PATH": os.environ["PATH"]}
    left = await bench.guard.spawn(["/bin/sh", "-c", "setsid sleep 60 & sleep 60"], env, "/", nothing(bench))
    await until(lambda: len(descendants(bench.guard.pid)) == 3)
    old = [p.pid for p in descendants(bench.guard.pid)]
    service = bench.service()
    nursery.start_soon(service.run)
    with trio.fail_after(20):
        await service.switch(bench.target())
        await service.wait_ready()
    assert not any(map(alive, old))
    await service.stop()
    await left.aclose()
    zombie = await trio.lowlevel.open_process(["/bin/true"])
    await until(lambda: not alive(zombie.pid))
    assert zombie.pid not in {p.pid for p in descendants(os.getpid())}
    await zombie.wait()


def nothing(bench: Bench) -> Leftovers:
    return Leftovers(str(bench.runtime / "earlier.json"))


@pytest.mark.parametrize(
    ("argv", "needed"),
    [
        (("vllm", *HALF), {"GPU-a": 12 * GIB - gate.SLACK}),
        (("vllm", *HALF, "--gpu-memory-utilization", "0.25"), {"GPU-a": 6 * GIB - gate.SLACK}),
        (("vllm", *HALF, "--kv-cache-memory-bytes=1"), {}),
        (("vllm",), {}),
    ],
)
def test_needed_is_what_vllm_looks_for(argv: tuple[str, ...], needed: dict[str, int]) -> None:
    wishes = SimpleNamespace(devices=(A10, replace(A10, uuid="GPU-b")), tensor_parallel=1, pipeline_parallel=1)
    plan: Any = SimpleNamespace(argv=argv, wishes=wishes)
    assert gate.needed_memory(plan) == needed


def test_shortage_names_card_and_numbers() -> None:
    card = CardMemory("GPU-a", "A10", 24 * GIB, 3 * GIB)
    assert shortage([card], {"GPU-a": 3 * GIB}) == ""
    assert shortage([card], {}) == ""
    assert "nobody that the driver names" in shortage([card], {"GPU-a": 4 * GIB})
    hidden = replace(card, holders=(Holder(7, "a process", 0),))
    assert shortage([hidden], {"GPU-a": 4 * GIB}).endswith("a process (pid 7)")


class Nvml:
    """Two cards, the second does not answer."""

    class NVMLError(Exception):
        pass

    opened = 0

    def nvmlInit(self) -> None:
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid == "GPU-b":
            raise self.NVMLError
        return uuid

    def nvmlDeviceGetName(self, _: str) -> bytes:
        return b"NVIDIA A10"

    def nvmlDeviceGetMemoryInfo(self, _: str) -> Any:
        return SimpleNamespace(total=24 * GIB, free=3 * GIB)

    def nvmlDeviceGetComputeRunningProcesses(self, _: str) -> list[Any]:
        ours = SimpleNamespace(pid=os.getpid(), usedGpuMemory=GIB)
        return [ours, SimpleNamespace(pid=1 << 30, usedGpuMemory=None)]


def test_holders_as_the_driver_tells_them() -> None:
    nvml = Nvml()
    [card] = read_memory(["GPU-a", "GPU-b"], nvml)
    assert (card.uuid, card.name, card.total, card.free) == ("GPU-a", "NVIDIA A10", 24 * GIB, 3 * GIB)
    ours, unknown = card.holders
    assert (ours.pid, ours.used) == (os.getpid(), GIB)
    assert ours.name
    assert unknown == Holder(1 << 30, "a process", 0)
    assert nvml.opened == 0
