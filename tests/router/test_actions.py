"""One agent in the dashboard: what it shows of it, and what an operator does with it there or in a terminal."""

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from click.testing import CliRunner, Result
from fakes.agent import MODEL, Bench, FakeAgent, answer, head, hold, until
from fakes.dashboard import signed_in

from xim_agent.cli.router import command
from xim_agent.errors import AgentError
from xim_agent.router.fleet import Agent, Duty
from xim_agent.text import printable

HOSTILE = "<img src=x onerror=alert(1)>\u202e\x00\n"
NAN, INF = float("nan"), float("inf")


async def detail(bench: Bench, agent: FakeAgent) -> dict[str, Any]:
    async with signed_in(bench) as http:
        reply = await http.get(f"/dashboard/api/agents/{agent.id}")
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


async def act(bench: Bench, agent: FakeAgent, name: str) -> httpx.Response:
    async with signed_in(bench) as http:
        return await http.post(f"/dashboard/api/agents/{agent.id}/{name}", json={})


async def router(bench: Bench, *args: str) -> Result:
    """The command, as another process would run it."""

    def run() -> Result:
        return CliRunner().invoke(command, [*args, "--data", str(bench.store.directory)])

    return await trio.to_thread.run_sync(run)


# -- what it shows --


async def test_everything_of_one_agent(bench: Bench) -> None:
    agent = FakeAgent(bench.url)
    bench.agents.append(agent)
    devices = [{"name": "H100", "memory_total_bytes": 80 * 10**9, "compute_capability": "9.0", "mig": True}]
    hardware = {
        "devices": devices, "driver": "570", "cuda": "12.8", "memory_total_bytes": 10**12,
        "cpu": {"model": "EPYC", "cores": 64, "threads": 128},
    }  # fmt: skip
    await agent.enroll(bench.join_key(), hardware=hardware)
    health = [{"code": "disk", "text": "full", "since": 5.0, "hint": "free some"}]
    versions = {"agent": "7.7", "vllm": "0.11", "other": "x"}
    load = {"running": 1, "waiting": 2, "kv_usage": 0.5, "tokens_per_s": 40.0}
    await agent.poll(wait_ms=0, health=health, versions=versions, load=load)
    found = await detail(bench, agent)
    assert found["hardware"] == {
        "devices": [{"name": "H100", "memory_bytes": 80 * 10**9, "compute": "9.0", "mig": True}],
        "driver": "570",
        "cuda": "12.8",
        "memory_bytes": 10**12,
        "cpu": "EPYC",
        "cores": 64,
        "threads": 128,
    }
    assert (found["version"], found["vllm"], found["protocol"]) == ("7.7", "0.11", 1)
    assert (found["platform"], found["hostname"], found["address"]) == ("linux x86_64", "node", "127.0.0.1")
    assert found["health"] == health
    assert (found["name"], found["status"], found["assigned"], found["credential"]) == (
        *("node", "online", f"{MODEL}@r1"),
        "valid",
    )
    series = found["series"]
    assert 0 <= series["end"] - found["time"] <= 10
    assert [series["columns"][name][-1] for name in ("tokens_per_s", "kv_usage", "waiting")] == [40.0, 0.5, 2.0]
    assert {len(values) for values in series["columns"].values()} == {360}


async def test_times_of_a_stream_and_how_requests_end(bench: Bench, agent: FakeAgent, nursery: trio.Nursery) -> None:
    async def client(http: httpx.AsyncClient) -> None:
        await http.post("/v1/completions", json={"model": MODEL, "stream": True})

    await agent.poll(wait_ms=0)
    async with bench.http() as http, trio.open_nursery() as inner:
        inner.start_soon(client, http)
        lease = await agent.take()
        (slot,) = (await detail(bench, agent))["slots"]
        assert (slot["request"], slot["path"], slot["state"]) == (lease["request"], "/v1/completions", "offered")
        whole = answer([b"data: 1\n\n", b"data: [DONE]\n\n"])
        await agent.events(lease["id"], whole[:2])
        (slot,) = (await detail(bench, agent))["slots"]
        assert (slot["state"], slot["bytes"]) == ("answering", len(b"data: 1\n\n"))
        await agent.events(lease["id"], whole[2:])
    found = await detail(bench, agent)
    newest = {name: [v for v in values if v is not None] for name, values in found["series"]["columns"].items()}
    assert found["slots"] == []
    assert all(newest[name] and 0 < max(newest[name]) < 30 for name in ("ttft_p50", "ttft_p99", "gap_p99"))
    assert (sum(newest["ended"]), sum(newest["errors"])) == (1, 0)

    async with bench.http() as http, trio.open_nursery() as inner:
        inner.start_soon(client, http)
        lease = await agent.take()
        broken = [1, "error", {"code": "invalid_request", "message": "no", "retryable": False}]
        await agent.events(lease["id"], [head(), broken])
    found = await detail(bench, agent)
    assert found["series"]["codes"] == {"invalid_request": 1}
    assert sum(found["series"]["columns"]["ended"]) == 2


