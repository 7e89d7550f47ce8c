"""`plan` as a process: what it prints can be pasted, read by programs, and fed back; it starts and makes nothing."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from fakes.engine import CPU_HOST, assignment, write_model

from xim_agent.cli.plan import planned
from xim_agent.config.fields import Config
from xim_agent.config.paths import expected_runtime_directory
from xim_agent.engine.command import Places
from xim_agent.engine.command import plan as make_plan
from xim_agent.engine.facts import ModelFacts
from xim_agent.engine.launcher import save_flags
from xim_agent.engine.preview import document as document_of
from xim_agent.errors import AgentError, Exit
from xim_agent.hardware.document import from_document, to_document
from xim_agent.hardware.report import Cpu, Device, Hardware, report

GB = 10**9
L40S = {"name": "NVIDIA L40S", "memory_total_bytes": 48_305_799_168, "compute_capability": "8.9"}
BOX = {"accelerator": "nvidia", "memory_bytes": 256 * GB, "devices": [L40S, L40S]}


def plan(home: Path, *words: object, stdin: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    whole = {"HOME": str(home), "PATH": os.defpath, "PYTHONPATH": os.environ.get("PYTHONPATH", ""), **env}
    command = [sys.executable, "-m", "xim_agent", "plan", *map(str, words)]
    return subprocess.run(command, env=whole, cwd=home, input=stdin, capture_output=True, text=True, timeout=60)


def test_what_it_prints_can_be_pasted_and_nothing_is_made(tmp_path: Path) -> None:
    model = write_model(tmp_path / "a model")
    launcher = tmp_path / "vllm"
    launcher.write_text(f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv, dict(os.environ)]))\n")
    launcher.chmod(0o755)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    short = Path(tempfile.mkdtemp(prefix="xim"))  # where the agent's sockets would lie
    odd = "--vllm-arg=--chat-template=it's $HOME `x`"
    settings = ("--vllm-path", launcher, "--vllm-env", "VLLM_HOST_IP=10.0.0.1", odd, "--ray-address", "a b;$HOME")
    words = ("--model", model, "--cuda-visible-devices=0", "--hardware", "-", *settings)
    done = plan(tmp_path, *words, stdin=json.dumps(BOX), XDG_RUNTIME_DIR=str(short))
    assert (done.returncode, done.stderr) == (0, "")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    short.rmdir()
    assert f"--uds {short}/" in done.stdout
    assert "has not been asked yet which flags it knows" in done.stdout
    said = json.loads(subprocess.run(["sh"], input=done.stdout, capture_output=True, text=True, check=True).stdout)
    assert said[0][:3] == [str(launcher), "serve", str(model)]
    assert said[0][-1] == "--chat-template=it's $HOME `x`"
    assert said[1]["RAY_ADDRESS"] == "a b;$HOME"
    assert said[1]["VLLM_HOST_IP"] == "10.0.0.1", "what the agent sets, too, is no secret"
    assert said[1]["CUDA_VISIBLE_DEVICES"] == "0"
    assert said[1]["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"


def test_flags_that_this_vllm_was_asked_for_are_obeyed(tmp_path: Path) -> None:
    model, program = write_model(tmp_path / "m"), tmp_path / "vllm"
    program.write_text("#!/bin/false\n")
    program.chmod(0o755)
    short = Path(tempfile.mkdtemp(prefix="xim"))
    runtime = expected_runtime_directory(tmp_path / "config", {"RUNTIME_DIRECTORY": str(short)})
    words = (
        "--model",
        model,
        "--hardware",
        "-",
        "--vllm-path",
        program,
        "--config-path",
        tmp_path / "config",
        "--json",
    )
    try:
        for left_out, code in (("--shutdown-timeout", Exit.OK), ("--allowed-media-domains", Exit.CONFIG)):
            flags = {"--uds", "--served-model-name", "--max-num-seqs", "--allowed-media-domains", "--shutdown-timeout",
                     "--disable-uvicorn-access-log", "--enable-prefix-caching", "--enable-prompt-tokens-details",
                     "--gpu-memory-utilization", "--kv-offloading-size", "--kv-offloading-backend"}  # fmt: skip
            save_flags(runtime / "flags.json", program, frozenset(flags - {left_out}))
            done = plan(tmp_path, *words, stdin=json.dumps(BOX), RUNTIME_DIRECTORY=str(short))
            assert done.returncode == code, done.stderr
            if code == Exit.OK:
                found = json.loads(done.stdout)
                assert found["vllm"]["flags_checked"] is True
                assert left_out not in found["command"]
                assert found["warnings"] == [f"the installed vLLM does not know {left_out}, left out"]
            else:
                assert f"does not know {left_out} [engine_flag_missing]" in done.stderr
    finally:
        shutil.rmtree(short)


def test_json_has_a_stable_form_and_can_be_fed_back(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", num_hidden_layers=4)
    file = tmp_path / "box.json"
    file.write_text(json.dumps(BOX))
    words = ("--model", model, "--json", "--tensor-parallel-size", "2", "--max-model-len", "2000")
    made = plan(tmp_path, *words, "--hardware", file)
    found = json.loads(made.stdout)
    assert found.keys() == {
        "schema", "command", "environment", "vllm", "model", "max_model_len", "max_num_seqs", "max_concurrent",
        "tensor_parallel_size", "pipeline_parallel_size", "gpu_memory_utilization", "quantization", "kv_cache_bytes",
        "kv_offload_bytes", "sums", "warnings", "hardware",
    }  # fmt: skip
    assert found["schema"] == 1
    assert found["vllm"] == {"path": "vllm", "version": None, "flags_checked": False}
    assert (found["max_model_len"], found["tensor_parallel_size"], found["max_concurrent"]) == (2000, 2, 64)
    assert found["sums"][0].keys() == {"item", "value", "unit", "text"}
    memory = [term for term in found["sums"] if term["item"] in ("gpu_memory", "unused", "overhead", "weights")]
    assert sum(term["value"] for term in memory) == found["kv_cache_bytes"], "the sum adds up"
    assert [d["index"] for d in found["hardware"]["devices"]] == [0, 1]
    again = plan(tmp_path, *words, "--hardware", "-", stdin=made.stdout)
    assert json.loads(again.stdout) == found


def test_without_a_model_it_prints_this_machine(tmp_path: Path) -> None:
    found = from_document(plan(tmp_path).stdout.encode(), "stdout")
    assert found.cpus == tuple(sorted(os.sched_getaffinity(0)))
    assert found.memory_bytes > GB


def test_no_secret_is_shown(tmp_path: Path) -> None:
    secrets = {
        "XEROTIER_AGENT_JOIN_KEY": "xjk_slug_c2VjcmV0c2VjcmV0", "XEROTIER_AGENT_VLLM_SALT_SECRET": "grainofsalt",
        "XEROTIER_AGENT_VLLM_ARGS": "--api-key hunter22 --hf-token=hunter33", "XEROTIER_AGENT_VLLM_ENV": "FOO=hunter44",
        "HTTPS_PROXY": "http://joe:hunter55@proxy:1",
    }  # fmt: skip
    for words in ((), ("--json",)):
        done = plan(tmp_path, "--model", write_model(tmp_path / "m"), *words, **secrets)
        assert done.returncode == 0
        for word in ("c2VjcmV0", "grainofsalt", "hunter"):
            assert word not in done.stdout + done.stderr
    assert json.loads(done.stdout)["environment"]["FOO"] == "***"


def test_the_document_itself_holds_no_secret() -> None:
    config = Config(vllm_args=("--api-key", "hunter2"))
    made = make_plan(config, assignment(), CPU_HOST, ModelFacts("X", 1, 1, 1, 1), Places("v", "m", "s", "t", "c"))
    shown = document_of(made, CPU_HOST, directory="m", vllm_version=None, flags_checked=False, secret={"TMPDIR"})
    assert shown["command"][-2:] == ["--api-key", "***"]
    assert shown["environment"]["TMPDIR"] == "***"


@pytest.mark.parametrize(
    ("broken", "code", "said"),
    [
        ("directory", Exit.USAGE, "does not exist"),
        ("config.json", Exit.CONFIG, "there is no config.json [model_unreadable]"),
        ("header", Exit.CONFIG, "model.safetensors: header of 18446744073709551615 bytes [model_unreadable]"),
        ("weights", Exit.CONFIG, "it holds no weights (*.safetensors) [model_unreadable]"),
        ("hardware", Exit.CONFIG, "h.json describes no hardware: accelerator is missing [hardware_invalid]"),
        ("size", Exit.CONFIG, "does not fit: NVIDIA L40S 44.99 GiB; - all but 0.95 of it 2.25 GiB"),
        ("setting", Exit.CONFIG, "[config_invalid]"),
    ],
)
def test_errors_name_the_cause(tmp_path: Path, broken: str, code: Exit, said: str) -> None:
    model, file, words = write_model(tmp_path / "m"), tmp_path / "h.json", []
    file.write_text(json.dumps({} if broken == "hardware" else BOX))
    if broken == "header":
        (model / "model.safetensors").write_bytes(b"\xff" * 16)
    elif broken in ("config.json", "weights"):
        (model / broken.replace("weights", "model.safetensors")).unlink()
    elif broken == "setting":
        words = ["--tensor-parallel-size", "two"]
    if broken == "directory":
        model = tmp_path / "nowhere"
    if broken in ("header", "weights", "size"):  # the way from there to the message is that of the others
        config = Config(max_model_len=10**12 if broken == "size" else None)
        with pytest.raises(AgentError) as refused:
            planned(config, from_document(file.read_bytes(), "h.json"), model, None)
        assert refused.value.exit_code == code
        assert said in f"{refused.value.message} [{refused.value.code}]"
        return
    done = plan(tmp_path, "--model", model, "--hardware", file, *words)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert done.stdout == ""


def document(**changed: Any) -> bytes:
    return json.dumps({**BOX, **changed}).encode()


def test_a_hardware_document_survives_the_way_there_and_back() -> None:
    cards = (Device(0, "MIG-1", "NVIDIA H100", 80 * GB, 70 * GB, "9.0", True),)
    made = Hardware(
        "nvidia", cards, Cpu("EPYC", 8, 16, ("avx2",), "AuthenticAMD"), (0, 2), 1.5, 64 * GB, 32 * GB, 16 * GB, "555",
        "12.5", (0, 1), ("a note",),
    )  # fmt: skip
    assert from_document(json.dumps(to_document(made)).encode(), "x") == made
    reported = from_document(json.dumps(report(made, 7)).encode(), "x")
    assert (reported.devices, reported.memory_bytes) == (cards, 32 * GB), "what the router was told is enough"


def test_what_a_hardware_document_leaves_out_is_that_of_an_idle_machine() -> None:
    made = from_document(document(cpu={"cores": 4}), "x")
    assert made.devices[1].memory_free_bytes == L40S["memory_total_bytes"]
    assert (made.cpus, made.cpu_limit, made.shm_bytes) == ((0, 1, 2, 3), 4.0, 128 * GB)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "Expecting value"),
        (b"[]", "no JSON object"),
        (b"[" * 100_000, "recursion"),
        (b"\xff", "decode"),
        (document(memory_byte=1), "nothing is known of memory_byte"),
        (document(devices=[{**L40S, "vram": 1}]), r"nothing is known of devices\[0\].vram"),
        (document(devices=[{"name": "x"}]), r"devices\[0\].memory_total_bytes is missing"),
        (document(devices=["x"]), "'x' is no object"),
        (document(devices={}), "0 devices"),
        (document(devices=[{**L40S, "memory_total_bytes": "48 GB"}]), "Expected `int`"),
        (document(devices=[{**L40S, "memory_total_bytes": -1}]), "-1 is out of range"),
        (document(devices=[{**L40S, "memory_free_bytes": 10**12}]), "more memory is free"),
        (document(memory_bytes="much"), "Expected `int`"),
        (document(memory_bytes=10**400), "x describes"),
        (document(accelerator="tpu"), "tpu"),
        (document(accelerator="cpu"), "there are 2 devices"),
        (document(devices=[]), "there are 0 devices"),
        (document(cpus=[]), "names no CPU"),
        (document(cpu={"cores": 0}), "cpus"),
        (document(cpu={"cores": 10**9}), "cpus"),
        (document(hardware={"accelerator": "cpu"}), "memory_bytes is missing"),
    ],
)
def test_hardware_documents_of_nonsense(data: bytes, said: str) -> None:
    with pytest.raises(AgentError, match=said) as refused:
        from_document(data, "x")
    assert (refused.value.code, refused.value.exit_code) == ("hardware_invalid", Exit.CONFIG)


def test_the_names_in_files_end_no_comment(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", architectures=["Evil\ntouch evil #"])
    box = {**BOX, "devices": [{**L40S, "name": "card\rtouch evil"}]}
    done = plan(tmp_path, "--model", model, "--hardware", "-", stdin=json.dumps(box))
    assert done.returncode == 0
    assert [line for line in done.stdout.splitlines() if not line.startswith(("#", "export "))] == [
        shlex.join(shlex.split(done.stdout.splitlines()[-1]))
    ]
