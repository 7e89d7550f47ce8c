"""Frozen executable, local router in its own process, real vLLM on CPU. One engine serves most of it, in file order."""

import json
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fakes.both import ask_both, mask
from fakes.stack import Stack, alive, running, shared_memory, stream_lines, until

pytestmark = pytest.mark.e2e

PROMPT = [{"role": "user", "content": "Tell me a story about a lighthouse."}]
LONG: dict[str, Any] = {"max_tokens": 8000, "temperature": 0, "seed": 1, "extra_body": {"ignore_eos": True}}


def behind(stack: Stack) -> dict[str, str]:
    """Settings of an agent that knows no way around the proxy: it would take that when the proxy is cut."""
    return {"XEROTIER_AGENT_ROUTER_URL": stack.proxy.url}


@pytest.fixture(scope="module")
def stack(agent_exe: Path, vllm_launcher: str, toy_model: Path, tmp_path_factory: Any) -> Iterator[Stack]:
    root = tmp_path_factory.mktemp("e2e")
    with running(Stack(str(agent_exe), vllm_launcher, toy_model, root)) as stack:
        stack.start_agent(XEROTIER_AGENT_JOIN_KEY=stack.join_key, **behind(stack))
        stack.wait_ready()
        yield stack


@pytest.fixture
def ready(stack: Stack) -> Stack:
    """The stack, brought back when the test before left it without an agent. No join key: it has a credential."""
    if stack.agent is None or stack.agent.popen.poll() is not None:
        stack.start_agent(**behind(stack))
    stack.wait_ready()
    return stack


