"""Join keys and API keys in the dashboard, over HTTP: made, shown once, listed, revoked; and what forms refuse."""

import json
import logging
import sqlite3
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from fakes.agent import MODEL, Bench, FakeAgent
from fakes.dashboard import signed_in

from xim_agent.cli.router import command
from xim_agent.identity.join_key import JoinKey
from xim_agent.router import catalog
from xim_agent.router.dashboard.parts import MAX_WRITE
from xim_agent.router.sql import digest
from xim_agent.router.store import FILE, Store

JOIN, KEYS = "/dashboard/api/join-keys", "/dashboard/api/keys"
READS = [JOIN, KEYS, "/dashboard/api/models", "/dashboard/agents.json"]
WRITES = [JOIN, f"{JOIN}/1/revoke", KEYS, f"{KEYS}/x/revoke", "/dashboard/api/models/assign"]
WRITES += ["/dashboard/api/models/unassign", "/dashboard/api/models/remove", "/dashboard/api/chat"]


REFUSED: list[tuple[str, dict[str, Any], tuple[int, str, str | None]]] = [
    (JOIN, {}, (400, "invalid_request", "project")),
    (JOIN, {"project": None}, (400, "invalid_request", "project")),
    (JOIN, {"project": 5}, (400, "invalid_request", "project")),
    (JOIN, {"project": ["a"]}, (400, "invalid_request", "project")),
    (JOIN, {"project": "a\nb"}, (400, "invalid_request", "project")),
    (JOIN, {"project": "a\x1b[2J"}, (400, "invalid_request", "project")),
    (JOIN, {"project": "\ud800"}, (400, "invalid_request", "project")),
    (JOIN, {"project": "a b"}, (400, "project_invalid", "project")),
    (JOIN, {"project": ""}, (400, "project_invalid", "project")),
    (JOIN, {"project": "a" * 64}, (400, "project_invalid", "project")),
    (JOIN, {"project": "a" * 100_000}, (400, "invalid_request", "project")),
    (JOIN, {"project": "a", "region": ""}, (400, "join_key_invalid", "region")),
    (JOIN, {"project": "a", "region": "ä"}, (400, "join_key_invalid", "region")),
    (JOIN, {"project": "a", "region": "x" * 25}, (400, "invalid_request", "region")),
    (JOIN, {"project": "a", "uses": 0}, (400, "invalid_request", "uses")),
    (JOIN, {"project": "a", "uses": True}, (400, "invalid_request", "uses")),
    (JOIN, {"project": "a", "uses": "3"}, (400, "invalid_request", "uses")),
    (JOIN, {"project": "a", "uses": 1.5}, (400, "invalid_request", "uses")),
    (JOIN, {"project": "a", "uses": 10**30}, (400, "invalid_request", "uses")),
    (JOIN, {"project": "a", "lifetime": 59}, (400, "invalid_request", "lifetime")),
    (JOIN, {"project": "a", "lifetime": -1}, (400, "invalid_request", "lifetime")),
    (JOIN, {"project": "a", "lifetime": 10**12}, (400, "invalid_request", "lifetime")),
    (KEYS, {"project": "a", "name": "x" * 61}, (400, "key_name_invalid", "name")),
    (KEYS, {"project": "a", "name": " x"}, (400, "key_name_invalid", "name")),
    (KEYS, {"project": "a", "name": "x\x00"}, (400, "invalid_request", "name")),
    (KEYS, {"project": "a", "name": {}}, (400, "invalid_request", "name")),
    (KEYS, {"name": "x"}, (400, "invalid_request", "project")),
    (f"{JOIN}/77/revoke", {}, (400, "join_key_unknown", None)),
    (f"{JOIN}/0/revoke", {}, (400, "join_key_unknown", None)),
    (f"{JOIN}/-1/revoke", {}, (404, "not_found", None)),
    (f"{JOIN}/{'9' * 40}/revoke", {}, (404, "not_found", None)),
    (f"{JOIN}/%F0%9D%9F%99/revoke", {}, (404, "not_found", None)),
    (f"{KEYS}/77/revoke", {}, (404, "api_key_unknown", None)),
    (f"{KEYS}/%25/revoke", {}, (404, "api_key_unknown", None)),
    (f"{KEYS}/%ff%00/revoke", {}, (404, "api_key_unknown", None)),
    (f"{KEYS}/{'a' * 5000}/revoke", {}, (404, "api_key_unknown", None)),
]


