"""Calls of agents over loopback sockets: admission, assignment, polls and events as bytes on the wire."""

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio
import zstandard
from fakes.agent import MODEL, Bench, FakeAgent, answer, head, running, until

from xim_agent.router import catalog
from xim_agent.router.jobs import Limits
from xim_agent.router.store import Store

ASK = {"model": MODEL, "messages": []}


async def post(bench: Bench, padding: str = "") -> None:
    async with bench.http() as http:
        await http.post("/v1/chat/completions", json={**ASK, "padding": padding})


def claims_of(jws: str) -> Any:
    payload = jws.split(".")[1]
    return json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))


# -- admission --


@pytest.mark.parametrize("path", ["/v1/enroll", "/v1/work/poll", "/v1/assignment", "/v1/nothing"])
@pytest.mark.parametrize("version", [None, "2", ""])
async def test_protocol_of_every_call(bench: Bench, agent: FakeAgent, path: str, version: str | None) -> None:
    del agent.http.headers["xim-protocol"]
    headers = {} if version is None else {"XIM-Protocol": version}
    method = "GET" if path == "/v1/assignment" else "POST"
    reply = await agent.http.request(method, bench.url + path, headers=headers)
    if path == "/v1/nothing":
        assert reply.status_code == 404
        return
    assert reply.status_code == 426
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.headers["xim-protocol"] == "1"
    assert (reply.json()["code"], reply.json()["protocols"]) == ("protocol_unsupported", [1])


@pytest.mark.parametrize("value", [None, "Bearer", "Bearer x.y.z", "Basic abc"])
async def test_no_valid_token(bench: Bench, agent: FakeAgent, value: str | None) -> None:
    del agent.http.headers["authorization"]
    headers = {"authorization": value} if value else {}
    for path in ("/v1/work/poll", "/v1/work/events", "/v1/agents/self/leave"):
        reply = await agent.http.post(bench.url + path, headers=headers)
        assert (reply.status_code, reply.json()["code"]) == (401, "token_invalid")


async def test_agent_api_is_not_for_api_keys(bench: Bench) -> None:
    async with bench.http() as http:
        reply = await http.get("/v1/assignment", headers={"XIM-Protocol": "1"})
    assert reply.status_code == 401


@pytest.mark.parametrize(
    ("state", "status", "code"), [("suspended", 403, "agent_suspended"), ("removed", 410, "agent_removed")]
)
async def test_state_of_the_agent(bench: Bench, agent: FakeAgent, state: str, status: int, code: str) -> None:
    await agent.poll()
    bench.store.db.execute("UPDATE agents SET state=?", (state,))
    request = {
        "boot": "b",
        "n": 1,
        "phase": "ready",
        "capacity": 1,
        "wait_ms": 0,
        "held": [],
        "model": None,
        "ceiling": 1,
    }
    reply = await agent.call("/v1/work/poll", request | {"load": {}, "progress": None, "health": []})
    assert (reply.status_code, reply.json()["code"]) == (status, code)
    reply = await agent.call("/v1/work/events", {"boot": agent.boot, "frames": []})
    assert reply.status_code == (200 if state == "suspended" else 410)


async def test_leave(bench: Bench, agent: FakeAgent) -> None:
    await agent.poll()
    assert (await agent.http.post(f"{bench.url}/v1/agents/self/leave")).status_code == 204
    assert bench.router.dispatch.agents == {}
    assert (await agent.http.get(f"{bench.url}/v1/assignment")).json()["code"] == "agent_removed"


# -- identity: what the HTTP side adds --


async def test_proof_is_bound_to_url_method_and_use(bench: Bench) -> None:
    agent = FakeAgent(bench.url)
    bench.agents.append(agent)
    key = bench.join_key()
    good = agent.proof("/v1/enroll")
    for proof, code in (
        (agent.proof("/v1/enroll/refresh"), "dpop_url"),
        (agent.proof("/v1/enroll", htu="https://elsewhere/v1/enroll"), "dpop_url"),
        (agent.proof("/v1/enroll", htm="GET"), "dpop_invalid"),
        (agent.proof("/v1/enroll", iat=1_000), "dpop_invalid"),
        ("", "dpop_invalid"),
        (good, None),
        (good, "dpop_invalid"),
    ):
        agent.proof = lambda *_, proof=proof: proof  # type: ignore[method-assign]
        reply = await agent.enroll(key)
        assert (reply.status_code, reply.json().get("code")) == ((400, code) if code else (201, None))
    assert set(reply.headers) >= {"date", "xim-protocol"}


