"""From an empty router to a streamed answer, as a newcomer does it: frozen executable, real vLLM, real browser."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.stack import Process, Stack, until

pytestmark = [pytest.mark.e2e, pytest.mark.full]
MINUTES = 300_000.0  # ms; vLLM starts on a busy machine


@pytest.fixture
def stack(agent_exe: Path, vllm_launcher: str, toy_model: Path, tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(str(agent_exe), vllm_launcher, toy_model, tmp_path)
    try:
        stack.start_router()
        yield stack
    finally:
        stack.close()


def printed_link(router: Process) -> str:
    """What the router says when it starts."""
    found = until("the router prints a link", lambda: re.search(r"http://\S+/dashboard/#/login/\S+", router.text), 10)
    return str(found[0])


def pasted(stack: Stack, command: str) -> Process:
    """What is shown, in a shell that finds the executable; settings of this machine are in its environment."""
    log = stack.root / "pasted.log"
    env = stack.env(PATH=f"{Path(stack.exe).parent}:/usr/bin:/bin")
    with log.open("wb") as out:
        popen = subprocess.Popen(["bash", "-c", command], env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    return Process(popen, log)
