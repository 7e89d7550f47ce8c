"""Clients against the router over loopback sockets, an agent by hand behind it."""

import hashlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import pytest
import trio
import zstandard
from fakes.agent import MODEL, Bench, FakeAgent, answer, error, head, running, until

from xim_agent.mesh.messages import MAX_BODY, SERVED_PATHS
from xim_agent.router import catalog
from xim_agent.router.jobs import Limits

ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
JSON = "application/json"
T = TypeVar("T")


def chunk(text: str) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    event = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": [choice]}
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def whole(text: str) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return json.dumps(
        {"id": "c", "object": "chat.completion", "created": 1, "model": MODEL, "choices": [choice]}
    ).encode()


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with running(tmp_path / "router", Limits(queue_wait=0.5, grace=0.0)) as bench:
        yield bench


@pytest.fixture
async def agent(bench: Bench) -> FakeAgent:
    agent = await bench.agent()
    await agent.poll()
    return agent


async def use(bench: Bench, action: Callable[[openai.OpenAI], T], key: str | None = None) -> T:
    """The official client as it is most used: blocking, in a thread of its own."""

    def run() -> T:
        with openai.OpenAI(base_url=f"{bench.url}/v1", api_key=key or bench.api_key, max_retries=0) as api:
            return action(api)

    return await trio.to_thread.run_sync(run)


def ask(api: openai.OpenAI) -> Any:
    return api.chat.completions.create(**ASK)


def read(stream: Iterable[Any]) -> list[str]:
    return [event.choices[0].delta.content for event in stream]


class Post:
    """A request in the background. `stop` is the client that goes away."""

    def __init__(self, bench: Bench, body: dict[str, Any] = ASK, path: str = "/v1/chat/completions") -> None:
        self.bench, self.body, self.path = bench, body, path
        self.content: bytes | None = None
        self.reply: httpx.Response | None = None
        self.scope = trio.CancelScope()
        self.data = b""
        self.broken = False
        self.first = trio.Event()

    async def run(self) -> None:
        with self.scope:
            given: dict[str, Any] = {"json": self.body} if self.content is None else {"content": self.content}
            async with self.bench.http() as http, http.stream("POST", self.path, **given) as reply:
                self.reply = reply
                try:
                    async for data in reply.aiter_raw():
                        self.data += data
                        self.first.set()
                except httpx.RemoteProtocolError:
                    self.broken = True

    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.data)["error"]
        return found


async def test_openai_client_gets_an_answer(bench: Bench, agent: FakeAgent, nursery: trio.Nursery) -> None:
    frames = answer([whole("Paris")[:20], whole("Paris")[20:]], kind=JSON)
    nursery.start_soon(agent.serve_one, frames)
    reply: Any = await use(bench, lambda api: api.chat.completions.with_raw_response.create(**ASK))
    assert reply.content == whole("Paris")
    assert reply.headers["content-length"] == str(len(whole("Paris")))
    assert reply.parse().choices[0].message.content == "Paris"
    lease = agent.offered[1]
    assert json.loads(lease["body"]) == ASK
    assert (lease["method"], lease["path"], lease["stream"]) == ("POST", "/v1/chat/completions", False)
    assert set(lease["headers"]) == {"content-type", "accept", "traceparent"}


async def test_one_line_tells_the_times_of_every_hop_and_nothing_of_the_content(
    bench: Bench, agent: FakeAgent, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "xim_agent.router")

    async def line(headers: dict[str, str], frames: list[Any]) -> dict[str, Any]:
        caplog.clear()
        async with bench.http() as http, trio.open_nursery() as inner:
            inner.start_soon(agent.serve_one, frames)
            await http.post("/v1/chat/completions", json={**ASK, "stream": True}, headers=headers)
        await until(lambda: [r for r in caplog.records if r.getMessage() == "request"])
        (record,) = (r for r in caplog.records if r.getMessage() == "request")
        assert "secret" not in str(record.__dict__)
        return dict(record.__dict__)

    parent = f"00-{'1' * 32}-{'2' * 16}-01"
    told = await line({"traceparent": parent}, answer([b"data: secret\n\n"]))
    assert (told["trace"], told["status"], told["ending"], told["bytes"]) == ("1" * 32, 200, "complete", 14)
    assert (told["request"], told["agent"]) == (agent.offered[1]["request"], agent.id)
    assert agent.offered[1]["headers"]["traceparent"] == parent
    assert 0 <= told["granted_ms"] <= told["first_ms"] <= told["last_ms"] <= told["done_ms"] < 10_000
    told = await line({"traceparent": "00-nonsense"}, [error(0, "invalid_request")])
    assert (told["status"], told["ending"], told["first_ms"]) == (None, "invalid_request", None)
    assert agent.offered[2]["headers"]["traceparent"] == f"00-{told['trace']}-{sha(told['request'])[32:48]}-00"


