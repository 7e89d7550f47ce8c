"""An engine whose GPU is lost: no work, no start, until it is back."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import trio
from fakes.engine import Bench, until
from fakes.nvml import Machine, machine

from xim_agent.config.fields import Config
from xim_agent.engine import state
from xim_agent.engine.service import EngineService
from xim_agent.engine.state import EngineState
from xim_agent.hardware import machine as hardware
from xim_agent.hardware import watch
from xim_agent.hardware.cards import Cards
from xim_agent.hardware.watch import CardWatch, watch_for
from xim_agent.work.capacity import View


@pytest.fixture
def nvml(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.02)
    made = machine(tmp_path, tmp_path_factory.getbasetemp(), monkeypatch)
    made.add()
    made.write()
    return made


def lose(nvml: Machine, code: int) -> None:
    nvml.gpus[0]["error"] = code
    nvml.write()


def view(bench: Bench, service: EngineService) -> View:
    return View(
        ready=service.ready,
        degraded=service.degraded,
        draining=False,
        closed=False,
        ceiling=service.ceiling,
        running=0,
        health=tuple(bench.health.conditions()),
        progress=None,
    )


def started(bench: Bench, file: str) -> str:
    return Path(f"/proc/{bench.starts[-1]}/{file}").read_text()


async def watched(bench: Bench, nursery: trio.Nursery) -> EngineService:
    cards = CardWatch(Cards(frozenset({0})), bench.health)
    bench.blocked = lambda: cards.in_trouble
    service = bench.service()
    cards.changed = service.recheck
    await nursery.start(cards.run)
    nursery.start_soon(service.run)
    return service


async def test_a_card_lost_while_serving(
    bench: Bench, nvml: Machine, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, error_logs: list[Any]
) -> None:
    monkeypatch.setattr(state, "FIRST_DELAY", 0.01)
    service = await watched(bench, nursery)
    with trio.fail_after(20):
        await service.switch(bench.target())
        await service.wait_ready()
    assert view(bench, service).capacity > 0
    lose(nvml, 15)
    await until(lambda: not service.ready)
    told = view(bench, service)
    assert (told.phase, told.capacity) == ("degraded", 0)
    assert "GPU-0000-aaaa, PCI 00000000:01:00.0) is lost" in told.health[0].text
    os.kill(bench.starts[0], signal.SIGKILL)
    await until(lambda: service.state is EngineState.FAILED and bool(error_logs))
    looks = nvml.inits
    await until(lambda: nvml.inits > looks + 20)  # longer than many delays: a start would have come
    assert len(bench.starts) == 1
    lose(nvml, 0)
    with trio.fail_after(20):
        await service.wait_ready()
    assert len(bench.starts) == 2
    assert view(bench, service).phase == "ready"
    assert bench.health.conditions() == []
    await service.stop()


async def test_a_card_that_comes_back_before_the_engine_died(
    bench: Bench, nvml: Machine, nursery: trio.Nursery
) -> None:
    service = await watched(bench, nursery)
    with trio.fail_after(20):
        await service.switch(bench.target())
        await service.wait_ready()
    lose(nvml, 15)
    await until(lambda: service.degraded)
    lose(nvml, 0)
    await until(lambda: service.ready)
    assert len(bench.starts) == 1
    await service.stop()


async def test_a_card_that_is_lost_before_the_start(bench: Bench, nvml: Machine, nursery: trio.Nursery) -> None:
    lose(nvml, 16)
    service = await watched(bench, nursery)
    await until(lambda: bool(bench.health.conditions()))
    with trio.fail_after(5):
        await service.switch(bench.target())
    assert (service.state, bench.starts) == (EngineState.FAILED, [])
    with trio.fail_after(5):
        await service.stop()
    assert service.state is EngineState.STOPPED
    await service.switch(bench.target())
    lose(nvml, 0)
    with trio.fail_after(20):
        await service.wait_ready()
    await service.stop()


async def test_cards_that_are_all_broken_when_the_agent_starts(
    bench: Bench, nvml: Machine, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "AGAIN_SECONDS", 0.02)
    lose(nvml, 15)
    found = await hardware.Machine.find(Config(), {})
    cards = watch_for(found, bench.health)
    bench.blocked, bench.hardware, bench.usable = lambda: cards.in_trouble, found.hardware, found.usable
    service = bench.service()
    cards.changed = service.recheck
    await nursery.start(cards.run)
    nursery.start_soon(service.run)
    nursery.start_soon(service.switch, bench.target())
    looks = nvml.inits
    await until(lambda: nvml.inits > looks + 5)
    told = view(bench, service)
    assert (told.phase, told.capacity, bench.starts) == ("degraded", 0, [])
    assert [(c.code, c.text) for c in told.health] == [("gpu_unusable", "GPU 0 cannot be used: GPU is lost")]
    lose(nvml, 0)
    with trio.fail_after(20):
        await service.wait_ready()
    assert (view(bench, service).phase, bench.health.conditions()) == ("ready", [])
    assert "--gpu-memory-utilization" in started(bench, "cmdline"), "planned for the card, not for the CPU"
    assert "VLLM_CPU" not in started(bench, "environ")
    await service.stop()
