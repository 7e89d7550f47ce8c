"""Real vLLM, and a client that does not read: through router and agent."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes.stack import Stack, running

pytestmark = [pytest.mark.e2e, pytest.mark.full]
CHAT = "/v1/chat/completions"
MIB = 2**20
BODY = {
    "model": "toy", "messages": [{"role": "user", "content": "Tell me a story."}], "temperature": 0, "seed": 1,
    "ignore_eos": True,
}  # fmt: skip
LONG = BODY | {"max_tokens": 8000, "stream": True, "logprobs": True, "top_logprobs": 20}


@pytest.fixture
def stack(agent_exe: Path, vllm_launcher: str, toy_model: Path, tmp_path: Path) -> Iterator[Stack]:
    with running(Stack(str(agent_exe), vllm_launcher, toy_model, tmp_path / "unread")) as stack:
        stack.start_agent(XEROTIER_AGENT_JOIN_KEY=stack.join_key)
        stack.wait_ready()
        yield stack


def asking(stack: Stack, body: dict[str, Any]) -> socket.socket:
    """A client that has sent its request and reads nothing; its own buffer is small."""
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
    slow.connect(("127.0.0.1", stack.port))
    raw = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {stack.api_key}\r\nconnection: close\r\n"
    slow.sendall(f"{head}content-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n".encode() + raw)
    return slow


def test_a_client_that_reads_nothing_for_60_s_costs_little_and_restarts_nothing(stack: Stack) -> None:
    """10 MiB wait for it, in the engine but for one window of credit; the others are served as ever."""
    assert stack.agent is not None
    assert stack.router is not None
    # What vLLM compiles for the first request with logprobs holds up all others for 15 s.
    assert stack.post(CHAT, LONG | {"max_tokens": 5, "stream": False}).status_code == 200
    ours = [*stack.router.family(), *(p for p in stack.agent.family() if stack.exe in p.cmdline())]
    family = [*stack.router.family(), *stack.agent.family()]
    failures = stack.metric("xim_agent_engine_failures_total")
    before = {process: process.memory_info().rss for process in family}
    most = dict.fromkeys(family, 0)
    served = 0
    with asking(stack, LONG) as slow:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            assert stack.post(CHAT, BODY | {"max_tokens": 5}).status_code == 200
            served += 1
            for process in family:
                most[process] = max(most[process], process.memory_info().rss - before[process])
        assert stack.metric("xim_agent_leases_running") == 1, "its answer is held up"
        assert served >= 30
        grown = {f"{process.pid} {process.cmdline()[:3]}": size // MIB for process, size in most.items()}
        assert len(ours) >= 2
        assert all(most[process] < 8 * MIB for process in ours), grown
        assert all(size < 256 * MIB for size in most.values()), grown
        assert stack.metric("xim_agent_engine_failures_total") == failures
        assert {*stack.router.family(), *stack.agent.family()} == set(family), "nothing was started again"
        slow.settimeout(60)
        answer = b"".join(iter(lambda: slow.recv(1 << 20), b""))
    assert len(answer) > 8 * MIB
    assert b"data: [DONE]" in answer[-200:]
