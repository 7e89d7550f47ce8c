"""GPUs that are broken when the agent starts: no CPU machine, and it goes on by itself when they are back."""

import os
from pathlib import Path
from typing import Any

import pytest
import trio
from fakes.engine import until
from fakes.nvml import Machine as Nvml

from xim_agent.config.fields import Config
from xim_agent.engine.environment import gpu_environment
from xim_agent.hardware import drivers, watch
from xim_agent.hardware.machine import Machine
from xim_agent.hardware.probe import probe
from xim_agent.hardware.report import Hardware, report
from xim_agent.hardware.watch import watch_for
from xim_agent.health import Health

CARD_0 = "GPU 0 (NVIDIA A10, GPU-0000-aaaa, PCI 00000000:01:00.0)"
LOST, MEMORY_LOST = {"error": 15}, {"memory_error": 15}


@pytest.fixture
def health() -> Health:
    return Health(now=lambda: 0.0)


def said(health: Health) -> dict[str, tuple[str, str]]:
    return {c.code: (c.text, health.hints[c.code]) for c in health.conditions()}


def cards(nvml: Nvml, *facts: dict[str, Any], init: int = 0) -> None:
    nvml.driver["init"] = init
    nvml.gpus = []
    for one in facts:
        nvml.add(**one)
    nvml.write()


@pytest.mark.parametrize(
    ("facts", "init", "text"),
    [
        ([LOST], 0, "GPU 0 cannot be used: GPU is lost"),
        ([MEMORY_LOST, LOST], 0, f"{CARD_0} cannot be used: GPU is lost; GPU 1 cannot be used: GPU is lost"),
        ([{"mig": 1}], 0, f"{CARD_0} is in MIG mode without a slice, so nothing can run on it"),
        ([{}], 18, "the NVIDIA driver does not answer: RM has detected an NVML/RM version mismatch."),
    ],
)
async def test_all_broken_is_no_cpu_machine(
    nvml: Nvml, health: Health, facts: list[dict[str, Any]], init: int, text: str
) -> None:
    cards(nvml, *facts, init=init)
    machine = await Machine.find(Config(), {})
    made = watch_for(machine, health)
    sent = report(machine.hardware, cache_bytes=1)
    assert (sent["accelerator"], sent["tier"], sent["devices"]) == ("nvidia", "gpu_nvidia_shared", [])
    assert made.in_trouble
    told, cure = said(health)["gpu_unusable"]
    assert told == text
    assert "the agent looks again every 15 s" in cure


@pytest.mark.parametrize(
    ("settings", "env", "accelerator", "indices", "waits"),
    [
        ({}, {}, "nvidia", [0], False),
        ({"tensor_parallel_size": 2}, {}, "nvidia", [0], True),
        ({"tensor_parallel_size": 2, "distributed_backend": "ray"}, {}, "nvidia", [0], False),
        ({}, {"CUDA_VISIBLE_DEVICES": "0"}, "nvidia", [0], False),
        ({}, {"CUDA_VISIBLE_DEVICES": "1"}, "nvidia", [], True),
        ({}, {"CUDA_VISIBLE_DEVICES": "1,0"}, "nvidia", [], True),
        ({}, {"CUDA_VISIBLE_DEVICES": "GPU-1111-aaaa"}, "nvidia", [], True),
        ({}, {"CUDA_VISIBLE_DEVICES": "-1"}, "cpu", [], False),
        ({}, {"CUDA_VISIBLE_DEVICES": ""}, "cpu", [], False),
        ({"vllm_env": ("CUDA_VISIBLE_DEVICES=-1",)}, {}, "cpu", [], False),
        ({"cuda_visible_devices": "-1"}, {"CUDA_VISIBLE_DEVICES": "1"}, "cpu", [], False),
        ({"cuda_visible_devices": "none"}, {}, "cpu", [], False),
        ({"cuda_visible_devices": "0"}, {}, "nvidia", [0], False),
        ({"cuda_visible_devices": "1"}, {}, "nvidia", [0], True),
        ({"cuda_visible_devices": "GPU-1111"}, {}, "nvidia", [0], True),
    ],
)
async def test_what_the_operator_chose_decides_whether_a_broken_card_matters(
    nvml: Nvml, settings: dict[str, Any], env: dict[str, str], accelerator: str, indices: list[int], waits: bool
) -> None:
    """Of two cards the second is broken."""
    cards(nvml, {}, LOST)
    config = Config(**settings)
    machine = await Machine.find(config, gpu_environment(config, {"PATH": os.defpath, **env}))
    hardware = machine.hardware
    assert (hardware.accelerator, [d.index for d in hardware.devices]) == (accelerator, indices)
    assert machine.waits == waits


