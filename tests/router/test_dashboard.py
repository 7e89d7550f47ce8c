"""The live page: what it says of each agent."""

import json
from typing import Any

import pytest
import trio
from fakes.agent import MODEL, Bench, FakeAgent, answer
from fakes.dashboard import events, signed_in


async def shown(bench: Bench) -> dict[str, Any]:
    async with signed_in(bench) as http:
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
    async with signed_in(bench) as http, events(http) as stream:
        await stream.until('"agents": []')
        assert b"content-type: text/event-stream" in stream.seen
        await bench.agent()
        await stream.until('"name": "node"')


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
    async with signed_in(bench) as http:
        text = (await http.get("/dashboard/agents.json")).text
    (row,) = json.loads(text, parse_constant=pytest.fail)["agents"]
    assert (row["kv_usage"], row["tokens_per_s"], row["progress"]["rate"], row["health"][0]["since"]) == (None,) * 4
    assert row["waiting"] == 0
    assert bench.router.dispatch.agents[agent.id].busy >= 0


async def test_texts_of_agents_stay_texts(bench: Bench) -> None:
    """Hostile names are shown as they are, cut to a bound."""
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