def sha(request: str) -> str:
    return hashlib.sha256(f"trace|{request}".encode()).hexdigest()


async def test_openai_client_streams(bench: Bench, agent: FakeAgent, nursery: trio.Nursery) -> None:
    pieces = [chunk("Pa"), chunk("ris"), b"data: [DONE]\n\n"]
    nursery.start_soon(agent.serve_one, answer(pieces))
    texts = await use(bench, lambda api: read(api.chat.completions.create(**ASK, stream=True)))
    assert texts == ["Pa", "ris"]
    assert agent.offered[1]["stream"] is True


async def test_each_piece_arrives_when_it_is_sent(bench: Bench, agent: FakeAgent, nursery: trio.Nursery) -> None:
    post = Post(bench)
    nursery.start_soon(post.run)
    lease = await agent.take()
    first, second, end = answer([b"data: 1\n\n", b"data: 2\n\n"])[1:]
    await agent.events(lease["id"], [head(), first])
    await post.first.wait()
    assert post.data == b"data: 1\n\n"
    await agent.events(lease["id"], [second, end])


@pytest.mark.parametrize("status", [400, 404, 422, 500])
async def test_errors_of_the_engine_pass_unchanged(
    bench: Bench, agent: FakeAgent, nursery: trio.Nursery, status: int
) -> None:
    body = b'{"object":"error","message":"no","code":1}'
    frames = answer([body], kind=JSON, status=status)
    frames[0][2]["headers"] |= {"x-engine": "yes", "set-cookie": "a=b", "transfer-encoding": "chunked"}
    nursery.start_soon(agent.serve_one, frames)
    async with bench.http() as http:
        reply = await http.post("/v1/chat/completions", json=ASK)
    assert (reply.status_code, reply.content, reply.headers["x-engine"]) == (status, body, "yes")
    assert "set-cookie" not in reply.headers


async def test_client_that_leaves_cancels_until_the_ending(
    bench: Bench, agent: FakeAgent, nursery: trio.Nursery
) -> None:
    post = Post(bench)
    nursery.start_soon(post.run)
    lease = (await agent.take())["id"]
    await agent.events(lease, [head(), [1, "data", b"data: 1\n\n"]])
    await post.first.wait()
    post.scope.cancel()
    assert await agent.until("cancel") == [lease]
    assert (await agent.poll(wait_ms=0))["cancel"] == [lease], "repeated until the ending is there"
    reply = await agent.events(lease, [[2, "data", b"more"]])
    assert reply["cancel"] == [lease]
    ending = answer([b"data: 1\n\n", b"more"], reason="cancelled")[-1]
    reply = await agent.events(lease, [ending])
    assert (reply["acked"], reply["cancel"]) == ({lease: 3}, [])


async def test_client_that_leaves_the_queue_is_forgotten(bench: Bench, agent: FakeAgent, nursery: trio.Nursery) -> None:
    post = Post(bench)
    nursery.start_soon(post.run)
    await until(lambda: bench.router.dispatch.statistics().queued)
    post.scope.cancel()
    await until(lambda: not bench.router.dispatch.statistics().queued)
    assert (await agent.poll(wait_ms=0))["leases"] == []


async def test_no_slot_in_time(bench: Bench, agent: FakeAgent) -> None:
    with pytest.raises(openai.RateLimitError) as caught:
        await use(bench, ask)
    assert caught.value.code == "capacity_exceeded"


