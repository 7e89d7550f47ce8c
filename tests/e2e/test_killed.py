"""A real agent process is killed or stopped under a thousand streams: each has one ending."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from fakes.stack import Stack, alive, running, until

pytestmark = [
    pytest.mark.e2e, pytest.mark.full,
    pytest.mark.filterwarnings("ignore:Async generator 'http:ResourceWarning"),  # of an answer that was cut
]  # fmt: skip
FAKE_VLLM = Path(__file__).parents[1] / "fakes" / "fake_vllm.py"
STREAMS, AT_ONCE, TOKENS = 1000, 200, 20


@pytest.fixture
def stack(agent_exe: Path, toy_model: Path, tmp_path: Path) -> Iterator[Stack]:
    with running(Stack(str(agent_exe), str(FAKE_VLLM), toy_model, tmp_path / "killed")) as stack:
        start(stack, XEROTIER_AGENT_JOIN_KEY=stack.join_key)
        yield stack


def start(stack: Stack, **env: str) -> None:
    stack.start_agent(XEROTIER_AGENT_MAX_CONCURRENT=str(AT_ONCE), **env)
    stack.wait_ready(60)


def kill(stack: Stack) -> None:
    assert stack.agent is not None
    family = stack.agent.family()
    family[0].children()[0].kill()  # the agent itself, behind its bootloader
    until(f"nothing is left of {family}", lambda: not alive(family), 10)
    stack.agent.wait(10)
    stack.agent = None


def body(number: int, delay: float = 0.0) -> dict[str, Any]:
    return {
        "model": "toy", "prompt": f"{number}", "stream": True, "max_tokens": TOKENS, "fake": {"delay": delay},
    }  # fmt: skip


def read(raw: str) -> tuple[str, int, int]:
    """Text, errors, `[DONE]`s of an event stream."""
    events = [line.removeprefix("data: ") for line in raw.splitlines() if line.startswith("data: ")]
    parts = [json.loads(event) for event in events if event != "[DONE]"]
    text = "".join(choice["text"] for part in parts for choice in part.get("choices", ()))
    return text, sum("error" in part for part in parts), events.count("[DONE]")


class Asking:
    """Each client's answer, as it came; `outcomes`: complete, cut (with an error), refused (by its status)."""

    def __init__(self, stack: Stack, whole: list[str]) -> None:
        self.stack, self.whole = stack, whole
        self.outcomes: Counter[str] = Counter()
        limits = httpx.Limits(max_connections=None)
        headers = {"authorization": f"Bearer {stack.api_key}"}
        self.http = httpx.AsyncClient(base_url=stack.url, headers=headers, timeout=120, limits=limits)

    async def one(self, number: int, room: trio.CapacityLimiter, delay: float) -> None:
        raw = b""
        async with room, self.http.stream("POST", "/v1/completions", json=body(number, delay)) as reply:
            try:
                async for piece in reply.aiter_bytes():
                    raw += piece
            except httpx.RemoteProtocolError:  # so ends what is cut: an error event, and no proper end
                assert reply.status_code == 200
        if reply.status_code != 200:
            assert json.loads(raw)["error"]
            self.outcomes[f"refused {reply.status_code}"] += 1
            return
        text, errors, done = read(raw.decode())
        assert errors + done == 1, f"one ending each: {raw[-1000:]!r}"
        complete = bool(done)
        assert text == self.whole[number] if complete else self.whole[number].startswith(text)
        self.outcomes["complete" if complete else "cut"] += 1

    async def all(self, count: int, delay: float) -> None:
        room = trio.CapacityLimiter(AT_ONCE)
        async with trio.open_nursery() as nursery:
            for number in range(count):
                nursery.start_soon(self.one, number, room, delay)


def expected(stack: Stack, count: int) -> list[str]:
    return [read(stack.direct("/v1/completions", body(number)).text)[0] for number in range(count)]


async def test_a_thousand_streams_and_three_kills(stack: Stack) -> None:
    asking = Asking(stack, expected(stack, STREAMS))
    assert len(set(asking.whole)) > 1

    async def killing() -> None:
        for _ in range(3):
            await trio.sleep(1.5)
            await trio.to_thread.run_sync(kill, stack)
            await trio.to_thread.run_sync(start, stack)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(killing)
        await asking.all(STREAMS, 0.1)
    outcomes = asking.outcomes
    print(outcomes)
    assert sum(outcomes.values()) == STREAMS
    assert set(outcomes) <= {"complete", "cut", "refused 502", "refused 503"}
    assert outcomes["cut"] >= 50
    assert outcomes["complete"] > STREAMS / 3
    asking.outcomes.clear()
    await asking.all(AT_ONCE, 0.0)
    assert asking.outcomes == {"complete": AT_ONCE}
    await asking.http.aclose()


async def test_endings_of_a_stopped_process_are_kept_for_the_next_start(stack: Stack) -> None:
    """Nobody answers when the answers end, until the agent's process has ended. The router is stopped, not cut off:
    what lies in its sockets is done when it goes on, so that some of the answers may be whole.
    """
    asking = Asking(stack, expected(stack, AT_ONCE))
    assert stack.router is not None
    router, spool = stack.router.family(), stack.config / "spool"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(asking.all, AT_ONCE, 0.2)
        await trio.sleep(2.0)
        for process in router:
            process.suspend()
        try:
            await trio.sleep(6.0)
            assert not asking.outcomes
            assert await trio.to_thread.run_sync(stack.stop_agent) == 0
            assert spool.exists()
            stack.start_agent()
        finally:
            for process in router:
                process.resume()
    assert sum(asking.outcomes.values()) == AT_ONCE
    assert set(asking.outcomes) <= {"complete", "cut"}
    stack.wait_ready(60)
    assert not spool.exists()
    assert stack.agent is not None
    assert "spooled endings refused" not in stack.agent.text
    await asking.http.aclose()