async def test_an_answer_that_is_no_stream_has_no_first_token(bench: Bench, agent: FakeAgent) -> None:
    await agent.poll(wait_ms=0)
    async with bench.http() as http, trio.open_nursery() as inner:
        inner.start_soon(lambda: http.post("/v1/completions", json={"model": MODEL}))
        await agent.serve_one(answer([b"{}"], kind="application/json"))
    columns = (await detail(bench, agent))["series"]["columns"]
    assert {v for name in ("ttft_p50", "gap_p99") for v in columns[name]} == {None}
    assert sum(columns["ended"]) == 1


@pytest.mark.parametrize("odd", [NAN, INF, -INF, -1, 10**18, None, HOSTILE, [], {"name": HOSTILE}, [None], [{}]])
async def test_nothing_that_an_agent_says_breaks_it(bench: Bench, odd: Any) -> None:
    agent = FakeAgent(bench.url)
    bench.agents.append(agent)
    if not isinstance(odd, float):  # the enrollment is JSON
        hardware = dict.fromkeys(("devices", "driver", "cuda", "cpu", "memory_total_bytes", "tier"), odd)
        about = {"name": HOSTILE, "version": odd, "os": odd, "arch": odd, "hostname": odd}
        assert (await agent.enroll(bench.join_key(), hardware=hardware, agent=about)).status_code == 201
    else:
        assert (await agent.enroll(bench.join_key())).status_code == 201
    number = odd if isinstance(odd, float | int) else None
    whole = odd if type(odd) is int else 2**63
    await agent.poll(
        wait_ms=0,
        load={"running": whole, "waiting": whole, "kv_usage": number, "tokens_per_s": number},
        progress={"stage": "fetch", "done": whole, "total": whole, "rate": number or 0.0, "text": HOSTILE},
        health=[{"code": HOSTILE, "text": HOSTILE, "since": number or 0.0, "hint": HOSTILE}],
        versions={"agent": HOSTILE, "vllm": HOSTILE * 1000},
        ceiling=2**63,
        capacity=0,
    )
    found = await detail(bench, agent)
    assert found["health"][0]["text"] == printable(HOSTILE), "no markup is made of it: the page's part"
    assert len(found["vllm"]) <= 300
    assert all(v is None or 0 <= v < 1e9 for values in found["series"]["columns"].values() for v in values)
    numbers = [found["progress"][name] for name in ("done", "total")] + [found["waiting"], found["ceiling"]]
    assert all(0 <= n <= 2**53 for n in numbers), "what a browser can count"
    assert "\n" not in "".join(event["text"] for event in found["events"])


async def test_who_is_not_there(bench: Bench, agent: FakeAgent) -> None:
    async with signed_in(bench) as http:
        for reply in (
            await http.get("/dashboard/api/agents/nobody"),
            await http.post("/dashboard/api/agents/nobody/drain", json={}),
            await http.post(f"/dashboard/api/agents/{agent.id}/explode", json={}),
        ):
            assert reply.status_code == 404
    async with bench.http() as http:
        assert (await http.get(f"/dashboard/api/agents/{agent.id}")).status_code == 401


# -- what an operator does --


@pytest.mark.parametrize("by", ["dashboard", "command"])
async def test_drain_is_told_at_once_and_ends(bench: Bench, agent: FakeAgent, nursery: trio.Nursery, by: str) -> None:
    async def do(name: str) -> None:
        if by == "command":
            assert (await router(bench, "agents", name, agent.id)).exit_code == 0
        else:
            assert (await act(bench, agent, name)).status_code == 200

    replies = await hold(bench, agent, nursery)
    await do("drain")
    await until(lambda: replies)
    assert replies[0]["drain"] is True
    found = await detail(bench, agent)
    assert (found["drain"], found["status"]) == (True, "draining")
    await until(lambda: bench.store.db.execute("SELECT last_seen FROM agents").fetchone()[0])
    listed = json.loads((await router(bench, "agents", "ls", "--json")).stdout)
    assert [row["status"] for row in listed] == ["draining"]
    async with bench.http() as http:
        assert (await http.post("/v1/completions", json={"model": MODEL})).status_code == 503, "it takes nothing new"
    await do("drain")  # again changes nothing
    replies = await hold(bench, agent, nursery)
    await do("undrain")
    await until(lambda: replies)
    assert replies[0]["drain"] is False
    found = await detail(bench, agent)
    assert (found["drain"], found["status"]) == (False, "online")
    done = [(e["kind"], e["who"]) for e in found["events"] if e["who"]]
    assert done == [("undrained", by), ("drained", by)]


