"""AMD cards that are gone, in error, hung and back, through tools that print what a file says."""

import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
from fakes.engine import alive, until

from xim_agent.config.fields import Config
from xim_agent.hardware import drivers, watch
from xim_agent.hardware.amd_cards import AmdCards
from xim_agent.hardware.drivers import Drivers
from xim_agent.hardware.machine import Machine
from xim_agent.hardware.probe import probe
from xim_agent.hardware.watch import CardWatch, watch_for
from xim_agent.health import Health

MB = {"value": 196592, "unit": "MB"}


@dataclass
class Host:
    """Two MI300X and their tools. Change `cards` and call `write`."""

    root: Path
    cards: list[dict[str, Any]] = field(default_factory=list)
    wrap: bool = False

    def add(self, **facts: Any) -> None:
        n = len(self.cards)
        self.cards.append({"bdf": f"0000:{n + 5:02x}:00.0", "serial": f"0x{n:04x}", "memory": MB, "errors": 0, **facts})

    def write(self) -> None:
        """Cards are numbered as they stand there."""
        rows: dict[str, list[Any]] = {"static": [], "list": [], "metric": []}
        for n, card in enumerate(self.cards):
            asic = {"market_name": "AMD Instinct MI300X", "asic_serial": card["serial"]}
            rows["static"].append({"gpu": n, "asic": asic, "vram": {"size": MB}, "driver": {"version": "6.8"}})
            rows["list"].append({"gpu": n, "bdf": card["bdf"], "uuid": "x"})
            usage = {"total_vram": card["memory"], "free_vram": card["memory"]}
            ecc = {"total_correctable_count": 9, "total_uncorrectable_count": card["errors"]}
            rows["metric"].append({"gpu": n, "mem_usage": usage, "ecc": ecc})
        for name, data in rows.items():
            (self.root / name).write_text(json.dumps({"gpu_data": data} if self.wrap else data))
        rocm = {
            f"card{n}": {"PCI Bus": c["bdf"], "VRAM Total Memory (B)": "9" if c["memory"] == MB else "N/A"}
            for n, c in enumerate(self.cards)
        }
        (self.root / "rocm").write_text(json.dumps({**rocm, "system": {"Driver version": "6"}}))

    def tool(self, name: str, script: str) -> None:
        """Replaced as a whole: one that runs may not be written."""
        new = self.root / "bin" / f"{name}.new"
        new.write_text(f"#!/bin/sh\n{script}\n")
        new.chmod(0o755)
        new.rename(self.root / "bin" / name)

    @property
    def env(self) -> dict[str, str]:
        return {"PATH": f"{self.root}/bin:{os.defpath}"}

    async def machine(self, config: Config | None = None) -> Machine:
        made = Drivers(self.env)

        async def again() -> Any:
            return await probe(root=self.root, affinity=[0], env=self.env, drivers=made)

        return Machine(await again(), config or Config(), again, made)


@pytest.fixture(params=[False, True], ids=["ROCm 6", "ROCm 7"])
def host(tmp_path: Path, request: pytest.FixtureRequest) -> Host:
    (tmp_path / "sys/class/kfd/kfd/topology").mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor : 0\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1024 kB\n")
    (tmp_path / "bin").mkdir()
    made = Host(tmp_path, wrap=request.param)
    made.tool("amd-smi", f'cat "{tmp_path}/$1"')
    made.add()
    made.add()
    made.write()
    return made


@pytest.fixture
def health() -> Health:
    return Health(now=lambda: 0.0)


@dataclass
class Watching:
    cards: AmdCards
    watch: CardWatch

    async def look(self, now: float = 1.0) -> None:
        self.watch.note(await self.cards.ask(), now)


@pytest.fixture
async def watching(host: Host, health: Health) -> Watching:
    machine = await host.machine(Config(tensor_parallel_size=2))
    made = watch_for(machine, health)
    assert isinstance(made._cards, AmdCards)
    ours = Watching(made._cards, made)
    await ours.look(0.0)
    assert (said(health), made.in_trouble, made.watched) == ({}, False, {0, 1})
    return ours


def said(health: Health) -> dict[str, tuple[str, str]]:
    return {c.code: (c.text, health.hints[c.code]) for c in health.conditions()}


CARD_0 = "GPU 0 (AMD Instinct MI300X, GPU-0000000000000000, PCI 0000:05:00.0)"
CARD_1 = "GPU 1 (AMD Instinct MI300X, GPU-0000000000000001, PCI 0000:06:00.0)"


async def test_a_card_that_is_gone_is_named_and_its_return_is_seen(
    host: Host, watching: Watching, health: Health
) -> None:
    """The other's number has moved up."""
    first, second = host.cards
    host.cards = [second]
    host.write()
    await watching.look()
    text, cure = said(health)["gpu_lost"]
    assert text == f"{CARD_0} is gone from its driver"
    assert "amd-smi reset --gpureset --gpu 0" in cure
    assert watching.watch.in_trouble
    host.cards = []
    host.write()
    await watching.look()
    assert said(health)["gpu_lost"][0] == f"{CARD_0} is gone from its driver; {CARD_1} is gone from its driver"
    host.cards = [first, second]
    host.write()
    await watching.look()
    assert (said(health), watching.watch.in_trouble) == ({}, False)


async def test_a_card_that_tells_nothing_any_more(host: Host, watching: Watching, health: Health) -> None:
    host.cards[1]["memory"] = "N/A"
    host.write()
    await watching.look()
    assert said(health)["gpu_lost"][0] == f"{CARD_1} does not answer: its driver tells nothing of its memory"
    host.cards[1]["memory"] = MB
    host.write()
    await watching.look()
    assert said(health) == {}


