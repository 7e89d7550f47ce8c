"""`doctor` as a process: on a machine in order, on a bare one, with wrong settings; it changes and betrays nothing."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from fakes.agent import running
from fakes.nvml import Machine, machine

from xim_agent.cli.doctor_look import Looks, examine
from xim_agent.config.fields import Config
from xim_agent.doctor.report import CHECKS, Finding, ok
from xim_agent.errors import Exit
from xim_agent.identity.store import StateStore


@pytest.fixture
def home() -> Iterator[Path]:
    """Short enough for sockets below it."""
    directory = Path(tempfile.mkdtemp(prefix="xim"))
    yield directory
    shutil.rmtree(directory)


async def doctor(home: Path, *words: object, **env: str) -> subprocess.CompletedProcess[bytes]:
    whole = {"HOME": str(home), "PATH": os.defpath, "PYTHONPATH": os.environ.get("PYTHONPATH", ""), **env}
    command = [sys.executable, "-m", "xim_agent", "doctor", *map(str, words)]
    run = partial(trio.run_process, command, env=whole, cwd=home, capture_stdout=True, capture_stderr=True, check=False)
    with trio.fail_after(60):
        return await run()


def by_name(done: subprocess.CompletedProcess[bytes]) -> dict[str, Any]:
    found = json.loads(done.stdout)
    assert found["exit_code"] == done.returncode
    return {check["check"]: check for check in found["checks"]}


def everything(home: Path) -> dict[Path, tuple[int, ...]]:
    """What would tell of a change, reading excepted."""
    found = {path: path.lstat() for path in (home, *home.rglob("*"))}
    return {path: (s.st_ino, s.st_mode, s.st_uid, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in found.items()}


async def test_a_machine_in_order(home: Path, tmp_path: Path) -> None:
    (home / "vllm").write_text("#!/bin/sh\n")
    (home / "vllm").chmod(0o755)
    words = ("--vllm-path", home / "vllm", "--model-cache-max-size-gb", "0.1", "--json")
    async with running(tmp_path / "router") as bench:
        key = bench.join_key()
        before = everything(home)
        done = await doctor(home, *words, XEROTIER_AGENT_JOIN_KEY=key, HTTPS_PROXY="http://joe:hunter2@127.0.0.1:1")
    found = by_name(done)
    assert done.returncode == 0, done.stdout
    assert tuple(found) == CHECKS
    good = {"configuration", "state", "credential", "agent", "sockets", "cache", "router", "clock", "vllm"}
    assert {found[name]["status"] for name in good} == {"ok"}, done.stdout
    assert found["router"]["text"] == f"{bench.url}: DNS, TCP, protocol all good"
    assert everything(home) == before, "nothing was made or changed"
    for secret in (key, key.split("_")[2], "hunter2"):
        assert secret.encode() not in done.stdout + done.stderr


async def test_a_bare_machine(home: Path) -> None:
    done = await doctor(home)
    assert done.returncode == Exit.CONFIG
    text = done.stdout.decode()
    assert len(text.splitlines()) <= 40
    assert "FAIL  credential     this agent is not enrolled and has no join key\n" in text
    assert "cure: install vLLM, or set XEROTIER_AGENT_VLLM_PATH to its `vllm` program\n" in text
    assert "-     router         no router is known" in text
    assert done.stderr == b""
    assert len(everything(home)) == 1


async def test_wrong_settings_do_not_end_the_look(home: Path) -> None:
    """Nor do they show what may be secret."""
    settings = {"TENSOR_PARALLEL_SIZE": "two", "JOIN_KEY": "xjk_slug_c2VjcmV0c2VjcmV0", "MAX_MODEL_LENGTH": "5"}
    done = await doctor(home, "--json", **{f"XEROTIER_AGENT_{name}": value for name, value in settings.items()})
    found = by_name(done)
    assert done.returncode == Exit.CONFIG
    assert found["configuration"]["text"].startswith("XEROTIER_AGENT_TENSOR_PARALLEL_SIZE: `two` is no whole number")
    assert found["configuration"]["cure"]
    assert {found[name]["status"] for name in ("state", "router", "vllm")} == {"skipped"}
    assert "buffers" in found
    assert b"c2VjcmV0" not in done.stdout + done.stderr


async def test_a_setting_that_nobody_knows_is_a_warning(home: Path) -> None:
    odd = home / "xjk_slug_c2VjcmV0c2VjcmV0"
    checks = by_name(await doctor(home, "--json", "--model-cache-path", odd, XEROTIER_AGENT_MAX_MODEL_LENGTH="5"))
    found = checks["configuration"]
    assert (found["status"], found["exit_code"]) == ("warning", 0)
    assert "did you mean XEROTIER_AGENT_MAX_MODEL_LEN?" in found["text"]
    assert f"{home}/***: 0.0 GB of 100.0 GB used" in checks["cache"]["text"], "what looks like a key is not shown"


def config(home: Path, **settings: Any) -> Config:
    return Config(config_path=home / "state", model_cache_path=home / "cache", **settings)


def looked(config: Config, environ: dict[str, str] | None = None) -> dict[str, Finding]:
    found = trio.run(examine, config, ok("configuration", "valid"), environ or {"PATH": os.defpath})
    return {finding.check: finding for finding in found}


def test_the_first_failure_gives_the_exit_code(home: Path) -> None:
    (home / "state").mkdir(mode=0o755)
    (home / "state").chmod(0o755)
    found = looked(config(home))
    assert (found["state"].status, found["state"].exit_code) == ("failure", Exit.STATE)
    assert (found["credential"].status, found["credential"].text) == ("skipped", "the state cannot be used, see state")


def test_a_running_agent_is_told_and_is_no_fault(home: Path) -> None:
    with StateStore.open(home / "state"):
        found = looked(config(home))
    assert (found["agent"].status, f"with pid {os.getpid()}" in found["agent"].text) == ("ok", True)
    assert "(of this shell)" in looked(config(home))["files"].text


HOLD = """
import resource, sys, pathlib
from xim_agent.identity.store import StateStore
resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99))
with StateStore.open(pathlib.Path(sys.argv[1])):
    print(flush=True)
    input()
