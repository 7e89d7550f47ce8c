"""`local` of the frozen executable: router and agent in one tree, real vLLM."""

import contextlib
import re
import signal
import subprocess
from pathlib import Path

import httpx
import psutil
import pytest
from fakes.stack import Process, Stack, alive, shared_memory, until

pytestmark = pytest.mark.e2e


class Seen:
    """Every process that was ever below one."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.all: set[psutil.Process] = set()
        self.shared: set[Path] = set()

    def look(self) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = self.process.family()
            self.all |= set(family)
            self.shared |= shared_memory(family)
        return self.process.popen.poll() is not None


@pytest.fixture
def stack(agent_exe: Path, vllm_launcher: str, toy_model: Path, tmp_path: Path) -> Stack:
    return Stack(str(agent_exe), vllm_launcher, toy_model, tmp_path)


def start(stack: Stack, *args: str) -> tuple[Process, Path]:
    out, log = stack.root / "stdout", stack.root / "stderr"
    command = [stack.exe, "local", "--model", str(stack.model), "--data", str(stack.root / "data"), *args]
    with out.open("wb") as stdout, log.open("wb") as stderr:
        popen = subprocess.Popen(command, env=stack.env(), stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
    return Process(popen, log), out


def nothing_left(stack: Stack, seen: Seen) -> None:
    until(f"nothing is left of {seen.all}", lambda: not alive(list(seen.all)), 10)
    assert not [path for path in seen.shared if path.exists()]
    assert not [path for path in (stack.root / "data").rglob("*") if path.is_socket()]


@pytest.mark.full
def test_once_prints_the_answer_alone(stack: Stack) -> None:
    process, out = start(stack, "--once", "Say something.")
    seen = Seen(process)
    until("local --once ends", seen.look, 300, 0.3)
    assert process.popen.returncode == 0, process.text[-4000:]
    answer = out.read_text()
    assert answer.strip()
    assert "OpenAI base URL" not in answer
    nothing_left(stack, seen)


def test_it_answers_a_first_question_and_serves_until_ctrl_c(stack: Stack) -> None:
    process, out = start(stack)
    seen = Seen(process)
    until("the answer to the first question", lambda: seen.look() or out.read_text().endswith("\n"), 300, 0.3)
    assert process.popen.poll() is None, process.text[-4000:]
    url = re.search(r"OpenAI base URL +(\S+)", process.text)
    curl = re.search(r"^ *(curl .*)$", process.text, re.M)
    assert url
    assert curl
    pasted = subprocess.run(["bash", "-c", curl[1] + " -sS"], capture_output=True, text=True, check=True, timeout=60)
    assert '"choices"' in pasted.stdout
    link = re.search(r"Dashboard +(\S+/dashboard/)#/login/(\S+)$", process.text, re.M)
    assert link
    page = httpx.get(link[1])
    assert page.status_code == 200
    assert "text/html" in page.headers["content-type"]
    headers = {"origin": url[1].removesuffix("/v1")}
    assert httpx.post(f"{link[1]}api/login", json={"token": link[2]}, headers=headers).status_code == 204
    process.popen.send_signal(signal.SIGINT)
    until("Ctrl-C ends it", seen.look, 30)
    assert process.popen.returncode == 0, process.text[-4000:]
    nothing_left(stack, seen)