async def test_a_card_that_the_engine_does_without_is_named_and_does_no_harm(nvml: Nvml, health: Health) -> None:
    cards(nvml, {}, LOST)
    made = watch_for(await Machine.find(Config(), {}), health)
    assert not made.in_trouble
    assert made.watched == {0}
    text, cure = said(health)["gpu_unusable"]
    assert text == "GPU 1 cannot be used: GPU is lost"
    assert cure.endswith("then restart the agent")
    health.clear("gpu_unusable")
    watch_for(await Machine.find(Config(cuda_visible_devices="0"), {}), health)
    assert said(health) == {}, "the other is not ours"


async def test_they_come_back_one_after_the_other(
    nvml: Nvml, health: Health, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "AGAIN_SECONDS", 0.02)
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.02)
    cards(nvml, {}, {}, init=18)
    machine = await Machine.find(Config(tensor_parallel_size=2), {})
    made = watch_for(machine, health)
    changes: list[bool] = []
    made.changed = lambda: changes.append(made.in_trouble)
    await nursery.start(made.run)
    cards(nvml, {}, LOST)
    await until(lambda: said(health)["gpu_unusable"][0] == "GPU 1 cannot be used: GPU is lost")
    cards(nvml, init=9)  # gone altogether, for now
    looks = nvml.inits
    await until(lambda: nvml.inits > looks + 2)
    assert (made.in_trouble, changes) == (True, [])
    cards(nvml, {}, {})
    await until(lambda: not made.in_trouble)
    assert (changes, said(health)) == ([False], {})
    with trio.fail_after(5):
        assert [d.index for d in (await machine.usable()).devices] == [0, 1]
    await until(lambda: made.watched == {0, 1} and nvml.sessions == 1)
    nvml.gpus[1]["error"] = 15
    nvml.write()
    await until(lambda: made.in_trouble)
    assert "GPU-1111-aaaa" in said(health)["gpu_lost"][0], "and they are watched"


async def test_a_driver_that_hangs_at_the_start(
    nvml: Nvml, health: Health, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drivers, "NVML_SECONDS", 0.1)
    monkeypatch.setattr(watch, "AGAIN_SECONDS", 0.02)
    nvml.hang = True
    cards(nvml, {})
    looks: list[bool] = []
    calls = drivers.Drivers({})

    async def look() -> Hardware:
        looks.append(True)
        return await probe(env={}, drivers=calls)

    with trio.fail_after(5):
        machine = Machine(await look(), Config(), look, calls)
    made = watch_for(machine, health)
    assert said(health)["gpu_unusable"][0].startswith("the NVIDIA driver has not answered")
    await nursery.start(made.run)
    await until(lambda: len(looks) > 3)
    inits = nvml.inits
    nvml.hang = False
    nvml.write()
    await until(lambda: not made.in_trouble)
    assert nvml.inits <= inits + 3, "the hanging call, and a look or two: none were piled up behind it"


def on_bus(root: Path, address: str, vendor: str, kind: str, driver: str | None) -> None:
    device = root / "sys/bus/pci/devices" / address
    device.mkdir(parents=True)
    (device / "vendor").write_text(vendor + "\n")
    (device / "class").write_text(kind + "\n")
    if driver:
        (root / "sys/bus/pci/drivers" / driver).mkdir(parents=True)
        (device / "driver").symlink_to(root / "sys/bus/pci/drivers" / driver)


@pytest.mark.parametrize(
    ("vendor", "kind", "driver", "accelerator"),
    [
        ("0x10de", "0x030200", None, "nvidia"),
        ("0x10de", "0x030000", "nvidia", "nvidia"),
        ("0x10de", "0x030200", "vfio-pci", "cpu"),
        ("0x10de", "0x040300", None, "cpu"),  # its sound
        ("0x1002", "0x120000", None, "amd"),
        ("0x1002", "0x120000", "vfio-pci", "cpu"),
        ("0x8086", "0x030000", "i915", "cpu"),
    ],
)
async def test_a_driver_that_comes_up_after_the_agent(
    nvml: Nvml, tmp_path: Path, vendor: str, kind: str, driver: str | None, accelerator: str
) -> None:
    cards(nvml, init=9)
    root = tmp_path / "root"
    on_bus(root, "0000:41:00.0", vendor, kind, driver)
    (root / "proc").mkdir()
    (root / "proc/cpuinfo").write_text("processor : 0\n")
    (root / "proc/meminfo").write_text("MemTotal: 1024 kB\n")
    (root / "bin").mkdir()
    (root / "bin/rocm-smi").write_text("#!/bin/sh\nexit 1\n")
    (root / "bin/rocm-smi").chmod(0o755)
    env = {"PATH": f"{root}/bin:{os.defpath}"}
    hardware = await probe(root=root, affinity=[0], env=env)
    assert (hardware.accelerator, bool(hardware.broken)) == (accelerator, accelerator != "cpu")
    if accelerator == "nvidia":
        without = await probe(root=root, affinity=[0], env={**env, "NVIDIA_VISIBLE_DEVICES": "none"})
        assert without.accelerator == "cpu", "a container that was given none"
        cards(nvml, {})
        hardware = await probe(root=root, affinity=[0], env=env)
        assert ([d.index for d in hardware.devices], hardware.broken) == ([0], ())