async def test_refresh(bench: Bench, agent: FakeAgent) -> None:
    headers = {"DPoP": agent.proof("/v1/enroll/refresh")}
    body = {"refresh_token": agent.reply["refresh_token"]}
    reply = await agent.http.post(f"{bench.url}/v1/enroll/refresh", json=body, headers=headers)
    assert reply.status_code == 200
    assert set(reply.json()) == {"token", "refresh_token", "keys"}


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"[" * 60_000, b"x" * 70_000])
async def test_enroll_bodies_that_are_none(bench: Bench, body: bytes) -> None:
    agent = FakeAgent(bench.url)
    bench.agents.append(agent)
    reply = await agent.http.post(f"{bench.url}/v1/enroll", content=body, headers={"DPoP": agent.proof("/v1/enroll")})
    assert reply.status_code in (400, 413)
    assert reply.headers["content-type"] == "application/problem+json"


# -- assignment --


async def test_assignment_is_signed_for_this_agent(bench: Bench, agent: FakeAgent) -> None:
    reply = await agent.http.get(f"{bench.url}/v1/assignment")
    payload = claims_of(reply.text)
    assert (payload["sub"], payload["generation"], payload["iss"]) == (agent.id, 1, agent.reply["issuer"])
    model = {"id": MODEL, "name": MODEL, "revision": "r1", "manifest": f"sha256:{'0' * 64}", "size_bytes": 1000}
    assert payload["model"] == model
    assert payload["serving"]["served_model_name"] == MODEL


async def test_no_assignment(bench: Bench, agent: FakeAgent) -> None:
    bench.store.db.execute("DELETE FROM assignments")
    reply = await agent.http.get(f"{bench.url}/v1/assignment")
    assert (reply.status_code, reply.content) == (204, b"")
    assert (await agent.poll())["generation"] == 0


async def test_command_that_assigns_wakes_a_held_poll(bench: Bench, agent: FakeAgent, nursery: trio.Nursery) -> None:
    await agent.poll()
    with Store.open(bench.store.directory) as other:
        catalog.register(other.db, catalog.Published("next", "r1", "next", f"sha256:{'2' * 64}", 1, 1, "embed", 5.0))
        catalog.assign(other.db, "next", None, agent.id)
    with trio.fail_after(5):
        assert (await agent.poll(capacity=0))["generation"] == 2
    assert claims_of((await agent.http.get(f"{bench.url}/v1/assignment")).text)["serving"]["task"] == "embed"


# -- polls and events --


@pytest.mark.parametrize(("accepted", "packed"), [("gzip, zstd", True), ("identity", False), ("zstd;q=0", False)])
async def test_zstd_only_where_it_is_accepted(
    bench: Bench, agent: FakeAgent, nursery: trio.Nursery, accepted: str, packed: bool
) -> None:
    await agent.poll()
    nursery.start_soon(post, bench, "x" * 100_000)
    lease = await agent.take()
    url = f"{bench.url}/v1/work/leases/{lease['request']}/body"
    async with agent.http.stream("GET", url, headers={"accept-encoding": accepted}) as reply:
        raw = b"".join([part async for part in reply.aiter_raw()])
    assert (len(raw) < 5_000) is packed
    assert (reply.headers.get("content-encoding") == "zstd") is packed
    await agent.events(lease["id"], answer([b"{}"], kind="application/json"), compress=True)


@pytest.mark.parametrize("path", ["/v1/work/poll", "/v1/work/events"])
@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"", {}, 400),
        (b"\xc1", {}, 400),
        (msgspec.msgpack.encode({"boot": 5}), {}, 400),
        (msgspec.msgpack.encode([1, 2]), {}, 400),
        (b"\x91" * 100_000, {}, 400),
        (b"x" * (1024 * 1024 + 1), {}, 413),
        (zstandard.compress(b"x" * (1024 * 1024 + 1)), {"content-encoding": "zstd"}, 400),
        (b"no zstd", {"content-encoding": "zstd"}, 400),
        (b"x", {"content-encoding": "gzip"}, 400),
    ],
)
async def test_bodies_that_cannot_be_read(
    bench: Bench, agent: FakeAgent, path: str, body: bytes, headers: dict[str, str], status: int
) -> None:
    reply = await agent.http.post(bench.url + path, content=body, headers=headers)
    assert reply.status_code == status
    assert reply.headers["content-type"] == "application/problem+json"
    await agent.poll(wait_ms=0)