async def test_a_card_that_never_told_is_not_lost(host: Host, health: Health) -> None:
    host.cards[0] |= {"memory": "N/A", "errors": "N/A"}
    host.write()
    made = watch_for(await host.machine(), health)
    assert await made._cards.ask() == watch.Look()
    host.cards[0]["errors"] = 3  # since its driver was loaded, we do not know when
    host.write()
    assert await made._cards.ask() == watch.Look()


async def test_uncorrectable_errors_are_told_and_forgotten_after_a_quiet_time(
    host: Host, watching: Watching, health: Health
) -> None:
    host.cards[1]["errors"] = 2
    host.write()
    await watching.look(10.0)
    text, cure = said(health)["gpu_error"]
    assert text == f"{CARD_1}: 2 uncorrectable memory error(s) (RAS)"
    assert "amd-smi bad-pages" in cure
    assert watching.watch.in_trouble
    await watching.look(10.0 + watch.QUIET_SECONDS - 1)
    assert watching.watch.in_trouble
    await watching.look(10.0 + watch.QUIET_SECONDS)
    assert (said(health), watching.watch.in_trouble) == ({}, False)
    host.cards[1]["errors"] = 0  # it was reset
    host.write()
    await watching.look(50.0)
    host.cards[1]["errors"] = 1
    host.write()
    await watching.look(51.0)
    assert said(health)["gpu_error"][0] == f"{CARD_1}: 1 uncorrectable memory error(s) (RAS)"


async def test_another_agents_card_is_not_ours(host: Host, health: Health) -> None:
    made = watch_for(await host.machine(), health)
    assert made.watched == {0}
    host.cards[1] |= {"errors": 7, "memory": "N/A"}
    host.write()
    assert await made._cards.ask() == watch.Look()


async def test_a_tool_that_fails_once_says_nothing_twice_it_does(
    host: Host, watching: Watching, health: Health
) -> None:
    host.tool("amd-smi", "exit 3")
    await watching.look()
    assert said(health) == {}
    await watching.look()
    text = said(health)["gpu_lost"][0]
    assert text.startswith(f"{CARD_0} cannot be asked: amd-smi ended with status 3; {CARD_1} cannot")
    host.tool("amd-smi", f'cat "{host.root}/$1"')
    await watching.look()
    assert said(health) == {}
    (host.root / "bin/amd-smi").unlink()  # an upgrade of ROCm
    await watching.look()
    assert said(health) == {}


async def test_a_driver_that_hangs_is_trouble_until_it_answers(
    host: Host, watching: Watching, health: Health, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the kernel: SIGKILL does not end the tool. None is started beside it."""
    monkeypatch.setattr(drivers, "TOOL_SECONDS", 0.2)
    monkeypatch.setattr(trio.Process, "kill", lambda _: None)
    host.tool("amd-smi", f"echo $$ >> {host.root}/pids; exec sleep 60")
    for _ in range(3):
        with trio.fail_after(10):
            await watching.look()
        assert said(health)["gpu_lost"][0].startswith(f"{CARD_0} does not answer: amd-smi ")
        assert watching.watch.in_trouble
    (pid,) = map(int, (host.root / "pids").read_text().split())
    host.tool("amd-smi", f'cat "{host.root}/$1"')
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not alive(pid))
    await watching.look()
    assert (said(health), watching.watch.in_trouble) == ({}, False)


async def test_older_machines_have_rocm_smi(host: Host, health: Health) -> None:
    machine = await host.machine(Config(tensor_parallel_size=2))
    (host.root / "bin/amd-smi").unlink()
    host.tool("rocm-smi", f'cat "{host.root}/rocm"')
    made = watch_for(machine, health)
    assert await made._cards.ask() == watch.Look()
    host.cards[1]["memory"] = "N/A"
    host.write()
    (lost,) = (await made._cards.ask()).lost
    assert lost.what.startswith(CARD_1 + " does not answer")
    host.cards = host.cards[:1]
    host.write()
    (lost,) = (await made._cards.ask()).lost
    assert lost.what == f"{CARD_1} is gone from its driver"


async def test_the_service_waits_for_a_driver_and_watches_it_then(
    host: Host, health: Health, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "AGAIN_SECONDS", 0.02)
    monkeypatch.setattr(watch, "TOOL_LOOK_SECONDS", 0.02)
    host.tool("amd-smi", "exit 1")
    machine = await host.machine()
    assert (machine.hardware.tier, machine.waits) == ("gpu_amd_shared", True)
    made = watch_for(machine, health)
    changes: list[bool] = []
    made.changed = lambda: changes.append(made.in_trouble)
    assert "amd-smi ended with status 1; rocm-smi is not installed" in said(health)["gpu_unusable"][0]
    assert "/dev/kfd" in said(health)["gpu_unusable"][1]
    await nursery.start(made.run)
    host.tool("amd-smi", f'cat "{host.root}/$1"')
    await until(lambda: not made.in_trouble and made.watched == {0})
    host.cards[0]["memory"] = "N/A"
    host.write()
    await until(lambda: made.in_trouble)
    assert "GPU 0 (AMD Instinct MI300X" in said(health)["gpu_lost"][0]
    host.cards[0]["memory"] = MB
    host.write()
    await until(lambda: not made.in_trouble)
    assert (changes, said(health)) == ([False, True, False], {})


async def test_the_operator_asks_for_the_cpu(host: Host) -> None:
    host.tool("amd-smi", "exit 1")
    host_env = {**host.env, "HIP_VISIBLE_DEVICES": "-1"}
    hardware = await probe(root=host.root, affinity=[0], env=host_env)
    assert (hardware.accelerator, hardware.broken) == ("cpu", ())
