"""Models in the dashboard, over HTTP: who serves and has which, given, taken back, removed."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from click.testing import CliRunner
from fakes.agent import MODEL, Bench, FakeAgent, until
from fakes.dashboard import signed_in

from xim_agent.cli.router import command
from xim_agent.router import catalog, models
from xim_agent.router.publish import publish

MODELS = "/dashboard/api/models"


def published(bench: Bench, path: Path, name: str, *contents: bytes) -> catalog.Published:
    """With files as in life, so that removal has something to do."""
    path.mkdir(parents=True)
    for number, data in enumerate(contents):
        (path / f"{number}.safetensors").write_bytes(data)
    done = publish(path, name, None, bench.store.directory)
    manifest = f"sha256:{done.manifest_sha256}"
    row = catalog.Published(name, done.revision, done.id, manifest, done.size_bytes, done.stored_bytes, "generate", 5.0)
    catalog.register(bench.store.db, row)
    return row


@pytest.fixture
async def http(bench: Bench) -> AsyncIterator[httpx.AsyncClient]:
    async with signed_in(bench) as http:
        yield http


async def look(http: httpx.AsyncClient) -> dict[str, Any]:
    found: dict[str, Any] = (await http.get(MODELS)).json()
    return found


async def do(http: httpx.AsyncClient, what: str, **asked: Any) -> tuple[int, dict[str, Any]]:
    reply = await http.post(f"{MODELS}/{what}", json=asked)
    return reply.status_code, reply.json()


def row(found: dict[str, Any], name: str, revision: str) -> dict[str, Any]:
    (one,) = [m for m in found["models"] if (m["model"], m["revision"]) == (name, revision)]
    return dict(one)


async def test_the_list_says_sizes_and_who_has_and_who_serves(
    bench: Bench, agent: FakeAgent, http: httpx.AsyncClient
) -> None:
    found = await look(http)
    (model,) = found["models"]
    assert (model["model"], model["revision"], model["size"], model["stored"]) == (MODEL, "r1", 1000, 700)
    assert (model["agents"], model["serving"]) == ([{"id": None, "name": "all agents"}], [])
    assert found["agents"] == [{"id": agent.id, "name": "node", "project": "test"}]
    assert found["publish"].endswith(f"router model publish PATH --name NAME --data {bench.store.directory}")
    await agent.poll(wait_ms=0)
    assert (await look(http))["models"][0]["serving"] == [{"id": agent.id, "name": "node"}]


async def test_a_model_goes_to_one_agent_and_back_and_it_hears_of_it(
    bench: Bench, agent: FakeAgent, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    other = published(bench, tmp_path / "other", "other", b"x")
    await agent.poll(wait_ms=0)
    before = (await agent.poll(wait_ms=0))["generation"]
    heard: list[int] = []

    async def wait() -> None:
        heard.append((await agent.poll())["generation"])

    async with trio.open_nursery() as nursery:  # while it waits for work
        nursery.start_soon(wait)
        await until(lambda: bench.router.dispatch.agents[agent.id].poll is not None)
        status, found = await do(http, "assign", model="other", agent=agent.id)
        assert status == 200
    assert heard[0] > before
    assert row(found, "other", other.revision)["agents"] == [{"id": agent.id, "name": "node"}]
    assert (await do(http, "assign", model="other", revision=other.revision, agent=agent.id))[1] == found

    status, found = await do(http, "unassign", model="other", revision=other.revision, agent=agent.id)
    assert (status, row(found, "other", other.revision)["agents"]) == (200, [])
    assert (await agent.poll(wait_ms=0))["generation"] == before, "that of all agents again"
    status, found = await do(http, "unassign", model=MODEL, revision="r1", agent=None)
    assert (status, found["models"][-1]["agents"]) == (200, [])
    assert (await agent.poll(wait_ms=0))["generation"] == 0
    assert (await agent.http.get(f"{bench.url}/v1/assignment")).status_code == 204
    assert (await do(http, "assign", model="other"))[0] == 200
    assert (await agent.poll(wait_ms=0))["generation"] > heard[0]


async def test_a_revision_is_removed_with_its_chunks_but_never_one_that_is_assigned(
    bench: Bench, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    first = published(bench, tmp_path / "1", "big", b"both", b"first")
    second = published(bench, tmp_path / "2", "big", b"both", b"second")
    assert (await do(http, "assign", model="big", revision=second.revision))[0] == 200
    status, said = await do(http, "remove", model="big", revision=second.revision)
    assert (status, said["error"]["code"]) == (409, "model_assigned")
    blobs = bench.store.directory / "models" / "blobs"
    assert len([path for path in blobs.rglob("*") if path.is_file()]) == 3
    bench.store.db.execute("DELETE FROM models WHERE name=?", (MODEL,))  # it has no manifest here
    status, found = await do(http, "remove", model="big", revision=first.revision)
    assert status == 200, found
    assert [m["revision"] for m in found["models"]] == [second.revision]
    assert len([path for path in blobs.rglob("*") if path.is_file()]) == 2
    status, said = await do(http, "remove", model="big", revision=first.revision)
    assert (status, said["error"]["code"]) == (404, "model_unknown")


async def test_a_publish_that_runs_is_shown_and_in_the_way_of_a_removal(
    bench: Bench, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    spare = published(bench, tmp_path / "1", "spare", b"x")
    assert (await look(http))["publishing"] is False
    with models.changing(bench.store.directory, pytest.fail, alone=False):
        assert (await look(http))["publishing"] is True
        status, said = await do(http, "remove", model="spare", revision=spare.revision)
        assert (status, said["error"]["code"]) == (409, "model_busy")
    found = await look(http)
    assert found["publishing"] is False
    assert row(found, "spare", spare.revision)


async def test_what_is_refused(bench: Bench, agent: FakeAgent, http: httpx.AsyncClient) -> None:
    gone = await bench.agent()
    bench.store.db.execute("UPDATE agents SET state='removed' WHERE agent_id=?", (gone.id,))
    unassign: dict[str, Any] = {"model": MODEL, "revision": "r1"}
    cases: list[tuple[str, dict[str, Any], tuple[int, str, str | None]]] = [
        ("assign", {}, (400, "invalid_request", "model")),
        ("assign", {"model": "none"}, (400, "model_unknown", "model")),
        ("assign", {"model": MODEL, "revision": "r9"}, (400, "model_unknown", "model")),
        ("assign", {"model": MODEL, "agent": "agt_none"}, (400, "agent_unknown", "agent")),
        ("assign", {"model": MODEL, "agent": gone.id}, (400, "agent_unknown", "agent")),
        ("assign", {"model": MODEL, "agent": {"a": 1}}, (400, "invalid_request", "agent")),
        ("assign", {"model": MODEL, "agent": "*\x1b"}, (400, "invalid_request", "agent")),
        ("assign", {"model": "x" * 5000}, (400, "invalid_request", "model")),
        ("assign", {"model": MODEL, "revision": 1}, (400, "invalid_request", "revision")),
        ("unassign", {"model": MODEL}, (400, "invalid_request", "revision")),
        ("unassign", unassign | {"agent": agent.id}, (404, "assignment_unknown", None)),
        ("unassign", unassign | {"revision": "r9"}, (404, "assignment_unknown", None)),
        ("remove", {"model": MODEL}, (400, "invalid_request", "revision")),
        ("remove", {"model": ["x"], "revision": "r1"}, (400, "invalid_request", "model")),
        ("remove", {"model": "none", "revision": "r1"}, (404, "model_unknown", None)),
    ]
    before = await look(http)
    for what, asked, expected in cases:
        status, said = await do(http, what, **asked)
        assert (status, said["error"]["code"], said["error"]["param"]) == expected, (what, asked)
    assert await look(http) == before


def test_unassign_by_command(tmp_path: Path) -> None:
    from xim_agent.router.store import Store

    with Store.open(tmp_path) as store:
        row = catalog.Published(MODEL, "r1", MODEL, f"sha256:{'0' * 64}", 1000, 700, "generate", 5.0)
        catalog.register(store.db, row)
        catalog.assign(store.db, MODEL, None, None)
        done = CliRunner().invoke(command, ["unassign", f"{MODEL}@r1", "--data", str(tmp_path)])
        assert done.exit_code == 0, done.output
        assert "taken back from all agents" in done.stderr
        assert catalog.assigned_models(store.db) == []