def refusal(reply: httpx.Response) -> tuple[int, str, str | None]:
    error = reply.json()["error"]
    return reply.status_code, error["code"], error["param"]


async def got(http: httpx.AsyncClient, path: str) -> dict[str, Any]:
    reply = await http.get(path)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


async def made(http: httpx.AsyncClient, path: str, **asked: Any) -> dict[str, Any]:
    reply = await http.post(path, json=asked)
    assert reply.status_code in (200, 201), reply.text
    found: dict[str, Any] = reply.json()
    return found


async def test_a_join_key_lets_an_agent_in_which_the_list_then_names(bench: Bench) -> None:
    agent = FakeAgent(bench.url)
    bench.agents.append(agent)
    async with signed_in(bench) as http:
        assert (await got(http, JOIN))["keys"] == []
        new = await made(http, JOIN, project="acme", region="eu", uses=2, lifetime=3600)
        assert (new["project"], new["region"], new["uses"]) == ("acme", "eu", 2)
        assert JoinKey.parse(new["key"]).routers == (bench.url,)
        (row,) = (await got(http, JOIN))["keys"]
        assert (row["id"], row["state"], row["uses_left"], row["agents"]) == (new["id"], "valid", 2, [])
        assert row["expires"] == new["expires"] == pytest.approx(time.time() + 3600, abs=60)
        assert (await agent.enroll(new["key"])).status_code == 201
        found = await got(http, JOIN)
        assert found["keys"][0]["uses_left"] == 1
        assert found["keys"][0]["agents"] == [{"id": agent.id, "name": "node", "state": "enrolled"}]
        assert "acme" in found["projects"]


async def test_what_is_not_said_is_one_use_for_a_day_here(bench: Bench) -> None:
    async with signed_in(bench) as http:
        new = await made(http, JOIN, project="acme")
    assert (new["region"], new["uses"]) == ("local", 1)
    assert new["expires"] == pytest.approx(time.time() + 86400, abs=60)


async def test_a_revoked_join_key_opens_nothing_and_may_be_revoked_again(bench: Bench) -> None:
    agent = FakeAgent(bench.url)
    bench.agents.append(agent)
    async with signed_in(bench) as http:
        new = await made(http, JOIN, project="acme")
        for _ in range(2):
            found = await made(http, f"{JOIN}/{new['id']}/revoke")
            assert found["keys"][0]["state"] == "revoked"
    refused = await agent.enroll(new["key"])
    assert (refused.status_code, refused.json()["code"]) == (403, "join_key_revoked")


async def test_an_api_key_opens_the_api_until_it_is_revoked(bench: Bench) -> None:
    async with signed_in(bench) as http, httpx.AsyncClient(base_url=bench.url, trust_env=False) as client:
        new = await made(http, KEYS, project="acme", name="the blog")
        client.headers["authorization"] = f"Bearer {new['key']}"
        assert new["base_url"] == f"{bench.url}/v1"
        row = (await got(http, KEYS))["keys"][0]
        assert (row["name"], row["project"], row["state"], row["last_used"]) == ("the blog", "acme", "valid", None)
        assert new["key"].startswith(row["beginning"])
        assert len(row["beginning"]) == len("sk-xim-") + 4
        assert (await client.get("/v1/models")).status_code == 200
        bench.router.clients.save_used()
        assert (await got(http, KEYS))["keys"][0]["last_used"] == pytest.approx(time.time(), abs=60)
        for _ in range(2):
            found = await made(http, f"{KEYS}/{row['id']}/revoke")
            assert [key["state"] for key in found["keys"]] == ["revoked", "valid"]
        assert (await client.get("/v1/models")).status_code == 401


