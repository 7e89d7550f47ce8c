"""The live page: what it says of each agent, who may see it, and that it brings nothing from elsewhere."""

import ipaddress
import json
import re
from contextlib import nullcontext
from typing import Any

import pytest
import trio
from fakes.agent import MODEL, Bench, FakeAgent, answer
from starlette.requests import Request

from xim_agent.router.replies import ApiError


async def shown(bench: Bench) -> dict[str, Any]:
    async with bench.http() as http:
        found: dict[str, Any] = (await http.get("/dashboard/agents.json")).json()
    return found


async def test_life_of_an_agent(bench: Bench, nursery: trio.Nursery) -> None:
    assert (await shown(bench))["agents"] == []
    agent = await bench.agent()
    (row,) = (await shown(bench))["agents"]
    assert (row["status"], row["name"], row["tier"], row["accelerator"]) == ("pending", "node", "self_hosted", "H100")
    assert (row["last_seen"], row["model"]) == (None, MODEL)

    progress = {"stage": "fetch", "done": 30, "total": 100, "rate": 10.0, "text": ""}
    health = [{"code": "disk", "text": "full", "since": 1.0}]
    await agent.poll(phase="starting", capacity=0, model=None, progress=progress, health=health)
    row = (await shown(bench))["agents"][0]
    assert (row["status"], row["phase"], row["progress"], row["health"]) == ("online", "starting", progress, health)

    await agent.poll(wait_ms=0)
    async with bench.http() as http, trio.open_nursery() as inner:
        inner.start_soon(lambda: http.post("/v1/completions", json={"model": MODEL}))
        lease = await agent.take()
        data = await shown(bench)
        row = data["agents"][0]
        assert (row["phase"], row["running"], row["ceiling"], row["model"]) == ("ready", 1, 4, MODEL)
        assert data["models"][0]["serving"] == 1
        assert abs(row["last_seen"] - data["time"]) < 30
        await agent.events(lease["id"], answer([b"{}"], kind="application/json"))

    await agent.poll(phase="draining", capacity=0, wait_ms=0)
    assert (await shown(bench))["agents"][0]["status"] == "draining"
    known = bench.router.dispatch.agents[agent.id]
    for silent, status in ((80, "disconnected"), (700, "dead")):
        known.heard = trio.current_time() - silent
        assert (await shown(bench))["agents"][0]["status"] == status
    bench.store.db.execute("UPDATE agents SET state='suspended'")
    assert (await shown(bench))["agents"][0]["status"] == "suspended"
    bench.store.db.execute("UPDATE agents SET state='removed'")
    assert (await shown(bench))["agents"] == []


async def test_after_a_restart_the_database_says_when_it_was_seen(bench: Bench) -> None:
    agent = await bench.agent()
    now = (await shown(bench))["time"]
    for ago, status in ((30, "disconnected"), (1000, "dead")):
        bench.store.save_seen({agent.id: now - ago})
        assert (await shown(bench))["agents"][0]["status"] == status


async def test_changes_arrive_without_asking(bench: Bench) -> None:
    stream = await trio.open_tcp_stream("127.0.0.1", int(bench.url.rpartition(":")[2]))
    async with stream:
        await stream.send_all(b"GET /dashboard/events HTTP/1.1\r\nhost: localhost\r\n\r\n")
        seen = b""
        with trio.fail_after(10):
            while b'"agents": []' not in seen:
                seen += await stream.receive_some()
            assert b"content-type: text/event-stream" in seen
            await bench.agent()
            while b'"name": "node"' not in seen:
                seen += await stream.receive_some()


async def test_page_brings_nothing_from_elsewhere(bench: Bench) -> None:
    async with bench.http() as http:
        page = await http.get("/")
        parts = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert {p for p in parts if p.startswith("/")} == {p for p in parts if not p.startswith("data:")}
        total = len(page.content)
        for path in {"/dashboard/app.js", "/dashboard/style.css"} & set(parts):
            part = await http.get(path)
            assert part.status_code == 200
            total += len(part.content)
        for reply in (page, part):
            policy = reply.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
    assert total < 200_000
    assert not re.search(r"<script>|style=|\son\w+=|innerHTML", page.text)