async def test_agent_that_is_not_ready_in_time(bench: Bench) -> None:
    agent = await bench.agent()
    await agent.poll(phase="starting", capacity=0, model=None)
    with pytest.raises(openai.InternalServerError) as caught:
        await use(bench, ask)
    assert (caught.value.status_code, caught.value.code) == (503, "endpoint_inactive")


async def test_no_agent(bench: Bench) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        await use(bench, ask)
    assert (caught.value.status_code, caught.value.code) == (503, "endpoint_inactive")


async def test_agent_of_another_project_gets_nothing(bench: Bench) -> None:
    agent = await bench.agent(project="other")
    await agent.poll()
    async with bench.http() as http:
        assert (await http.post("/v1/chat/completions", json=ASK)).status_code == 503


@pytest.mark.parametrize("stream", [False, True])
async def test_engine_lost_before_data_is_tried_again(
    bench: Bench, agent: FakeAgent, nursery: trio.Nursery, stream: bool
) -> None:
    post = Post(bench, {**ASK, "stream": stream})
    nursery.start_soon(post.run)
    lease = (await agent.take())["id"]
    await agent.events(lease, [head(), error(1, "engine_lost", retryable=True)])
    pieces = [b"data: 1\n\n", b"data: [DONE]\n\n"]
    again = await agent.serve_one(answer(pieces))
    assert again["id"] != lease
    await post.first.wait()
    await until(lambda: post.data.endswith(b"[DONE]\n\n"))
    assert post.data == b"".join(pieces)


async def test_half_an_answer_that_nobody_saw_is_tried_again(
    bench: Bench, agent: FakeAgent, nursery: trio.Nursery
) -> None:
    post = Post(bench)
    nursery.start_soon(post.run)
    lease = (await agent.take())["id"]
    await agent.events(lease, [head(kind=JSON), [1, "data", b'{"half'], error(2, "engine_lost")])
    await agent.serve_one(answer([b'{"whole":1}'], kind=JSON))
    await post.first.wait()
    assert post.data == b'{"whole":1}'


async def test_tried_three_times_at_most(bench: Bench, agent: FakeAgent, nursery: trio.Nursery) -> None:
    post = Post(bench)
    nursery.start_soon(post.run)
    for _ in range(3):
        await agent.serve_one([error(0, "engine_overloaded", retryable=True)])
    await post.first.wait()
    assert post.reply is not None
    assert (post.reply.status_code, post.error()["code"]) == (503, "engine_overloaded")


async def test_error_after_data_is_an_event_and_a_cut(bench: Bench, agent: FakeAgent, nursery: trio.Nursery) -> None:
    post = Post(bench)
    async with trio.open_nursery() as inner:
        inner.start_soon(post.run)
        lease = (await agent.take())["id"]
        await agent.events(lease, [head(), [1, "data", b"data: 1\n\ndata: {cut"]])
        await post.first.wait()
        await agent.events(lease, [error(2, "engine_lost")])
    assert post.broken, "the connection must not end cleanly"
    before, last, rest = post.data.split(b"\n\ndata: ")[0], post.data.split(b"\n\n")[-2], post.data.split(b"\n\n")[-1]
    assert (before, rest) == (b"data: 1", b"")
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "engine_lost"
    assert b"[DONE]" not in post.data


@pytest.mark.parametrize(
    "said", [b"data: 1\n\n", b'data: {"error": {"message": "core died"}}\n\n'], ids=["whole", "the engine's own error"]
)
@pytest.mark.parametrize("how", ["error", "restart"])
async def test_nothing_follows_the_last_word_of_an_answer(
    bench: Bench, agent: FakeAgent, nursery: trio.Nursery, said: bytes, how: str
) -> None:
    """The engine has said [DONE]; then the agent fails before it has ended the lease, or says why it was no success."""
    post = Post(bench)
    async with trio.open_nursery() as inner:
        inner.start_soon(post.run)
        lease = (await agent.take())["id"]
        await agent.events(lease, [head(), [1, "data", said + b"data: [DO"], [2, "data", b"NE]\n\n"]])
        await until(lambda: post.data.endswith(b"[DONE]\n\n"))
        if how == "error":
            await agent.events(lease, [error(3, "engine_lost")])
        else:
            agent.boot, agent.held = "f" * 32, set()
            await agent.poll(wait_ms=0)
    assert post.data == said + b"data: [DONE]\n\n"
    assert not post.broken


