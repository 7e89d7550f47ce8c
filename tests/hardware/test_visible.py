import pytest
from hypothesis import given
from hypothesis import strategies as st

from xim_agent.hardware.report import Device
from xim_agent.hardware.visible import visible

CARDS = tuple(Device(i, f"GPU-{i}{i}{i}{i}", "H100", 80, 79, "9.0") for i in range(3))
MIG = (
    Device(0, "GPU-0000", "A100", 40, 40),
    Device(1, "MIG-aaaa", "A100", 20, 20, mig=True),
    Device(1, "MIG-bbbb", "A100", 20, 20, mig=True),
)
NAME = "CUDA_VISIBLE_DEVICES"


def uuids(devices: tuple[Device, ...]) -> list[str]:
    return [device.uuid[4:5] for device in devices]


@pytest.mark.parametrize(
    ("selection", "left"),
    [
        ("0,1,2", "012"),
        ("", ""),
        ("-1", ""),
        ("none", ""),
        ("1", "1"),
        ("2, 0", "20"),
        ("0,7,1", "0"),
        ("0,-1,1", "0"),
        ("1,1", "1"),
        ("GPU-2222,GPU-0", "20"),
        ("gpu-2222", "2"),
        ("GPU-", ""),
    ],
)
def test_cuda(selection: str, left: str) -> None:
    found, note = visible(CARDS, "nvidia", {NAME: selection})
    assert uuids(found) == list(left)
    assert note == ("" if left else f"{NAME}={selection} hides all 3 GPUs of this machine")


@pytest.mark.parametrize(("selection", "left"), [("MIG-bbbb", "b"), ("1", "a"), ("0,MIG-aaaa", "0a"), ("GPU-0", "0")])
def test_mig_slices_are_told_apart_by_uuid(selection: str, left: str) -> None:
    assert uuids(visible(MIG, "nvidia", {NAME: selection})[0]) == list(left)


@pytest.mark.parametrize(
    ("env", "left"),
    [
        ({}, "012"),
        ({"ROCR_VISIBLE_DEVICES": "2,1"}, "21"),
        ({"HIP_VISIBLE_DEVICES": "1"}, "1"),
        ({"ROCR_VISIBLE_DEVICES": "2,1", "HIP_VISIBLE_DEVICES": "1"}, "1"),
        ({"ROCR_VISIBLE_DEVICES": "2,1", "HIP_VISIBLE_DEVICES": "0"}, "2"),
        ({"ROCR_VISIBLE_DEVICES": "GPU-1111"}, "1"),
        ({"CUDA_VISIBLE_DEVICES": "2"}, "2"),
        ({"CUDA_VISIBLE_DEVICES": "2", "HIP_VISIBLE_DEVICES": "0"}, "0"),
        ({"ROCR_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "1"}, ""),
    ],
)
def test_rocm_counts_what_was_left(env: dict[str, str], left: str) -> None:
    assert uuids(visible(CARDS, "amd", env)[0]) == list(left)


def test_no_gpu_has_no_note() -> None:
    assert visible((), "cpu", {NAME: "0"}) == ((), "")


@given(st.text("0123-,GPU x", max_size=20))
def test_any_selection_leaves_each_card_once_at_most(selection: str) -> None:
    found, _ = visible(CARDS, "nvidia", {NAME: selection})
    assert len(set(found)) == len(found)
    assert set(found) <= set(CARDS)
