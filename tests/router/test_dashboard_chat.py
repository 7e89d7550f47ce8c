"""*Try it*: a conversation from the dashboard goes the way of every client's request."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import trio
from fakes.agent import MODEL, Bench, FakeAgent, answer, error, head, until
from fakes.dashboard import signed_in

CHAT = "/dashboard/api/chat"
HI = [{"role": "user", "content": "hi"}]
END = [3, "end", {"reason": "complete", "bytes": 25, "chunks": 2, "ttft_ms": 1, "duration_ms": 2}]
ASK: dict[str, Any] = {"project": "test", "model": MODEL, "messages": HI}


@pytest.fixture
async def http(bench: Bench) -> AsyncIterator[httpx.AsyncClient]:
    async with signed_in(bench) as http:
        yield http


@pytest.fixture
async def agent(bench: Bench) -> FakeAgent:
    agent = await bench.agent()
    await agent.poll(wait_ms=0)
    return agent


class Talk:
    """A question in the background."""

    def __init__(self, http: httpx.AsyncClient, **asked: Any) -> None:
        self.http, self.asked = http, ASK | asked
        self.text, self.status, self.broken = "", 0, False
        self.headers: dict[str, str] = {}
        self.scope = trio.CancelScope()

    async def run(self) -> None:
        with self.scope:
            async with self.http.stream("POST", CHAT, json=self.asked) as reply:
                self.status, self.headers = reply.status_code, dict(reply.headers)
                try:
                    async for piece in reply.aiter_text():
                        self.text += piece
                except httpx.RemoteProtocolError:
                    self.broken = True


async def test_an_answer_streams_without_an_api_key(bench: Bench, agent: FakeAgent, http: httpx.AsyncClient) -> None:
    talk = Talk(http, max_tokens=7)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(talk.run)
        lease = await agent.take()
        assert lease["path"] == "/v1/chat/completions"
        assert json.loads(lease["body"]) == {
            "model": MODEL,
            "messages": HI,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 7,
        }
        assert set(lease["headers"]) == {"content-type", "accept", "traceparent"}, "no cookie, no token of the page"
        await agent.events(lease["id"], [head(0), [1, "data", b"data: one\n\n"]])
        await until(lambda: talk.text == "data: one\n\n")
        await agent.events(lease["id"], [[2, "data", b"data: [DONE]\n\n"], END])
    assert talk.text == "data: one\n\ndata: [DONE]\n\n"
    assert talk.status == 200
    assert talk.headers["content-type"].startswith("text/event-stream")
    assert "default-src 'none'" in talk.headers["content-security-policy"]


@pytest.mark.parametrize("when", ["streaming", "waiting for the first token", "waiting for a slot"])
async def test_closing_the_request_ends_the_lease(
    bench: Bench, agent: FakeAgent, http: httpx.AsyncClient, when: str
) -> None:
    talk = Talk(http)
    queued = bench.router.dispatch.statistics
    async with trio.open_nursery() as nursery:
        nursery.start_soon(talk.run)
        if when == "waiting for a slot":
            await until(lambda: queued().queued)
        else:
            lease = await agent.take()
        if when == "streaming":
            await agent.events(lease["id"], [head(0), [1, "data", b"data: one\n\n"]])
            await until(lambda: talk.text)
        talk.scope.cancel()
        if when == "waiting for a slot":
            await until(lambda: not queued().queued)
            assert (await agent.poll(wait_ms=0))["leases"] == []
        else:
            with trio.fail_after(10):
                assert await agent.until("cancel") == [lease["id"]]


async def test_what_the_engine_and_the_router_say_comes_through(
    bench: Bench, agent: FakeAgent, http: httpx.AsyncClient
) -> None:
    said = {"error": {"message": "This model's maximum context length is 8", "code": 400}}
    talk = Talk(http)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(talk.run)
        await agent.serve_one(answer([json.dumps(said).encode()], kind="application/json", status=400))
    assert (talk.status, json.loads(talk.text)) == (400, said)

    talk = Talk(http)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(talk.run)
        lease = await agent.take()
        await agent.events(lease["id"], [head(0), [1, "data", b"data: one\n\n"]])
        await until(lambda: talk.text)
        await agent.events(lease["id"], [error(2, "engine_lost")])
    assert talk.broken
    assert '"code": "engine_lost"' in talk.text
    assert "because of engine_lost" in talk.text


async def test_nobody_serves_it(bench: Bench, http: httpx.AsyncClient) -> None:
    for asked, status, code in (
        ({}, 503, "endpoint_inactive"),
        ({"project": "other"}, 503, "endpoint_inactive"),
        ({"model": "none"}, 404, "model_not_found"),
    ):
        reply = await http.post(CHAT, json=ASK | asked)
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, code), reply.text
        assert reply.json()["error"]["message"]


async def test_what_is_refused(bench: Bench, http: httpx.AsyncClient) -> None:
    message: dict[str, Any] = HI[0]
    for asked, param in (
        ({"project": None}, "project"),
        ({"project": "a\r\nb"}, "project"),
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [message] * 1001}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
    ):
        reply = await http.post(CHAT, json=ASK | asked)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), asked
    assert bench.router.dispatch.statistics().queued == 0
