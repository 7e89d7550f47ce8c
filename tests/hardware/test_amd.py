"""AMD through tools that print what real ones print."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import trio
from fakes.engine import alive

from xim_agent.hardware import amd, drivers
from xim_agent.hardware.probe import probe

GIB = 2**30


STATIC = [
    {
        "gpu": 0,
        "asic": {"market_name": "AMD Instinct MI300X", "target_graphics_version": "gfx942"},
        "driver": {"name": "amdgpu", "version": "6.8.5"},
        "vram": {"type": "HBM", "size": {"value": 196592, "unit": "MB"}},
    }
]
MEMORY = [
    {"gpu": 0, "mem_usage": {"total_vram": {"value": 196592, "unit": "MB"}, "free_vram": {"value": 1, "unit": "GB"}}}
]
LIST = [{"gpu": 0, "bdf": "0000:05:00.0", "uuid": "2cff74a1-0000-1000-80d5"}]
ROCM = {
    "card1": {
        "Card Series": "Radeon RX 7900 XT",
        "GFX Version": "gfx1100",
        "Unique ID": "0x1",
        "VRAM Total Memory (B)": "21458059264",
        "VRAM Total Used Memory (B)": "27856896",
    },
    "system": {"Driver version": "6.7"},
}


@pytest.mark.parametrize("wrap", [False, True])
def test_amd_smi(wrap: bool) -> None:
    outputs = [json.dumps({"gpu_data": x} if wrap else x).encode() for x in (STATIC, MEMORY, LIST)]
    (device,), driver = amd.from_amd_smi(*outputs)
    assert (device.name, device.compute_capability, driver) == ("AMD Instinct MI300X", "gfx942", "6.8.5")
    assert (device.memory_total_bytes, device.memory_free_bytes) == (196592 * 2**20, GIB)
    assert device.uuid.startswith("2cff")


def test_amd_smi_that_does_not_know() -> None:
    memory = [{"gpu": 0, "mem_usage": {"total_vram": 8192, "free_vram": "N/A"}}]
    (device,), _ = amd.from_amd_smi(b'[{"gpu":0,"vram":"N/A"}]', json.dumps(memory).encode(), b"[]")
    assert (device.memory_total_bytes, device.memory_free_bytes) == (8192 * 2**20, 0)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    (tmp_path / "sys/class/kfd/kfd/topology").mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor : 0\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1024 kB\n")
    (tmp_path / "bin").mkdir()
    return tmp_path


def tool(machine: Path, name: str, script: str) -> None:
    path = machine / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


async def probe_amd(machine: Path, **more: str) -> Any:
    env = {"PATH": f"{machine}/bin:{os.defpath}", **more}
    return await probe(root=machine, affinity=[0], env=env)


async def test_probe_asks_amd_smi(machine: Path) -> None:
    answers = {"static": STATIC, "metric": MEMORY, "list": LIST}
    cases = "\n".join(f"{name}) echo '{json.dumps(answer)}';;" for name, answer in answers.items())
    tool(machine, "amd-smi", f"case $1 in {cases} esac")
    hardware = await probe_amd(machine)
    assert (hardware.accelerator, hardware.devices[0].name, hardware.notes) == ("amd", "AMD Instinct MI300X", ())


@pytest.mark.parametrize("broken", ["exit 3", "echo nonsense", None])
async def test_probe_falls_back_to_rocm_smi(machine: Path, broken: str | None) -> None:
    if broken:
        tool(machine, "amd-smi", broken)
    tool(machine, "rocm-smi", f"echo '{json.dumps(ROCM)}'")
    hardware = await probe_amd(machine)
    (device,) = hardware.devices
    assert (device.index, device.name, device.memory_total_bytes) == (1, "Radeon RX 7900 XT", 21458059264)
    assert device.memory_free_bytes == 21458059264 - 27856896
    assert hardware.driver == "6.7"


OUTPUTS = Path(__file__).parent / "amd"


@pytest.mark.parametrize(
    ("version", "names", "gib", "free", "uuids", "driver"),
    [
        ("6.0", ["0x740f"], [64], [0], ["GPU-a4c9a5b3c0f0b6d1"], "6.3.6"),
        ("6.3", ["AMD Instinct MI300X"] * 2, [192, 192], [191, 3], ["GPU-b3b8d0e9e1d4af04", "GPU-0f3a2b1c"], "6.10.5"),
        ("7.0", ["AMD Instinct MI355X"], [288], [287], ["GPU-3c1a77e0b2d94f55"], "6.14.14"),
    ],
)
async def test_amd_smi_of_several_versions(
    machine: Path, version: str, names: list[str], gib: list[int], free: list[int], uuids: list[str], driver: str
) -> None:
    tool(machine, "amd-smi", f'cat "{OUTPUTS}/amd-smi-{version}-$1.txt"')
    hardware = await probe_amd(machine)
    assert [d.name for d in hardware.devices] == names
    assert [round(d.memory_total_bytes / GIB) for d in hardware.devices] == gib
    assert [int(d.memory_free_bytes / GIB) for d in hardware.devices] == free
    assert all(d.uuid.startswith(uuid) for d, uuid in zip(hardware.devices, uuids, strict=True))
    assert (hardware.accelerator, hardware.driver, hardware.notes) == ("amd", driver, ())


@pytest.mark.parametrize(("version", "name"), [("5.7", "0x740c"), ("6.2", "AMD Instinct MI210")])
async def test_rocm_smi_of_several_versions(machine: Path, version: str, name: str) -> None:
    tool(machine, "rocm-smi", f'cat "{OUTPUTS}/rocm-smi-{version}.txt"')
    hardware = await probe_amd(machine)
    assert [(d.index, d.name, d.memory_total_bytes // 10**9) for d in hardware.devices] == [
        (0, name, 68),
        (1, name, 68),
    ]
    assert hardware.devices[0].uuid.startswith("GPU-")
    assert hardware.driver


@pytest.mark.parametrize("garbage", ["5", "[]", "null", '[{"gpu": "x"}]', "{", "", "ERROR: no permission", '"text"'])
async def test_garbage_of_both_tools_is_no_cpu_machine(machine: Path, garbage: str) -> None:
    for name in ("amd-smi", "rocm-smi"):
        tool(machine, name, f"echo '{garbage}'")
    hardware = await probe_amd(machine)
    assert (hardware.accelerator, hardware.devices, hardware.tier) == ("amd", (), "gpu_amd_shared")
    assert hardware.broken[0].what.startswith("an AMD GPU is there, but ")


async def test_a_tool_that_hangs_is_ended(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drivers, "TOOL_SECONDS", 0.3)
    tool(machine, "amd-smi", f"echo $$ > {machine}/pid; exec sleep 60")
    tool(machine, "rocm-smi", f"echo '{json.dumps(ROCM)}'")
    with trio.fail_after(10):
        hardware = await probe_amd(machine)
    assert [d.name for d in hardware.devices] == ["Radeon RX 7900 XT"]
    assert not alive(int((machine / "pid").read_text()))


async def test_variables_choose_among_amd_gpus(machine: Path) -> None:
    tool(machine, "amd-smi", f'cat "{OUTPUTS}/amd-smi-6.3-$1.txt"')
    hardware = await probe_amd(machine, ROCR_VISIBLE_DEVICES="GPU-0f3a2b1c4d5e6f70")
    assert [d.index for d in hardware.devices] == [1]
    hardware = await probe_amd(machine, HIP_VISIBLE_DEVICES="1,0")
    assert [d.index for d in hardware.devices] == [1, 0]


async def test_amd_gpu_without_tools_is_noted(machine: Path) -> None:
    hardware = await probe_amd(machine)
    assert (hardware.accelerator, hardware.devices) == ("cpu", ())
    assert "amd-smi" in hardware.notes[0]
    assert "rocm-smi" in hardware.notes[0]


async def test_probe_of_this_machine() -> None:
    hardware = await probe()
    assert hardware.cpu.threads >= len(hardware.cpus) >= 1
    assert 0 < hardware.cpu_limit <= len(hardware.cpus)
    assert 0 < hardware.memory_bytes <= hardware.memory_total_bytes
    assert len(hardware.core_of) == len(hardware.cpus)
