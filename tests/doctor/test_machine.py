"""GPUs from a driver that is played (tests/fakes/nvml.c), the rest from made-up hardware."""

from dataclasses import replace
from pathlib import Path

import pytest
import trio
from fakes.engine import CPU_HOST
from fakes.nvml import Machine, machine

from xim_agent.cli.doctor_look import Looks
from xim_agent.config.fields import Config
from xim_agent.doctor.machine import amd, chosen, driver_branch, gpu, shm
from xim_agent.doctor.report import Finding
from xim_agent.hardware.report import Device, Hardware

GIB = 2**30
CARDS = tuple(Device(n, f"GPU-{n}", "NVIDIA A10", 24 * GIB, 23 * GIB, "8.6") for n in range(2))
BOX = replace(CPU_HOST, accelerator="nvidia", devices=CARDS, driver="570.86.15", cuda="12.8")
SMALL, SMALL_CPU = replace(BOX, shm_bytes=GIB // 16), replace(CPU_HOST, shm_bytes=GIB // 16)  # Docker's 64 MiB
ROCM = replace(BOX, accelerator="amd", devices=CARDS[:1], driver="6.12")


@pytest.fixture
def nvml(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return machine(tmp_path, tmp_path_factory.getbasetemp(), monkeypatch)


def found_by(config: Config) -> dict[str, Finding]:
    return {finding.check: finding for finding in trio.run(Looks(config, {"PATH": ""}).of_machine)}


def test_cards_are_named(nvml: Machine) -> None:
    nvml.driver = {"version": "570.86.15", "cuda": 12080}
    nvml.add()
    nvml.add()
    nvml.write()
    found = found_by(Config(tensor_parallel_size=2))["gpu"]
    assert (found.status, found.text) == ("ok", "2 x NVIDIA A10, driver 570.86.15, CUDA 12.8")
    assert nvml.sessions == 0, "the driver is closed again"


def test_an_old_driver_is_a_warning(nvml: Machine) -> None:
    nvml.driver = {"version": "525.147.05"}
    nvml.add()
    nvml.write()
    found = found_by(Config())["gpu"]
    assert (found.status, found.exit_code) == ("warning", 0)
    assert "525.147.05 is older than 535" in found.text


def test_a_card_that_the_driver_wants_reset(nvml: Machine) -> None:
    nvml.add()
    nvml.add(recovery=1)
    nvml.write()
    assert found_by(Config())["gpu"].status == "ok", "the engine would not use it"
    found = found_by(Config(tensor_parallel_size=2))["gpu"]
    assert (found.status, found.exit_code) == ("failure", 78)
    assert "GPU 1 (NVIDIA A10, GPU-1111-aaaa, PCI 00000000:02:00.0) cannot go on" in found.text
    assert "nvidia-smi --gpu-reset" in found.cure


def test_a_card_that_does_not_answer(nvml: Machine) -> None:
    nvml.add(error=15)
    nvml.add()
    nvml.write()
    one, two = found_by(Config())["gpu"], found_by(Config(tensor_parallel_size=2))["gpu"]
    assert (one.status, "GPU 0" in one.text) == ("warning", True)
    assert (two.status, two.exit_code) == ("failure", 78)
    assert "2 GPUs are wanted (tensor x pipeline parallel), 1 can be used" in two.text


def test_a_driver_that_is_broken(nvml: Machine) -> None:
    nvml.driver = {"init": 18}
    nvml.write()
    found = found_by(Config())["gpu"]
    assert (found.status, found.exit_code) == ("failure", 78)
    assert "version mismatch" in found.text
    assert "restart the machine" in found.cure


def test_no_driver_is_no_failure() -> None:
    found = gpu(CPU_HOST, Config(), [])
    assert (found.status, found.exit_code) == ("skipped", 0)


def test_a_selection_that_leaves_too_few() -> None:
    config = Config(cuda_visible_devices="7")
    left = chosen(BOX, config)
    assert gpu(left, config, []).status == "failure"
    assert "CUDA_VISIBLE_DEVICES=7 hides all 2 GPUs" in left.notes[0]
    config = Config(cuda_visible_devices="1")
    assert (chosen(BOX, config).devices, gpu(chosen(BOX, config), config, []).status) == (CARDS[1:], "ok")


@pytest.mark.parametrize(("version", "branch"), [("535.129.03", 535), ("", 0), ("unknown", 0), ("1000.1", 1000)])
def test_driver_branch(version: str, branch: int) -> None:
    assert driver_branch(version) == branch


@pytest.mark.parametrize(
    ("hardware", "present", "opened", "status", "said"),
    [
        (CPU_HOST, False, False, "skipped", "no AMD GPU"),
        (BOX, True, True, "skipped", "NVIDIA's are used"),
        (ROCM, True, True, "ok", "1 x NVIDIA A10, driver 6.12"),
        (replace(CPU_HOST, notes=("amd-smi is not installed",)), True, True, "failure", "amd-smi is not installed"),
        (ROCM, True, False, "failure", "may not open /dev/kfd"),
    ],
)
def test_amd(hardware: Hardware, present: bool, opened: bool, status: str, said: str) -> None:
    found = amd(hardware, Config(), present, opened)
    assert (found.status, said in found.text) == (status, True), found
    assert found.exit_code == (78 if status == "failure" else 0)


def test_too_few_amd_gpus() -> None:
    assert amd(ROCM, Config(tensor_parallel_size=2), True, True).status == "failure"


@pytest.mark.parametrize(
    ("hardware", "config", "status", "said"),
    [
        (CPU_HOST, Config(), "ok", "24.0 GiB; of use are 0.2 for its worker"),
        (SMALL_CPU, Config(), "failure", "0.1 GiB, that is too little: of use are 0.2 for its worker"),
        (replace(CPU_HOST, shm_bytes=GIB // 4), Config(), "ok", "of use are 0.2 for its worker"),
        (replace(CPU_HOST, shm_bytes=0), Config(), "failure", "there is no /dev/shm; of use are 0.2 for its worker"),
        (SMALL_CPU, Config(tensor_parallel_size=2), "failure", "too little: of use are 1.0 for 2 ranks"),
        (BOX, Config(), "ok", "of use are 6.0 for KV offload"),
        (SMALL, Config(), "warning", "KV offload is lowered: of use are 6.0 for KV offload"),
        (SMALL, Config(kv_cache_backend="none"), "ok", "none is needed"),
        (SMALL, Config(kv_offload_size_gb=0), "ok", "none is needed"),
        (BOX, Config(kv_offload_size_gb=20), "warning", "KV offload lowered from 18.63"),
        (SMALL, Config(tensor_parallel_size=2), "failure", "of use are 6.0 for KV offload and 1.0 for 2 ranks"),
        (replace(BOX, shm_bytes=6 * GIB), Config(tensor_parallel_size=2), "warning", "KV offload is lowered"),
        (BOX, Config(tensor_parallel_size=2), "ok", "6.0 for KV offload and 1.0 for 2 ranks"),
        (replace(BOX, shm_bytes=GIB), Config(auto_config=False, kv_offload_size_gb=2.2), "failure", "2.0 for KV"),
        (replace(BOX, shm_bytes=GIB), Config(auto_config=False), "ok", "none is needed"),
    ],
)
def test_shm_against_the_plan(hardware: Hardware, config: Config, status: str, said: str) -> None:
    found = shm(hardware, config)
    assert (found.status, said in found.text) == (status, True), found
    assert found.exit_code == (78 if status == "failure" else 0)
    assert bool(found.cure) == (status != "ok")


def test_how_large_it_must_be() -> None:
    assert "SHM_SIZE=7g" in shm(SMALL, Config(tensor_parallel_size=2)).cure