async def test_nothing_follows_a_completed_response(bench: Bench, agent: FakeAgent, nursery: trio.Nursery) -> None:
    """`/v1/responses` ends without [DONE]."""
    said = b'event: response.completed\ndata: {"type": "response.completed"}\n\n'
    post = Post(bench, path="/v1/responses")
    async with trio.open_nursery() as inner:
        inner.start_soon(post.run)
        lease = (await agent.take())["id"]
        await agent.events(lease, [head(), [1, "data", said]])
        await until(lambda: post.data.endswith(said))
        await agent.events(lease, [error(2, "engine_lost")])
    assert post.data == said
    assert not post.broken


async def test_openai_client_raises_on_an_error_after_data(
    bench: Bench, agent: FakeAgent, nursery: trio.Nursery
) -> None:
    texts: list[str] = []
    seen = trio.Event()

    def reading(api: openai.OpenAI) -> None:
        for event in api.chat.completions.create(**ASK, stream=True):
            texts.append(str(event.choices[0].delta.content))
            trio.from_thread.run_sync(seen.set)

    async def fail() -> None:
        lease = (await agent.take())["id"]
        await agent.events(lease, [head(), [1, "data", chunk("Pa")]])
        await seen.wait()
        await agent.events(lease, [error(2, "engine_lost")])

    nursery.start_soon(fail)
    with pytest.raises(openai.APIError, match="engine_lost"):
        await use(bench, reading)
    assert texts == ["Pa"]


async def test_answer_that_says_it_is_longer_is_no_answer(
    bench: Bench, agent: FakeAgent, nursery: trio.Nursery
) -> None:
    post = Post(bench)
    frames = answer([b"data: 1\n\n", b"data: 2\n\n"])
    frames[-1][2]["bytes"] += 1
    async with trio.open_nursery() as inner:
        inner.start_soon(post.run)
        lease = (await agent.take())["id"]
        await agent.events(lease, frames[:2])
        await post.first.wait()
        await agent.events(lease, frames[2:])
    assert post.broken
    assert b"engine_lost" in post.data


async def test_large_body_is_fetched_apart(bench: Bench, agent: FakeAgent, nursery: trio.Nursery) -> None:
    body = {**ASK, "padding": "x" * 2_000_000}
    post = Post(bench, body)
    nursery.start_soon(post.run)
    lease = await agent.take()
    assert lease["body"] is None
    url = f"{bench.url}/v1/work/leases/{lease['request']}/body"
    assert (await agent.http.get(url)).json() == body
    stranger = await bench.agent()
    assert (await stranger.http.get(url)).json()["code"] == "lease_unknown"
    await agent.events(lease["id"], answer([b"{}"], kind=JSON))


async def test_client_that_does_not_read_stops_the_credit(
    bench: Bench, agent: FakeAgent, nursery: trio.Nursery
) -> None:
    """The agent may send its window; more only when the client has taken something."""
    window = bench.router.dispatch.limits.window
    stream = await trio.open_tcp_stream("127.0.0.1", int(bench.url.rpartition(":")[2]))
    body = json.dumps(ASK).encode()
    request = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {bench.api_key}\r\n"
    await stream.send_all(request.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body)
    lease = await agent.take()
    assert lease["credit"] == window
    piece, sent, allowed, seq = b"x" * 65536, 0, window, 1
    await agent.events(lease["id"], [head()])
    while sent + len(piece) <= allowed:
        reply = await agent.events(lease["id"], [[seq, "data", piece]])
        sent, seq = sent + len(piece), seq + 1
        allowed = max(allowed, reply["credit"].get(lease["id"], 0))
        if sent + len(piece) > allowed:
            allowed = max(allowed, (await agent.poll(wait_ms=100))["credit"].get(lease["id"], 0))
    assert allowed < 64 * 1024 * 1024, "sockets hold a few MiB, not everything"
    received = 0
    with trio.fail_after(10):
        async with trio.open_nursery() as inner:

            async def read() -> None:
                nonlocal received
                while received < sent:
                    received += len(await stream.receive_some())

            inner.start_soon(read)
            more = (await agent.until("credit"))[lease["id"]]
    assert more > allowed
    await stream.aclose()


