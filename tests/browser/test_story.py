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
    """The command that is shown, in a shell that finds the executable; only the path of vLLM is this machine's."""
    log = stack.root / "pasted.log"
    env = stack.env(PATH=f"{Path(stack.exe).parent}:/usr/bin:/bin")
    command = command.replace("/opt/vllm/bin/vllm", stack.vllm)
    with log.open("wb") as out:
        popen = subprocess.Popen(
            ["bash", "-c", f"exec env {command}"],
            cwd=stack.root,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    return Process(popen, log)


@pytest.mark.e2e
@pytest.mark.full
def test_the_whole_of_it_for_real(stack: Stack, browser: Browser) -> None:
    assert stack.router is not None
    link = printed_link(stack.router)
    visitor = Visitor(browser, link.partition("/dashboard/")[0])
    visitor.page.goto(link)
    visitor.wait_live()
    shows_what_to_do_next(visitor)

    prepare, key, start = visitor.make_join_key("bare")[:3]
    kept = stack.root / "join-key"
    subprocess.run(["bash", "-c", prepare], cwd=stack.root, input=key, text=True, check=True)
    assert kept.read_text() == key
    stack.agent = pasted(stack, start)
    expect(visitor.page.locator(".joined")).to_contain_text("online", timeout=60_000)
    (agent,) = re.findall(r"enrollment successful: ([0-9a-f-]{36})", stack.agent.text)

    stack.cli("router", "model", "publish", str(stack.model), "--name", "toy", "--data", str(stack.data))
    visitor.assign("toy")
    visitor.go("agents")
    row = visitor.page.locator("main tbody tr")
    expect(row).to_contain_text(re.compile("starting|fetching|verifying"), timeout=60_000)
    expect(row).to_contain_text("ready", timeout=MINUTES)
    assert visitor.ask("Tell me of a lighthouse", "toy")

    stack.agent.popen.kill()
    visitor.go("agents")
    expect(row).to_contain_text("disconnected", timeout=(75 + 15) * 1000)  # the router's bound, and a busy machine
    visitor.remove(agent)
    visitor.go("agents")
    expect(visitor.page.locator("main .empty")).to_be_visible()
    assert not visitor.unexpected()
    visitor.close()
