"""Launchers as files; what a plan says of them comes from the real planner."""

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from fakes.engine import CPU_HOST

from xim_agent.cli.doctor_look import Looks
from xim_agent.config.fields import Config
from xim_agent.doctor.report import Finding
from xim_agent.engine.launcher import save_flags
from xim_agent.hardware.report import Device, Hardware
from xim_agent.identity.store import StateStore

GIB = 2**30
FLAGS = {
    "--uds", "--served-model-name", "--max-num-seqs", "--allowed-media-domains", "--max-model-len",
    "--shutdown-timeout", "--disable-uvicorn-access-log", "--enable-prefix-caching", "--enable-prompt-tokens-details",
    "--gpu-memory-utilization", "--tensor-parallel-size", "--pipeline-parallel-size", "--dtype",
}  # fmt: skip


@pytest.fixture
def launcher(tmp_path: Path) -> Path:
    path = tmp_path / "venv" / "bin" / "vllm"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!{sys.executable}\n")
    path.chmod(0o755)
    (tmp_path / "venv/lib/python3.11/site-packages/vllm-0.31.0.dist-info").mkdir(parents=True)
    return path


def found_by(launcher: Path | str, hardware: Hardware = CPU_HOST, runtime: str = "", **settings: object) -> Finding:
    config = replace(Config(vllm_path=str(launcher)), **settings)  # type: ignore[arg-type]
    environ = {"PATH": os.defpath, "RUNTIME_DIRECTORY": runtime}
    return Looks(config, environ)._vllm(hardware)


def test_a_good_installation(launcher: Path) -> None:
    found = found_by(launcher)
    assert (found.status, found.text) == (
        "ok", f"{launcher}, version 0.31.0, not asked yet for its flags (a start proves them)",
    )  # fmt: skip
    launcher.write_bytes(b"\x7fELF")
    assert found_by(launcher).status == "ok", "no script"


def test_none_at_all(tmp_path: Path) -> None:
    for path in ("vllm", tmp_path / "vllm"):
        found = found_by(path)
        assert (found.status, found.exit_code) == ("failure", 78)
        assert found.text == f"there is no vLLM at {str(path)!r}"
        assert "XEROTIER_AGENT_VLLM_PATH" in found.cure


def test_an_environment_whose_python_is_gone(launcher: Path, tmp_path: Path) -> None:
    launcher.write_text(f"#!{tmp_path}/venv/bin/python -I\n")
    found = found_by(launcher)
    assert (found.status, found.exit_code) == ("failure", 78)
    assert f"its interpreter {tmp_path}/venv/bin/python does not exist" in found.text


@pytest.mark.parametrize(
    ("lacks", "status", "said"),
    [
        ("", "ok", "version 0.31.0, knows every flag that is needed"),
        ("--shutdown-timeout", "warning", "does not know --shutdown-timeout, left out"),
        ("--uds", "failure", "the installed vLLM does not know --uds"),
    ],
)
def test_flags_that_it_was_asked_for(launcher: Path, lacks: str, status: str, said: str) -> None:
    with tempfile.TemporaryDirectory(prefix="xim") as runtime:
        save_flags(Path(runtime) / "flags.json", launcher, frozenset(FLAGS - {lacks}))
        found = found_by(launcher, runtime=runtime)
    assert (found.status, said in found.text) == (status, True), found
    assert found.exit_code == (78 if status == "failure" else 0)


def test_settings_that_no_start_would_get_through(launcher: Path) -> None:
    found = found_by(launcher, vllm_args=("--host", "0.0.0.0"))
    assert (found.status, found.exit_code) == ("failure", 78)
    assert "VLLM_ARGS may not hold --host" in found.text


def test_a_card_without_free_memory(launcher: Path) -> None:
    def box(free: int) -> Hardware:
        return replace(
            CPU_HOST, accelerator="nvidia", devices=(Device(0, "GPU-0", "NVIDIA A10", 24 * GIB, free, "8.6"),)
        )

    assert found_by(launcher, box(24 * GIB)).status == "ok"
    found = found_by(launcher, box(12 * GIB))
    assert (found.status, "memory utilization lowered from 0.95 to 0.4" in found.text) == ("warning", True), found
    found = found_by(launcher, box(GIB))
    assert (found.status, "does not fit" in found.text) == ("failure", True), found


def test_what_a_running_agent_holds_of_a_card_is_no_fault(launcher: Path, tmp_path: Path) -> None:
    box = replace(CPU_HOST, accelerator="nvidia", devices=(Device(0, "GPU-0", "NVIDIA A10", 24 * GIB, GIB, "8.6"),))
    assert found_by(launcher, box, config_path=tmp_path).status == "failure"
    with StateStore.open(tmp_path):
        assert found_by(launcher, box, config_path=tmp_path).status == "ok"


def test_too_few_cards_are_the_business_of_another_check(launcher: Path) -> None:
    box = replace(CPU_HOST, accelerator="nvidia", devices=(Device(0, "GPU-0", "A10", 24 * GIB, 24 * GIB, "8.6"),))
    assert found_by(launcher, box, tensor_parallel_size=2).status == "ok"
    assert found_by(launcher, replace(box, devices=box.devices * 2), tensor_parallel_size=2).status == "ok"


def test_a_launcher_that_cannot_be_read(launcher: Path) -> None:
    launcher.unlink()
    launcher.mkdir()
    assert found_by(launcher).status == "failure"