@pytest.mark.parametrize(
    "frame", [[1, "x", "data", b""], [1, 0, "huh", {}], [1, 0, "head", {"status": "x"}], [1, 0], [1]]
)
async def test_bad_frame_makes_its_lease_unknown(
    bench: Bench, agent: FakeAgent, nursery: trio.Nursery, frame: list[Any]
) -> None:
    await agent.poll()
    nursery.start_soon(post, bench)
    lease = (await agent.take())["id"]
    assert lease == 1
    reply = await agent.call("/v1/work/events", {"boot": agent.boot, "frames": [frame]})
    assert msgspec.msgpack.decode(reply.content)["unknown"] == [lease]


@pytest.mark.parametrize("frame", [[], 5, ["x", 0, "data", b""]])
async def test_frame_without_a_lease_costs_the_call(bench: Bench, agent: FakeAgent, frame: Any) -> None:
    reply = await agent.call("/v1/work/events", {"boot": agent.boot, "frames": [frame]})
    assert (reply.status_code, reply.json()["code"]) == (400, "invalid_request")


async def test_newer_poll_ends_the_held_one(bench: Bench, agent: FakeAgent) -> None:
    await agent.poll()
    ended = trio.Event()

    async def older() -> None:
        assert (await agent.poll())["leases"] == []
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(older)
        await until(lambda: bench.router.dispatch.agents[agent.id].poll)
        with trio.fail_after(5):
            await agent.poll(wait_ms=0)
            await ended.wait()


async def test_closed_poll_is_noticed(bench: Bench, agent: FakeAgent, nursery: trio.Nursery) -> None:
    await agent.poll()
    known = bench.router.dispatch.agents[agent.id]
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as inner:
            inner.start_soon(agent.poll)
            await until(lambda: known.poll)
            scope.cancel()
    await until(lambda: known.poll is None)
    nursery.start_soon(post, bench)
    assert (await agent.take())["id"] == 1


async def test_clones_are_told(bench: Bench, agent: FakeAgent) -> None:
    first, second = agent.boot, "second"
    await agent.poll()
    agent.boot = second
    await agent.poll()
    told = []
    for agent.boot in (first, second):
        agent.n += 1
        with pytest.raises(AssertionError) as refused:
            await agent.poll()
        told.append(json.loads(str(refused.value).split("\n")[0]))
    assert [problem["code"] for problem in told] == ["identity_in_use"] * 2
    assert all(problem["address"].startswith("127.0.0.1:") for problem in told)
    assert told[1]["start"] < told[0]["start"]
    assert [problem["yours"] for problem in told] == [told[1]["start"], told[0]["start"]]


async def test_last_seen_is_kept(bench: Bench, agent: FakeAgent) -> None:
    await agent.poll()
    bench.router.agents.save_seen()
    assert bench.store.db.execute("SELECT last_seen FROM agents").fetchone()[0] > 1e9


async def test_agent_of_a_restarted_router_goes_on(tmp_path: Path, nursery: trio.Nursery) -> None:
    """Same data, another process: no enrollment, the old lease is `unknown`, new ones have other ids."""
    limits = Limits(grace=5.0)
    async with running(tmp_path / "router", limits) as bench:
        agent = await bench.agent()
        await agent.poll()
        nursery.start_soon(post_until_cut, bench)
        old = (await agent.take())["id"]
        port = bench.url.rpartition(":")[2]
    async with running(tmp_path / "router", limits, f"127.0.0.1:{port}") as bench:
        bench.agents.append(agent)
        agent.http = type(agent.http)(trust_env=False, verify=False, headers=agent.http.headers)
        assert (await agent.poll())["cancel"] == [old]
        assert (await agent.events(old, [head()]))["unknown"] == [old]
        nursery.start_soon(post, bench)
        new = await agent.take()
        assert new["id"] != old
        await agent.events(new["id"], answer([b"{}"], kind="application/json"))


async def post_until_cut(bench: Bench) -> None:
    try:
        await post(bench)
    except httpx.HTTPError:
        return
