"""Both forms of the executable as a running agent: whom a signal reaches, what is left behind, and memory at rest."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fakes.stack import Process, Stack, alive, running, until

pytestmark = pytest.mark.e2e
FAKE_VLLM = Path(__file__).parents[1] / "fakes" / "fake_vllm.py"
FORMS = ["one file", "one directory"]


@pytest.fixture(scope="module")
def router(agent_exe: Path, toy_model: Path, tmp_path_factory: Any) -> Iterator[Stack]:
    with running(Stack(str(agent_exe), str(FAKE_VLLM), toy_model, tmp_path_factory.mktemp("forms"))) as stack:
        yield stack


class Agent:
    """A serving agent of one form. `process` is the program itself, behind its bootloader where it has one."""

    def __init__(self, stack: Stack, form: str, onedir: Path, scratch: Path) -> None:
        self.scratch = scratch
        self.stack = stack
        one_file = stack.exe
        if form == "one directory":
            stack.exe = str(onedir)
        try:
            stack.start_agent(XEROTIER_AGENT_JOIN_KEY=stack.join_key, TMPDIR=str(scratch))
        finally:
            stack.exe = one_file
        stack.wait_ready(60)
        assert stack.agent is not None
        self.started: Process = stack.agent
        self.family = self.started.family()
        first = self.family[0]
        self.process = first.children()[0] if form == "one file" else first

    def ends(self) -> int:
        """Waits; returns the exit code. Nothing of it may be left: process, socket or unpacked file."""
        code = self.started.wait(60)
        until(f"nothing is left of {self.family}", lambda: not alive(self.family), 10)
        until("the socket is gone", lambda: not self.stack.socket.exists(), 10)
        until("what was unpacked is gone", lambda: not list(self.scratch.glob("_MEI*")), 10)
        self.stack.agent = None
        return code


@pytest.fixture(params=FORMS)
def agent(router: Stack, agent_onedir: Path, tmp_path: Path, request: Any) -> Agent:
    return Agent(router, request.param, agent_onedir, tmp_path)


def test_small_at_rest_and_sigterm_drains(agent: Agent) -> None:
    assert agent.process.memory_info().rss <= 80 * 2**20
    assert len(agent.family) - (agent.process.pid != agent.started.popen.pid) == 3, "agent, guard, vLLM"
    assert bool(list(agent.scratch.glob("_MEI*"))) == (agent.process.pid != agent.started.popen.pid)
    agent.started.popen.terminate()
    assert agent.ends() == 0
    assert "SIGTERM: draining" in agent.started.text
    assert "abandoning" not in agent.started.text


def test_sighup_reaches_the_program_which_goes_on(agent: Agent) -> None:
    """A reload; only for a process on a terminal it means that the terminal is gone."""
    agent.started.popen.send_signal(signal.SIGHUP)
    until("the log level is read again", lambda: "level_now" in agent.started.text, 30)
    assert len(alive(agent.family)) == len(agent.family)
    agent.started.popen.terminate()
    assert agent.ends() == 0


def test_sigkill_of_what_was_started_ends_all(agent: Agent) -> None:
    agent.started.popen.kill()
    assert agent.ends() == -signal.SIGKILL


def test_ctrl_c_reaches_bootloader_and_program_and_still_drains(
    router: Stack, agent_onedir: Path, tmp_path: Path
) -> None:
    agent = Agent(router, "one file", agent_onedir, tmp_path)
    for process in (agent.family[0], agent.process):  # what a terminal does
        os.kill(process.pid, signal.SIGINT)
    assert agent.ends() == 0
    assert "abandoning" not in agent.started.text


def test_what_an_upgrade_replaces_is_not_needed_to_answer_and_end(
    router: Stack, agent_onedir: Path, tmp_path: Path
) -> None:
    """A package restarts the agent when its files are replaced already."""
    shutil.copytree(agent_onedir.parent, tmp_path / "old", symlinks=True)
    agent = Agent(router, "one directory", tmp_path / "old" / agent_onedir.name, tmp_path)
    shutil.rmtree(tmp_path / "old")
    body = {"model": "toy", "prompt": "x", "max_tokens": 2}
    assert router.post("/v1/completions", body).status_code == 200
    agent.started.popen.terminate()
    assert agent.ends() == 0
    assert "Traceback" not in agent.started.text


def test_one_directory_is_one_process_and_runs_where_nothing_may_be_unpacked(
    agent_onedir: Path, tmp_path: Path
) -> None:
    """Supervisors talk to the process that they started; a hardened /tmp may be full or mounted noexec."""
    nowhere = tmp_path / "nowhere"
    command = [str(agent_onedir), "router", "serve", "--listen", "127.0.0.1:0", "--data", str(tmp_path / "data")]
    with (tmp_path / "log").open("wb") as log, psutil.Popen(command, env={"TMPDIR": str(nowhere)}, stderr=log) as child:
        until("it serves", lambda: child.net_connections(kind="tcp"), 15)
        assert child.children() == []
        child.terminate()
        assert child.wait(15) == 0
    assert not nowhere.exists()