def test_api_keys_by_command(tmp_path: Path) -> None:
    def run(*words: str) -> Any:
        return CliRunner().invoke(command, ["api-key", *words, "--data", str(tmp_path)], catch_exceptions=False)

    key = run("create", "--project", "acme", "--name", "blog").stdout.strip()
    (row,) = json.loads(run("ls", "--json").stdout)
    assert (row["name"], row["state"], row["beginning"]) == ("blog", "valid", key[:11])
    assert key not in run("ls").stdout
    assert "revoked" in run("revoke", row["id"]).stderr
    assert json.loads(run("ls", "--json").stdout)[0]["state"] == "revoked"


async def test_what_is_refused_names_the_field_and_changes_nothing(bench: Bench) -> None:
    def kept() -> list[str]:
        return [line for line in bench.store.db.iterdump() if "dashboard_" not in line]

    before = kept()
    async with signed_in(bench) as http:
        for path, asked, expected in REFUSED:
            reply = await http.post(path, content=json.dumps(asked), headers={"content-type": "application/json"})
            assert refusal(reply) == expected, (path, asked)
            assert len(reply.json()["error"]["message"]) < 500
    assert kept() == before


async def test_bodies_that_are_no_object_or_too_large(bench: Bench) -> None:
    kind = {"content-type": "application/json"}
    async with signed_in(bench) as http:
        for path in WRITES:
            for body in (b"", b"[]", b'"x"', b"{", b"\xff", b"[" * 100_000):
                if "revoke" not in path:
                    reply = await http.post(path, content=body, headers=kind)
                    assert refusal(reply)[:2] == (400, "invalid_request"), (path, body[:9])
            large = await http.post(path, content=b"a" * (10 * MAX_WRITE), headers=kind)
            assert refusal(large)[:2] == (413, "request_too_large"), path


async def test_who_may_only_look_sees_everything_and_changes_nothing(bench: Bench) -> None:
    async with signed_in(bench, "read-only") as http:
        for path in READS:
            assert (await http.get(path)).status_code == 200
        for path in WRITES:
            assert refusal(await http.post(path, json={}))[:2] == (403, "read_only")


async def test_keys_are_in_one_reply_and_nowhere_else(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with signed_in(bench) as http:
        join, api = await made(http, JOIN, project="acme"), await made(http, KEYS, project="acme")
        secrets = (join["key"], join["key"].rpartition("_")[2], api["key"], api["key"].removeprefix("sk-xim-"))
        texts = [(await http.get(path)).text for path in READS]
        texts += [(await http.post(f"{JOIN}/{join['id']}/revoke", json={})).text]
    texts += [caplog.text, str([vars(record) for record in caplog.records]), "\n".join(bench.store.db.iterdump())]
    assert MODEL in "".join(texts)
    assert not [secret for secret in secrets if any(secret in text for text in texts)]


def test_keys_of_an_older_router_still_open_the_api(tmp_path: Path) -> None:
    old = sqlite3.connect(tmp_path / FILE)
    old.execute(
        "CREATE TABLE api_keys(hash BLOB PRIMARY KEY, project TEXT NOT NULL, created REAL NOT NULL, revoked REAL)"
    )
    old.execute("INSERT INTO api_keys VALUES(?, 'acme', 5.0, NULL)", (digest(b"sk-xim-old"),))
    old.commit()
    old.close()
    for _ in range(2):
        with Store.open(tmp_path) as store:
            assert catalog.find_api_key(store.db, "sk-xim-old") == (digest(b"sk-xim-old"), "acme")
            (row,) = catalog.api_keys(store.db)
            assert (row["state"], row["name"], row["beginning"], row["last_used"]) == ("valid", "", "", None)
