"""From an empty router to a streamed answer, as a newcomer does it, with a fake agent; and the whole of it for real.

For real: the frozen executable, real vLLM, and what the pages show pasted into a shell.
"""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.browser import Visit, Visitor
from fakes.stack import Process, Stack, until
from fakes.world import World
from playwright.sync_api import Browser, expect

MINUTES = 300_000.0  # ms; vLLM starts on a busy machine
PAGES = ("agents", "join", "models", "keys", "try")


def shows_what_to_do_next(visitor: Visitor) -> None:
    """Every page of a router that nobody has used yet."""
    for route in PAGES:
        visitor.go(route)
        expect(visitor.page.locator("main .empty:visible").first).to_contain_text(re.compile("."))


def test_from_nothing_to_an_answer(world: World, visit: Visit) -> None:
    visitor = visit()
    shows_what_to_do_next(visitor)
    key = visitor.make_join_key("bare")[1]
    agent = world.agent("newcomer", key=key, living=False)
    joined = visitor.page.locator(".joined")
    expect(joined).to_contain_text("pending")
    agent.wake()
    expect(joined).to_contain_text("online")
    world.publish("toy", assigned=False)
    visitor.assign("toy")
    agent.says = {}
    assert visitor.ask("Tell me of a lighthouse", "toy") == "Hello from a lighthouse."


# The whole of it for real.


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
