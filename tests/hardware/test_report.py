import json

import pytest

from xim_agent.hardware.report import Cpu, Device, Hardware, report

DEVICES = tuple(Device(i, f"GPU-{i}{i}{i}", "H100", 80, 79, "9.0") for i in range(3))


def hardware(accelerator: str = "cpu", vendor: str = "AuthenticAMD") -> Hardware:
    return Hardware(
        accelerator=accelerator,  # type: ignore[arg-type]
        devices=DEVICES if accelerator != "cpu" else (),
        cpu=Cpu("EPYC", 8, 16, ("avx2",), vendor),
        cpus=(0, 1),
        cpu_limit=1.5,
        memory_total_bytes=64,
        memory_bytes=32,
        shm_bytes=16,
    )


@pytest.mark.parametrize(
    ("accelerator", "vendor", "tier"),
    [
        ("nvidia", "", "gpu_nvidia_shared"),
        ("amd", "GenuineIntel", "gpu_amd_shared"),
        ("cpu", "AuthenticAMD", "cpu_amd_optimized"),
        ("cpu", "GenuineIntel", "cpu_intel_optimized"),
        ("cpu", "ARM", "self_hosted"),
    ],
)
def test_tier(accelerator: str, vendor: str, tier: str) -> None:
    assert hardware(accelerator, vendor).tier == tier


def test_report_is_json_of_the_wire_form() -> None:
    sent = json.loads(json.dumps(report(hardware("nvidia"), 7)))
    assert sent.keys() == {
        "accelerator", "devices", "driver", "cuda", "cpu", "memory_bytes", "cache_bytes", "shm_bytes", "tier",
    }  # fmt: skip
    assert sent["devices"][0].keys() == {
        "index", "uuid", "name", "memory_total_bytes", "memory_free_bytes", "compute_capability", "mig",
    }  # fmt: skip
    assert sent["cpu"] == {"model": "EPYC", "cores": 8, "threads": 16, "isa": ["avx2"]}
    assert (sent["memory_bytes"], sent["cache_bytes"], sent["shm_bytes"]) == (32, 7, 16)
