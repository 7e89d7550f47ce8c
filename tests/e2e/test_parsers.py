"""Real vLLM with parsers of its own and with clients that do not read: through router and agent."""

import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fakes.both import ask_both
from fakes.stack import Stack, running

pytestmark = [pytest.mark.e2e, pytest.mark.full]
CHAT = "/v1/chat/completions"
MIB = 2**20
ARGS = (
    "--enforce-eager --max-model-len 16384 --enable-auto-tool-choice --tool-call-parser hermes --reasoning-parser qwen3"
)
SCHEMA = {
    "type": "object", "properties": {"n": {"type": "integer", "enum": [1, 2]}}, "required": ["n"],
    "additionalProperties": False,
}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "f", "strict": True, "parameters": SCHEMA}}
NAMED = {"type": "function", "function": {"name": "f"}}
CALM = {"chat_template_kwargs": {"enable_thinking": False}}
BODY = {
    "model": "toy", "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 300, "temperature": 0,
    "seed": 1,
}  # fmt: skip
KINDS: dict[str, tuple[dict[str, Any], str]] = {  # what is asked more, what must be in the answer
    "a named tool": ({"tools": [TOOL], "tool_choice": NAMED} | CALM, "tool_calls"),
    "some tool": ({"tools": [TOOL], "tool_choice": "required"} | CALM, "tool_calls"),
    "a tool if it likes": ({"tools": [TOOL], "tool_choice": "auto", "max_tokens": 30} | CALM, "content"),
    "reasoning": ({"max_tokens": 40}, "reasoning"),
    "reasoning with tools": ({"tools": [TOOL], "tool_choice": "auto", "max_tokens": 40}, "reasoning"),
    "no reasoning": ({"max_tokens": 40} | CALM, "content"),
}


@pytest.fixture(scope="module")
def stack(agent_exe: Path, vllm_launcher: str, toy_model: Path, tmp_path_factory: Any) -> Iterator[Stack]:
    """The toy model with two of its special tokens renamed to those that enclose reasoning."""
    root = tmp_path_factory.mktemp("parsers")
    model = root / "model"
    shutil.copytree(toy_model, model)
    file = model / "tokenizer.json"
    file.write_text(file.read_text().replace("<|system|>", "<think>").replace("<|user|>", "</think>"))
    with running(Stack(str(agent_exe), vllm_launcher, model, root / "stack")) as stack:
        stack.start_agent(XEROTIER_AGENT_JOIN_KEY=stack.join_key, XEROTIER_AGENT_VLLM_ARGS=ARGS)
        stack.wait_ready()
        yield stack


def said(text: str, stream: bool) -> dict[str, str]:
    """What the answer has of each kind, put together again."""
    parts = (
        [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")] if stream else [text]
    )
    found = {"content": "", "reasoning": "", "tool_calls": ""}
    for choice in (choice for part in parts for choice in json.loads(part)["choices"]):
        message = choice.get("delta") or choice.get("message") or {}
        for name in ("content", "reasoning"):
            found[name] += message.get(name) or ""
        for call in message.get("tool_calls") or ():
            found["tool_calls"] += call["function"].get("arguments") or ""
    return found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_tools_and_reasoning_are_what_vllm_gives_directly(stack: Stack, kind: str, stream: bool) -> None:
    more, wanted = KINDS[kind]
    _, through = ask_both(stack, CHAT, BODY | more | {"stream": stream})[-1]
    assert through.status_code == 200
    found = said(through.text, stream)
    assert found[wanted]
    if wanted == "tool_calls":
        assert json.loads(found["tool_calls"])["n"] in (1, 2)


def test_a_client_that_reads_nothing_for_60_s_costs_little_and_restarts_nothing(stack: Stack) -> None:
    """About 30 MiB wait: beyond sockets and credit in the engine alone, which is bounded by what it may say."""
    assert stack.agent is not None
    family = stack.agent.family()
    failures = stack.metric("xim_agent_engine_failures_total")
    rss = {process: process.memory_info().rss for process in family}
    body = BODY | {"max_tokens": 8000, "ignore_eos": True, "stream": True, "logprobs": True, "top_logprobs": 20}
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        slow.connect(("127.0.0.1", stack.port))
        raw = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {stack.api_key}\r\nconnection: close\r\n"
        slow.sendall(f"{head}content-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n".encode() + raw)
        most = dict.fromkeys(family, 0)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            assert stack.post(CHAT, BODY | {"max_tokens": 5} | CALM).status_code == 200, "the others are served"
            for process in family:
                most[process] = max(most[process], process.memory_info().rss - rss[process])
            threading.Event().wait(0.5)
        print({" ".join(process.cmdline())[-40:]: grown // MIB for process, grown in most.items()})
        assert max(most.values()) < 256 * MIB
        assert stack.metric("xim_agent_engine_failures_total") == failures
        assert {process.pid for process in stack.agent.family()} == {process.pid for process in family}
        assert all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)
        slow.settimeout(60)
        answer = b"".join(iter(lambda: slow.recv(1 << 20), b""))
    assert len(answer) > 10 * MIB
    assert b"data: [DONE]" in answer[-200:]
    assert answer.count(b'"choices":[{') >= 7000