def test_a_drained_agent_is_offered_nothing_whatever_it_says() -> None:
    for drain, key in ((False, ("p", MODEL)), (True, None)):
        assert Agent("a", Duty("p", drain=drain), serves=MODEL, phase="ready").key == key


async def test_a_drained_agent_finishes_what_it_has(bench: Bench, agent: FakeAgent) -> None:
    await agent.poll(wait_ms=0)
    replies: list[httpx.Response] = []
    async with bench.http() as http, trio.open_nursery() as inner:

        async def client() -> None:
            replies.append(await http.post("/v1/completions", json={"model": MODEL}))

        inner.start_soon(client)
        lease = await agent.take()
        await act(bench, agent, "drain")
        await agent.events(lease["id"], answer([b"{}"], kind="application/json"))
    assert (replies[0].status_code, replies[0].content) == (200, b"{}")


async def test_suspend_and_resume(bench: Bench, agent: FakeAgent, nursery: trio.Nursery) -> None:
    replies = await hold(bench, agent, nursery)
    assert (await act(bench, agent, "suspend")).json()["status"] == "suspended"
    await until(lambda: replies)
    message = {"boot": agent.boot, "n": 99, "phase": "ready", "capacity": 1, "wait_ms": 0, "held": [], "model": None}
    more: dict[str, Any] = {"ceiling": 1, "load": {}, "progress": None, "health": []}
    reply = await agent.call("/v1/work/poll", message | more)
    assert (reply.status_code, reply.json()["code"]) == (403, "agent_suspended")
    assert (await act(bench, agent, "resume")).json()["suspended"] is False
    kinds = [e["kind"] for e in (await detail(bench, agent))["events"] if e["who"] == "dashboard"]
    assert kinds == ["resumed", "suspended"]


async def test_revoked_credentials_open_nothing_at_once(bench: Bench, agent: FakeAgent, nursery: trio.Nursery) -> None:
    await agent.poll(wait_ms=0)
    assert (await act(bench, agent, "revoke-credentials")).json()["credential"] == "revoked"
    assert agent.id not in bench.router.dispatch.agents
    reply = await agent.http.get(f"{agent.url}/v1/assignment")
    assert (reply.status_code, reply.json()["code"]) == (401, "token_invalid")


async def test_removed_is_for_good_and_still_there_to_read(bench: Bench, agent: FakeAgent) -> None:
    await agent.poll(wait_ms=0)
    found = (await act(bench, agent, "remove")).json()
    assert (found["removed"], found["credential"], found["events"][0]["kind"]) == (True, "revoked", "removed")
    assert (await agent.http.get(f"{agent.url}/v1/assignment")).status_code == 410
    for name in ("suspend", "drain", "undrain", "revoke-credentials"):
        again = await act(bench, agent, name)
        assert (again.status_code, again.json()["error"]["code"]) == (409, "agent_removed")
    assert (await act(bench, agent, "remove")).status_code == 200
    async with signed_in(bench) as http:
        assert (await http.get("/dashboard/agents.json")).json()["agents"] == []


async def test_who_may_only_look_changes_nothing(bench: Bench, agent: FakeAgent) -> None:
    async with signed_in(bench, "read-only") as http:
        assert (await http.get(f"/dashboard/api/agents/{agent.id}")).status_code == 200
        assert (await http.post(f"/dashboard/api/agents/{agent.id}/remove", json={})).status_code == 403
    assert (await detail(bench, agent))["removed"] is False


def test_the_command_says_who_was_removed(tmp_path: Path) -> None:
    from xim_agent.router import roster
    from xim_agent.router.store import Store

    with Store.open(tmp_path) as store, pytest.raises(AgentError, match="was removed") as caught:
        roster.drain(store.db, "nobody", time.time())
    assert caught.value.code == "agent_removed"