async def test_api_key_errors(bench: Bench) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        await use(bench, lambda api: api.models.list(), "sk-xim-wrong")
    assert caught.value.code == "invalid_api_key"
    async with httpx.AsyncClient(base_url=bench.url, trust_env=False, verify=False) as http:
        reply = await http.post("/v1/chat/completions", content=b"x" * 100)
        assert reply.status_code == 401
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        bench.store.db.execute("UPDATE api_keys SET revoked = 1")
        reply = await http.get("/v1/models", headers={"authorization": f"Bearer {bench.api_key}"})
        assert reply.status_code == 401


async def test_models(bench: Bench) -> None:
    assert [model.id for model in (await use(bench, lambda api: api.models.list())).data] == [MODEL]
    assert (await use(bench, lambda api: api.models.retrieve(MODEL))).id == MODEL
    with pytest.raises(openai.NotFoundError) as caught:
        await use(bench, lambda api: api.models.retrieve("nope"))
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_request"),
        (b"[]", 400, "invalid_request"),
        (b'{"model":7}', 400, "invalid_request"),
        (b'{"model":"nope"}', 404, "model_not_found"),
        (b"\xff\xfe", 400, "invalid_request"),
        (b"[" * 100_000, 400, "invalid_request"),
    ],
)
async def test_requests_that_are_none(bench: Bench, body: bytes, status: int, code: str) -> None:
    async with bench.http() as http:
        reply = await http.post("/v1/chat/completions", content=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)


async def test_paths_and_methods_that_are_not_served(bench: Bench) -> None:
    async with bench.http() as http:
        for method, path, status in (
            ("GET", "/v1/chat/completions", 405),
            ("POST", "/v1/chat/completions/", 404),
            ("POST", "/v1/files", 404),
            ("POST", "//v1/chat/completions", 404),
            ("DELETE", "/v1/models", 405),
        ):
            reply = await http.request(method, path)
            assert (reply.status_code, set(reply.json())) == (status, {"error"}), path


@pytest.mark.parametrize("method", ["PUT", "PATCH", "OPTIONS", "DELETE", "HEAD", "TRACE", "PURGE"])
async def test_no_served_path_takes_another_method(bench: Bench, method: str) -> None:
    async with bench.http() as http:
        for path in sorted(SERVED_PATHS):
            reply = await http.request(method, path)
            assert reply.status_code == 405, path
            if method != "HEAD":
                assert reply.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize("chunked", [False, True])