@pytest.mark.parametrize("host", ["evil.example", "10.0.0.5:8080", "[", "localhost.evil.example"])
async def test_names_that_resolve_to_us_see_nothing(bench: Bench, host: str) -> None:
    async with bench.http() as http:
        for path in ("/", "/dashboard/agents.json", "/dashboard/events"):
            assert (await http.get(path, headers={"host": host})).status_code == 403


@pytest.mark.parametrize("host", ["localhost:8080", "127.0.0.1", "[::1]:99"])
async def test_own_names_see_it(bench: Bench, host: str) -> None:
    async with bench.http() as http:
        assert (await http.get("/", headers={"host": host})).status_code == 200


@pytest.mark.parametrize("field", ["X-Forwarded-For", "Forwarded", "Via", "X-Forwarded-Host", "X-Real-IP"])
async def test_callers_by_way_of_a_proxy_see_nothing(bench: Bench, field: str) -> None:
    async with bench.http() as http:
        for path in ("/", "/dashboard/agents.json", "/dashboard/events"):
            assert (await http.get(path, headers={field: "127.0.0.1"})).status_code == 403


async def test_public_name_does_not_open_it(bench: Bench) -> None:
    bench.store.serve_at(["https://router.example"], bench.url)
    async with bench.http() as http:
        assert (await http.get("/", headers={"host": "router.example"})).status_code == 403


@pytest.mark.parametrize(
    ("remote", "host", "seen"),
    [
        ("172.18.0.1", "127.0.0.1:8080", True),
        ("172.18.0.1", "router", False),
        ("192.0.2.1", "127.0.0.1:8080", False),
        ("", "127.0.0.1:8080", False),
        ("::1", "localhost", True),
    ],
)
async def test_a_network_that_the_operator_names_sees_it_too(bench: Bench, remote: str, host: str, seen: bool) -> None:
    page = bench.router.dashboard
    page.also = (ipaddress.ip_network("172.16.0.0/12"),)
    caller = Request({"type": "http", "client": (remote, 5) if remote else None, "headers": [(b"host", host.encode())]})
    with nullcontext() if seen else pytest.raises(ApiError):
        page.viewer(caller)


@pytest.mark.parametrize("devices", [5, "H100", {"name": "x"}, None, [5, None]])
async def test_one_agent_cannot_spoil_it_for_the_others(bench: Bench, devices: Any) -> None:
    agent = FakeAgent(bench.url)
    bench.agents.append(agent)
    assert (await agent.enroll(bench.join_key(), hardware={"devices": devices, "cpu": 7})).status_code == 201
    nan, inf = float("nan"), float("inf")
    await agent.poll(
        wait_ms=0,
        load={"running": 0, "waiting": -(10**9), "kv_usage": nan, "tokens_per_s": inf},
        progress={"stage": "fetch", "done": 0, "total": 0, "rate": nan, "text": ""},
        health=[{"code": "disk", "text": "full", "since": -inf}],
    )
    async with bench.http() as http:
        text = (await http.get("/dashboard/agents.json")).text
    (row,) = json.loads(text, parse_constant=pytest.fail)["agents"]
    assert (row["kv_usage"], row["tokens_per_s"], row["progress"]["rate"], row["health"][0]["since"]) == (None,) * 4
    assert row["waiting"] == 0
    assert bench.router.dispatch.agents[agent.id].busy >= 0


async def test_texts_of_agents_stay_texts(bench: Bench) -> None:
    """Hostile names are shown as they are, cut to a bound; the page has no way to make markup of a text."""
    agent = FakeAgent(bench.url)
    bench.agents.append(agent)
    name = "<img src=x onerror=alert(1)>"
    reply = await agent.enroll(
        bench.join_key(),
        agent={"name": name, "version": ["x"] * 1000, "os": "", "arch": "", "hostname": ""},
        hardware={"tier": {"a": 1}, "devices": [5, {"name": name}], "cpu": "none"},
    )
    assert reply.status_code == 201
    row = (await shown(bench))["agents"][0]
    assert (row["name"], row["accelerator"]) == (name, name)
    assert len(row["version"]) <= 300
    async with bench.http() as http:
        script = (await http.get("/dashboard/app.js")).text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)
