"""Real vLLM with parsers for tool calls and reasoning, through router and agent."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes.both import ask_both
from fakes.stack import Stack, running

pytestmark = [pytest.mark.e2e, pytest.mark.full]
CHAT = "/v1/chat/completions"
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
