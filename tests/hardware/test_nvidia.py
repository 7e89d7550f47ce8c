"""pynvml itself, over a driver's library that is played from a script (fakes/nvml.c)."""

import os
import subprocess
import sys

import pytest
from fakes.nvml import GIB, Machine

from xim_agent.hardware.nvidia import Nvidia, read_nvidia
from xim_agent.hardware.probe import probe

CARD = "GPU 0 (NVIDIA A10, GPU-0000-aaaa, PCI 00000000:01:00.0)"
BUS = ("0000:01:00.0",)


def test_two_cards_and_a_mig_card(nvml: Machine) -> None:
    nvml.driver = {"version": "570.86.15", "cuda": 12080}
    nvml.add(used=3 * GIB)
    nvml.add(name="NVIDIA H100 80GB HBM3", total=80 * GIB, major=9, minor=0, mig=1)
    nvml.slices[1] = [{"uuid": f"MIG-{n}", "total": (20 + n) * GIB, "used": n * GIB} for n in (1, 2)]
    nvml.add(mig=0)
    nvml.write()
    found = read_nvidia()
    assert [
        (d.index, d.uuid, d.memory_total_bytes // GIB, d.memory_free_bytes // GIB, d.mig) for d in found.devices
    ] == [
        (0, "GPU-0000-aaaa", 24, 21, False),
        (1, "MIG-1", 21, 20, True),
        (1, "MIG-2", 22, 20, True),
        (2, "GPU-2222-aaaa", 24, 23, False),
    ]
    assert [d.compute_capability for d in found.devices] == ["8.6", "9.0", "9.0", "8.6"]
    assert found.devices[1].name == "NVIDIA H100 80GB HBM3"
    assert (found.driver, found.cuda, found.broken) == ("570.86.15", "12.8", ())
    assert nvml.sessions == 0


def test_mig_mode_without_a_slice_is_no_device_and_is_noted(nvml: Machine) -> None:
    nvml.add(mig=1)
    nvml.add()
    nvml.write()
    found = read_nvidia()
    assert [d.index for d in found.devices] == [1]
    (broken,) = found.broken
    assert broken.what == f"{CARD} is in MIG mode without a slice, so nothing can run on it"
    assert "nvidia-smi mig" in broken.cure


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (9, ()),
        (12, ()),
        (18, ("version mismatch", "restart the machine")),
        (4, ("Insufficient Permissions", "/dev/nvidia")),
        (999, ("the NVIDIA driver does not answer: Unknown Error", "dmesg")),
    ],
)
def test_no_driver_is_silent_and_a_broken_one_is_not(nvml: Machine, code: int, said: tuple[str, ...]) -> None:
    nvml.driver["init"] = code
    nvml.write()
    found = read_nvidia()
    assert (found.devices, bool(found.broken), nvml.sessions) == ((), bool(said), 0)
    for words in (*said, "CUDA_VISIBLE_DEVICES=-1") if said else ():
        assert words in found.broken[0].what + found.broken[0].cure


def test_without_the_library_there_is_nothing() -> None:
    """In a process of its own: here the library is loaded."""
    program = "from xim_agent.hardware.nvidia import read_nvidia; print(read_nvidia())"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr(Nvidia())


def test_a_lost_card_does_not_hide_the_others(nvml: Machine) -> None:
    nvml.add(error=15)
    nvml.add()
    nvml.add(memory_error=15)
    nvml.write()
    found = read_nvidia()
    assert [d.index for d in found.devices] == [1]
    assert [(one.index, one.what) for one in found.broken] == [
        (0, "GPU 0 cannot be used: GPU is lost"),
        (2, "GPU 2 (NVIDIA A10, GPU-2222-aaaa, PCI 00000000:03:00.0) cannot be used: GPU is lost"),
    ]
    assert all("power, cooling and seat" in one.cure for one in found.broken)
    assert nvml.sessions == 0


def test_a_card_that_wants_a_reset_is_told_how(nvml: Machine) -> None:
    nvml.add(memory_error=16)
    nvml.write()
    assert "nvidia-smi --gpu-reset -i 00000000:01:00.0" in read_nvidia().broken[0].cure


@pytest.mark.parametrize(
    ("code", "on_bus", "said"),
    [
        (9, BUS, "the NVIDIA driver is not loaded, and there are GPUs at PCI 0000:01:00.0"),
        (0, BUS, "the NVIDIA driver finds none of the GPUs at PCI 0000:01:00.0"),
        (12, BUS, ""),  # no library: nothing of NVIDIA's is installed, or this is a container without GPUs
        (9, (), ""),
        (0, (), ""),
    ],
)
def test_cards_on_the_bus_that_the_driver_does_not_have_yet(
    nvml: Machine, code: int, on_bus: tuple[str, ...], said: str
) -> None:
    nvml.driver["init"] = code
    nvml.write()
    assert [one.what for one in read_nvidia(None, on_bus).broken] == ([said] if said else [])


def test_a_card_without_memory_of_its_own(nvml: Machine) -> None:
    nvml.add(memory_error=3)
    nvml.write()
    (device,) = read_nvidia().devices
    assert (device.memory_total_bytes, device.memory_free_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("env", "accelerator", "indices", "note"),
    [
        ({}, "nvidia", [0, 1], ""),
        ({"CUDA_VISIBLE_DEVICES": "1"}, "nvidia", [1], ""),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1111,0"}, "nvidia", [1, 0], ""),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, "cpu", [], "CUDA_VISIBLE_DEVICES=-1 hides all 2 GPUs of this machine"),
        ({"ROCR_VISIBLE_DEVICES": "1", "NVIDIA_VISIBLE_DEVICES": "1"}, "nvidia", [0, 1], ""),
    ],
)
async def test_probe_leaves_out_what_vllm_will_not_see(
    nvml: Machine, env: dict[str, str], accelerator: str, indices: list[int], note: str
) -> None:
    nvml.add()
    nvml.add()
    nvml.write()
    hardware = await probe(env=env)
    assert (hardware.accelerator, [d.index for d in hardware.devices]) == (accelerator, indices)
    assert hardware.notes == ((note,) if note else ())