def texts(response: httpx.Response) -> str:
    """The answer's text, however it is cut into events."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line and line != "data: [DONE]"]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    return "".join(c.get("text") or (c.get("delta") or c.get("message") or {}).get("content") or "" for c in choices)


def chat_body(**more: Any) -> dict[str, Any]:
    return {"model": "toy", "messages": PROMPT, "max_tokens": 60, "temperature": 0, "seed": 1} | more


def stream_text(stack: Stack, started: threading.Event | None = None, **more: Any) -> str:
    """A long streamed completion to its end; raises when the stream ends without `[DONE]`."""
    parts, done = [], False
    body = chat_body(stream=True, ignore_eos=True, max_tokens=2500) | more
    with (
        httpx.Client(timeout=60) as client,
        client.stream(
            "POST", f"{stack.url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {stack.api_key}"}
        ) as response,
    ):
        assert response.status_code == 200, response.read()
        for event in stream_lines(response):
            if event == "[DONE]":
                done = True
                continue
            assert isinstance(event, dict)
            if "error" in event:
                raise ConnectionError(event["error"])
            parts += [c["delta"].get("content") or "" for c in event["choices"]]
            if started is not None and len(parts) > 5:
                started.set()
    if not done:
        raise ConnectionError("the stream ended without [DONE]")
    return "".join(parts)


class Stream:
    """`stream_text` in a thread, so that the test can break things meanwhile."""

    def __init__(self, stack: Stack, **more: Any) -> None:
        self.started = threading.Event()
        self.result: str | None = None
        self.error: Exception | None = None
        self.ended_at = 0.0
        self._thread = threading.Thread(target=self._run, args=(stack, more))
        self._thread.start()
        assert self.started.wait(30), self.error

    def _run(self, stack: Stack, more: dict[str, Any]) -> None:
        try:
            self.result = stream_text(stack, self.started, **more)
        except (httpx.HTTPError, ConnectionError, AssertionError) as error:
            self.error = error
        self.ended_at = time.monotonic()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def join(self, seconds: float) -> "Stream":
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"the stream has no end after {seconds} s"
        return self


def test_first_start_says_what_operators_wait_for(stack: Stack) -> None:
    assert stack.agent is not None
    agent = stack.agent
    until("the ready line", lambda: '"message": "ready"' in agent.text, 5)
    text = agent.text
    enrolled = re.search(r"enrollment successful: ([0-9a-f-]{36})", text)
    assert enrolled
    assert text.index("enrollment successful") < text.index('"message": "ready"')
    assert stack.join_key not in text


def test_chat_through_the_openai_package(ready: Stack) -> None:
    with ready.client() as client:
        whole = client.chat.completions.create(model="toy", messages=PROMPT, max_tokens=40, temperature=0, seed=1)  # type: ignore[arg-type]
        stream = client.chat.completions.create(
            model="toy", messages=PROMPT, max_tokens=40, temperature=0, seed=1, stream=True
        )  # type: ignore[call-overload]
        text = "".join(c.choices[0].delta.content or "" for c in stream if c.choices)
        assert text == whole.choices[0].message.content
        assert whole.usage is not None
        assert whole.usage.completion_tokens > 0
        assert [m.id for m in client.models.list()] == ["toy"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_answer_is_what_vllm_gives_directly(ready: Stack, path: str, stream: bool) -> None:
    body = chat_body(stream=stream)
    if path == "/v1/completions":
        del body["messages"]
        body["prompt"] = "Once upon a time"
    pairs = ask_both(ready, path, body)
    assert pairs[-1][0].status_code == 200
    assert {texts(d) for d, _ in pairs} == {texts(t) for _, t in pairs}
    assert len({texts(d) for d, _ in pairs}) == 1


SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
NAMED = {"type": "function", "function": {"name": "f"}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
IMAGE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
ASKED = {"model": "toy", "input": "Tell me a story.", "max_output_tokens": 20, "temperature": 0}
KINDS: dict[str, tuple[str, dict[str, Any], int]] = {  # path, body, what vLLM says to this model
    "logprobs": (CHAT, chat_body(logprobs=True, top_logprobs=3, max_tokens=12), 200),
    "stream with usage": (CHAT, chat_body(stream=True, stream_options={"include_usage": True}, max_tokens=12), 200),
    "streamed logprobs": (CHAT, chat_body(stream=True, logprobs=True, top_logprobs=2, max_tokens=12), 200),
    "several choices": (CHAT, chat_body(n=2, temperature=0.5, max_tokens=8), 200),
    "several greedy choices": (CHAT, chat_body(n=2, max_tokens=8), 400),
    "tools that it may not call": (CHAT, chat_body(tools=[TOOL], tool_choice="none", max_tokens=8), 200),
    "a named tool without a parser": (CHAT, chat_body(tools=[TOOL], tool_choice=NAMED, max_tokens=30), 400),
    "the same, streamed": (CHAT, chat_body(tools=[TOOL], tool_choice=NAMED, max_tokens=30, stream=True), 400),
    "tools without a parser": (CHAT, chat_body(tools=[TOOL], tool_choice="auto"), 400),
    "json schema": (CHAT, chat_body(response_format=FORMAT), 200),
    "reasoning": (CHAT, chat_body(include_reasoning=True, reasoning_effort="low", max_tokens=12), 200),
    "an image for a model without eyes": (CHAT, chat_body(messages=[{"role": "user", "content": [IMAGE]}]), 400),
    "an odd parameter": (CHAT, chat_body(temperature=-3), 400),
    "a message that is none": (CHAT, chat_body(messages=[{"role": 7}]), 400),
    "too long": (CHAT, chat_body(max_tokens=10**7), 400),
    "completion, echoed with logprobs": (
        COMPLETIONS,
        {"model": "toy", "prompt": "Once", "echo": True, "logprobs": 2, "max_tokens": 8, "temperature": 0},
        200,
    ),
    "completion of tokens": (
        COMPLETIONS,
        {"model": "toy", "prompt": [[5, 6, 7], [8, 9]], "max_tokens": 8, "temperature": 0, "stop": ["z"]},
        200,
    ),
    "response": (RESPONSES, ASKED, 200),
    "response, streamed": (RESPONSES, ASKED | {"stream": True}, 200),
    "response that goes on from none": (RESPONSES, ASKED | {"previous_response_id": "resp_0"}, 404),
    "tokenize": ("/tokenize", {"model": "toy", "prompt": "Gr\u00fc\u00dfe \U0001f600"}, 200),
    "tokenize a chat": ("/tokenize", {"model": "toy", "messages": PROMPT, "return_token_strs": True}, 200),
    "detokenize": ("/detokenize", {"model": "toy", "tokens": [5, 60, 7]}, 200),
    "detokenize what is none": ("/detokenize", {"model": "toy", "tokens": ["x"]}, 400),
    "embedding": ("/v1/embeddings", {"model": "toy", "input": "x"}, 404),
    "rerank": ("/v1/rerank", {"model": "toy", "query": "x", "documents": ["y"]}, 404),
    "score": ("/v1/score", {"model": "toy", "text_1": "x", "text_2": "y"}, 404),
}  # fmt: skip
POOLING: dict[str, tuple[str, dict[str, Any], int]] = {
    "embedding": ("/v1/embeddings", {"input": ["lighthouse", "sea"]}, 200),
    "embedding, packed": ("/v1/embeddings", {"input": "lighthouse", "encoding_format": "base64"}, 200),
    "embedding of nothing": ("/v1/embeddings", {"input": None}, 400),
    "rerank": ("/v1/rerank", {"query": "sea", "documents": ["lighthouse", "mountain"], "top_n": 1}, 200),
    "score": ("/v1/score", {"text_1": "sea", "text_2": ["lighthouse", "mountain"]}, 200),
    "tokenize": ("/tokenize", {"prompt": "lighthouse"}, 200),
    "chat with a model that has no voice": (CHAT, {"messages": PROMPT}, 404),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_request_and_error_is_what_vllm_gives_directly(ready: Stack, kind: str) -> None:
    path, body, status = KINDS[kind]
    assert ask_both(ready, path, body)[-1][1].status_code == status


def test_errors_of_vllm_reach_the_client_unchanged(ready: Stack) -> None:
    body = chat_body(temperature=-3)
    direct, through = ready.direct("/v1/chat/completions", body), ready.post("/v1/chat/completions", body)
    assert direct.status_code == through.status_code == 400
    assert mask(through.content) == mask(direct.content)


def test_errors_of_the_router_are_openais(ready: Stack) -> None:
    with ready.client() as client, pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=PROMPT)  # type: ignore[arg-type]
    assert missing.value.code == "model_not_found"
    with (
        openai.OpenAI(base_url=f"{ready.url}/v1", api_key="sk-wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_node_is_shown_online(ready: Stack) -> None:
    assert ready.router is not None
    printed = re.search(r"(http\S+)/dashboard/#/login/(\S+)", ready.router.text)
    assert printed
    with httpx.Client(base_url=printed[1], headers={"origin": printed[1]}, trust_env=False) as http:
        assert http.post("/dashboard/api/login", json={"token": printed[2]}).status_code == 204

        def online() -> bool:
            rows = http.get("/dashboard/agents.json").json()["agents"]
            return [r["status"] for r in rows] == ["online"] and rows[0]["model"] == "toy"

        until("the node is online", online, 60)


def test_client_that_goes_away_stops_the_engine(ready: Stack) -> None:
    def metric(name: str) -> float:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(ready.socket))) as client:
            text = client.get("http://engine/metrics").text
        return sum(map(float, re.findall(rf"^vllm:{name}\{{.*\}} ([0-9.e+]+)$", text, re.M)))

    before = metric("generation_tokens_total")
    with ready.client() as client:
        stream = client.chat.completions.create(model="toy", messages=PROMPT, stream=True, **LONG)  # type: ignore[call-overload]
        for _ in zip(range(5), stream, strict=False):
            pass
        assert metric("num_requests_running") == 1
        stream.close()
        until("vLLM has stopped generating", lambda: metric("num_requests_running") == 0, 60)
    # A busy machine may take seconds to pass it on; without a cancel all of it would have been generated.
    assert metric("generation_tokens_total") - before < LONG["max_tokens"]


@pytest.mark.full
def test_link_cut_for_5_s_loses_nothing(ready: Stack) -> None:
    expected = stream_text(ready)
    stream = Stream(ready)
    ready.proxy.cut()
    threading.Event().wait(5)
    assert stream.running, "all of it had been sent before the cut"
    ready.proxy.restore()
    stream.join(60)
    assert stream.error is None
    assert stream.result == expected


def test_router_restarted_agent_is_back(ready: Stack) -> None:
    assert ready.router is not None
    assert ready.agent is not None
    enrolled = ready.agent.text.count("enrollment successful")
    family = ready.router.family()
    ready.router.popen.kill()
    ready.router.wait(5)
    until("the router is gone, its bootloader's child too", lambda: not alive(family), 5)
    ready.start_router()
    assert ready.router.popen.poll() is None, ready.router.text
    begin = time.monotonic()
    response = until(
        "the next request works",
        lambda: (r := ready.post("/v1/chat/completions", chat_body())).status_code == 200 and r,
        10,
    )
    assert time.monotonic() - begin < 2 + 1.5, "back within 2 s, plus the answer itself"
    assert response.json()["choices"]
    assert ready.agent.text.count("enrollment successful") == enrolled


@pytest.mark.parametrize("victim", [("vllm", "serve"), pytest.param(("EngineCore",), marks=pytest.mark.full)])
def test_engine_killed_during_a_stream(ready: Stack, victim: tuple[str, ...]) -> None:
    assert ready.agent is not None
    failures = ready.metric("xim_agent_engine_failures_total")
    process = ready.agent.named(*victim)
    stream = Stream(ready)
    begin = time.monotonic()
    process.send_signal(signal.SIGKILL)
    stream.join(20)
    assert stream.result is None, "never a clean end"
    assert stream.error is not None
    assert stream.ended_at - begin < 5
    until("the agent has seen it", lambda: ready.metric("xim_agent_engine_failures_total") > failures, 30)
    ready.wait_ready()
    assert ready.post("/v1/chat/completions", chat_body()).status_code == 200


@pytest.mark.full
def test_another_model_is_assigned_and_embeds(ready: Stack, tmp_path: Path) -> None:
    """The same weights as an embedding model: fetched while the old one serves, switched, and back again."""
    other = tmp_path / "toy-embed"
    shutil.copytree(ready.model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    data = ("--data", str(ready.data))
    ready.cli("router", "model", "publish", str(other), "--name", "toy-embed", *data)
    ready.cli("router", "assign", "toy-embed", *data)

    def embeds() -> Any:
        reply = ready.post("/v1/embeddings", {"model": "toy-embed", "input": "lighthouse"})
        return reply.json()["data"][0]["embedding"] if reply.status_code == 200 else None

    assert len(until("the embedding model answers", embeds, 180, 1)) == config["hidden_size"]
    with ready.client() as client:
        through = client.embeddings.create(model="toy-embed", input="lighthouse")
    assert through.data[0].embedding == pytest.approx(embeds())
    for path, body, status in POOLING.values():
        assert ask_both(ready, path, {"model": "toy-embed", **body})[-1][1].status_code == status, path
    ready.cli("router", "assign", "toy", *data)
    until("the first model is back", lambda: ready.post("/v1/chat/completions", chat_body()).status_code == 200, 180, 1)


def test_sigterm_during_a_stream_lets_it_finish(ready: Stack) -> None:
    expected = stream_text(ready)
    stream = Stream(ready)
    assert ready.stop_agent() == 0
    stream.join(10)
    assert stream.error is None
    assert stream.result == expected
    assert not ready.socket.exists()


def test_starts_again_without_the_join_key(ready: Stack) -> None:
    assert ready.agent is not None
    assert "enrollment successful" not in ready.agent.text
    assert ready.post("/v1/chat/completions", chat_body()).status_code == 200


@pytest.mark.parametrize(
    ("victim", "when"),
    [
        ("bootloader", "ready"),
        ("bootloader", "starting"),
        ("child", "starting"),
        pytest.param("child", "ready", marks=pytest.mark.full),
    ],
)
def test_kill_9_of_the_agent_leaves_nothing(stack: Stack, victim: str, when: str) -> None:
    if stack.agent is None:
        stack.start_agent(**behind(stack))
    assert stack.agent is not None
    if when == "ready":
        stack.wait_ready()
    else:
        until("vLLM is being started", lambda: stack.agent is not None and len(stack.agent.family()) >= 4, 60)
    family = stack.agent.family()
    shared = shared_memory(family)
    bootloader = family[0]
    child = bootloader.children()[0]
    assert len(family) >= 4, "bootloader, agent, guard, vLLM"
    (bootloader if victim == "bootloader" else child).kill()
    until(f"nothing is left of {family}", lambda: not alive(family), 10)
    until("the socket is gone", lambda: not stack.socket.exists(), 10)
    assert not [path for path in shared if path.exists()]
    stack.agent.wait(30)
    stack.agent = None


@pytest.mark.full
@pytest.mark.parametrize("ending", ["second signal", "guard killed"])
def test_other_ends_of_the_agent_leave_nothing(ready: Stack, ending: str) -> None:
    assert ready.agent is not None
    family = ready.agent.family()
    shared = shared_memory(family)
    stream = Stream(ready, max_tokens=8000)
    if ending == "second signal":
        ready.agent.popen.send_signal(signal.SIGTERM)
        until("it drains", lambda: ready.agent is not None and "draining" in ready.agent.text, 30)
        threading.Event().wait(1.5)  # two within a second are taken for one of a terminal
        ready.agent.popen.send_signal(signal.SIGTERM)
    else:
        next(p for p in family if p.name() == "xim-guard").kill()
    until(f"nothing is left of {family}", lambda: not alive(family), 10)
    stream.join(90)  # by the router, when the lease has run out
    assert stream.result is None
    assert not ready.socket.exists()
    assert not [path for path in shared if path.exists()]
    assert (ready.agent.wait(5) == 0) == (ending == "second signal")
    ready.agent = None