async def test_body_over_the_limit(bench: Bench, chunked: bool) -> None:
    body = b"x" * (MAX_BODY + 1)

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 1 << 20):
            yield body[start : start + (1 << 20)]

    async with bench.http() as http:
        reply = await http.post("/v1/chat/completions", content=pieces() if chunked else body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")
        packed = {"content-encoding": "zstd"}
        reply = await http.post("/v1/chat/completions", content=zstandard.compress(body), headers=packed)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_request")


async def test_the_largest_body_arrives(bench: Bench, agent: FakeAgent, nursery: trio.Nursery) -> None:
    body = json.dumps({**ASK, "x": ""}).encode()
    body = body[:-2] + b"x" * (MAX_BODY - len(body)) + body[-2:]
    post = Post(bench)
    post.content = body
    nursery.start_soon(post.run)
    lease = await agent.take()
    assert lease["body"] is None
    fetched = await agent.http.get(f"{bench.url}/v1/work/leases/{lease['request']}/body")
    assert fetched.content == body
    await agent.events(lease["id"], answer([b"{}"], kind=JSON))


async def test_which_headers_reach_the_engine(bench: Bench, agent: FakeAgent, nursery: trio.Nursery) -> None:
    asked = {"x-slo-ttft": "250ms", "X-SLO-Tier": "gold", "accept": "text/event-stream", "cookie": "a=b",
             "x-api-key": "k", "x-forwarded-for": "1.2.3.4", "expect": "x", "x-slow": "no", "tracestate": "a=b",
             "traceparent": f"00-{'1' * 32}-{'2' * 16}-01"}  # fmt: skip
    nursery.start_soon(agent.serve_one, answer([b"{}"], kind=JSON))
    async with bench.http() as http:
        assert (await http.post("/v1/chat/completions", json=ASK, headers=asked)).status_code == 200
    passed = {name.lower(): value for name, value in asked.items() if name[:5].lower() in ("x-slo", "trace", "accep")}
    del passed["x-slow"]
    assert agent.offered[1]["headers"] == {**passed, "content-type": "application/json"}


async def test_what_comes_in_several_headers_of_one_name(bench: Bench, agent: FakeAgent, nursery: trio.Nursery) -> None:
    """A trace's state may; of two parents none is to be believed (Trace Context §3.2)."""
    parents = [f"00-{digit * 32}-{'2' * 16}-01" for digit in "13"]
    for number, (given, parent) in enumerate(((parents[:1], parents[0]), (parents, None)), 1):
        headers = [("tracestate", "a=b"), *(("traceparent", p) for p in given), ("tracestate", "c=d")]
        nursery.start_soon(agent.serve_one, answer([b"{}"], kind=JSON))
        async with bench.http() as http:
            content = json.dumps(ASK).encode()
            twice = [*[("content-type", "application/json")] * 2, *headers]
            assert (await http.post("/v1/chat/completions", content=content, headers=twice)).status_code == 200
        passed = agent.offered[number]["headers"]
        assert passed["content-type"] == "application/json", "which is no list"
        assert passed.get("tracestate") == ("a=b, c=d" if parent else None)
        assert passed["traceparent"] not in parents if parent is None else passed["traceparent"] == parent


async def test_characters_split_between_pieces_arrive_as_they_are(
    bench: Bench, agent: FakeAgent, nursery: trio.Nursery
) -> None:
    text = "data: Gr\u00fc\u00dfe \U0001f600 \u4e16\u754c\n\n".encode()
    for stream, kind in ((True, "text/event-stream"), (False, JSON)):
        frames = answer([bytes([byte]) for byte in text] + [b"\xf0\x9f", b"\xff"], kind=kind)
        nursery.start_soon(agent.serve_one, frames)
        async with bench.http() as http:
            reply = await http.post("/v1/chat/completions", json={**ASK, "stream": stream})
        assert reply.content == text + b"\xf0\x9f\xff"


async def test_refusal_of_a_large_body_arrives(bench: Bench) -> None:
    """A client that is still sending must not see its connection reset instead of the reason."""
    async with bench.http() as http:
        for headers, status in (({"authorization": "Bearer no"}, 401), ({"content-encoding": "gzip"}, 400)):
            reply = await http.post("/v1/chat/completions", content=b"x" * 8_000_000, headers=headers)
            assert reply.status_code == status


async def test_a_request_without_a_model_goes_to_the_only_one(
    bench: Bench, agent: FakeAgent, nursery: trio.Nursery
) -> None:
    nursery.start_soon(partial(agent.serve_one, answer([b'{"tokens":[1]}'], kind=JSON)))
    async with bench.http() as http:
        reply = await http.post("/tokenize", json={"prompt": "hi"})
    assert reply.json() == {"tokens": [1]}
    assert agent.offered[1]["path"] == "/tokenize"


async def test_router_that_just_started_waits_for_its_agents(tmp_path: Path, nursery: trio.Nursery) -> None:
    async with running(tmp_path / "router", Limits(grace=5.0)) as bench:
        agent = await bench.agent()
        post = Post(bench)
        nursery.start_soon(post.run)
        await until(lambda: bench.router.dispatch.statistics().queued)
        await agent.serve_one(answer([b"{}"], kind=JSON))
        await post.first.wait()
        assert post.data == b"{}"


async def test_two_models_and_no_model_named(bench: Bench) -> None:
    other = catalog.Published("other", "r1", "other", f"sha256:{'1' * 64}", 1, 1, "generate", 1.0)
    catalog.register(bench.store.db, other)
    agent = await bench.agent()
    catalog.assign(bench.store.db, "other", None, agent.id)
    async with bench.http() as http:
        reply = await http.post("/tokenize", json={"prompt": "hi"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_request")