"""


def test_the_limits_are_those_of_the_running_agent(home: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(home / "state")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        found = looked(config(home))["files"]
        other.communicate(b"\n")
    assert (found.status, found.exit_code) == ("failure", Exit.CONFIG)
    assert found.text.startswith("99 open files, at most 99 (of the running agent)")


async def test_a_router_of_another_protocol(home: Path, nursery: trio.Nursery) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            body = '{"code": "protocol_unsupported", "protocols": [2]}'
            await stream.send_all(f"HTTP/1.1 426 Upgrade\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())

    [listener] = await nursery.start(partial(trio.serve_tcp, answer, 0, host="127.0.0.1"))
    url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
    looks = Looks(config(home, router_url=url), {})
    await looks.within(("state", "credential"), 5, looks.of_identity)
    found = (await looks.of_routers())[0]
    assert (found.status, found.exit_code) == ("failure", Exit.PROTOCOL)
    assert found.text == f"{url}: DNS, TCP good, protocol failed: this agent speaks protocol 1, the router [2]"


def test_a_key_or_a_router_that_is_malformed(home: Path) -> None:
    (home / "key").write_text("xjk_slug_cut")
    found = looked(config(home, join_key_file=home / "key", router_url="ftp://x"))
    assert (found["credential"].status, found["credential"].exit_code) == ("failure", Exit.CONFIG)
    assert "the join key is malformed" in found["credential"].text
    assert (found["router"].status, found["router"].exit_code) == ("failure", Exit.CONFIG)
    found = looked(config(home, join_key_file=home / "nothing", router_url="http://127.0.0.1:1"))
    assert f"cannot read {home}/nothing" in found["credential"].text
    assert found["router"].text.startswith("http://127.0.0.1:1: DNS good, TCP failed: ")
    assert found["router"].exit_code == Exit.NO_ROUTER


def test_a_cache_that_is_no_cache(home: Path) -> None:
    (home / "cache").touch()
    found = looked(config(home))["cache"]
    assert (found.status, found.exit_code) == ("failure", Exit.STATE)
    (home / "cache").unlink()
    (home / "cache").mkdir()
    (home / "cache" / "FORMAT").write_text("7")
    assert "has the cache format '7', this agent knows 1" in looked(config(home))["cache"].text


async def test_what_hangs_becomes_a_failure_and_holds_nothing_up() -> None:
    looks = Looks(Config(), {})

    async def hang() -> Sequence[Finding]:
        await trio.sleep_forever()

    with trio.fail_after(5):
        await looks.within(("state", "credential"), 0.01, hang)
    found = looks.findings["credential"]
    assert (found.status, found.exit_code) == ("failure", Exit.STATE)
    assert "had no end within" in found.text
    with trio.fail_after(5):
        assert (await looks.of_routers())[0].status == "skipped", "who waits for the state does so no longer"


@pytest.fixture
def nvml(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return machine(tmp_path, tmp_path_factory.getbasetemp(), monkeypatch)


def test_a_driver_that_hangs(home: Path, nvml: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xim_agent.cli.doctor_look.MACHINE_SECONDS", 0.3)
    nvml.add()
    nvml.hang = True
    nvml.write()
    waited_for = threading.Event()

    def end() -> None:
        waited_for.set()
        nvml.hang = False
        nvml.write()

    late = threading.Timer(10, end)
    late.start()
    found = looked(config(home))
    late.cancel()
    assert not waited_for.is_set()
    end()
    assert {found[name].status for name in ("gpu", "amd", "shm", "vllm")} == {"failure"}
    assert found["sockets"].status == "ok"
