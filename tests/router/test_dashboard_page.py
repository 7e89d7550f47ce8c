"""The dashboard's own files and its stream: what they weigh, what browsers are told about them, and who gets which."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trio
from click.testing import CliRunner
from fakes.agent import Bench, running, until
from fakes.dashboard import events, sign_in, signed_in

from xim_agent.cli.router import command
from xim_agent.router.dashboard import feed, sessions

FOLDER = Path(feed.__file__).parent
OWN = re.compile(r"""(?:src|href|from|import\()\s*=?\s*["'`](/[^"'`$]+)["'`]""")
SAFE = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def scripts() -> Iterator[Path]:
    yield from FOLDER.glob("*.js")
    yield from FOLDER.glob("vendor/*.js")


def stranger(bench: Bench) -> httpx.AsyncClient:
    """A browser that is not signed in."""
    return httpx.AsyncClient(base_url=bench.url, headers={"origin": bench.url}, trust_env=False)


async def test_every_reply_has_the_headers_that_keep_others_out(bench: Bench) -> None:
    page = bench.router.dashboard
    own = [path.replace("{id}", "x") for path in (*page.files, *page.reads, *page.writes)]
    paths = [*own, "/dashboard/api/login", "/dashboard/api/logout", "/dashboard/nothing", "/dashboard/api/nothing"]
    async with bench.http() as http:
        for path in paths:
            for method in ("GET", "POST"):
                reply = await http.request(method, path)
                policy = reply.headers["content-security-policy"]
                assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
                assert "frame-ancestors 'none'" in policy
                assert not re.search(r"unsafe|\*|https?:", policy)
                assert {name: reply.headers.get(name) for name in SAFE} == SAFE, path


async def test_without_a_session_there_are_the_pages_own_files_and_nothing_else(bench: Bench) -> None:
    await bench.agent()
    page = bench.router.dashboard
    async with bench.http() as http:
        for path in page.files:
            assert (await http.get(path, follow_redirects=True)).status_code == 200
        for path in page.reads:
            reply = await http.get(path.replace("{id}", "x"))
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "signed_out")
            assert "admin-link" in reply.json()["error"]["message"]
        for path in page.writes:
            assert (await http.post(path.replace("{id}", "x"), json={})).status_code == 401


@pytest.mark.parametrize("path", ["/", "/dashboard"])
async def test_where_people_look_first_leads_to_the_page(bench: Bench, path: str) -> None:
    async with bench.http(follow_redirects=True) as http:
        page = await http.get(path)
        assert (page.url.path, page.status_code) == ("/dashboard/", 200)
        assert page.headers["content-type"] == "text/html; charset=utf-8"


async def test_all_that_a_page_can_load_is_here_and_weighs_less_than_200_kb(bench: Bench) -> None:
    async with bench.http() as http:
        found, todo = {}, {"/dashboard/", *(f"/dashboard/{file.relative_to(FOLDER)}" for file in scripts())}
        while todo:
            path = todo.pop()
            reply = await http.get(path)
            assert reply.status_code == 200, path
            found[path] = len(reply.content)
            todo |= set(OWN.findall(reply.text)) - found.keys()
    assert {"/dashboard/style.css", "/dashboard/core.js", "/dashboard/app.js"} <= found.keys()
    assert sum(found.values()) < 200_000, found


def test_nothing_is_from_elsewhere_and_no_text_can_become_markup() -> None:
    page = (FOLDER / "index.html").read_text()
    assert not re.search(r"<script>|<style|style=|\son\w+=|https?:", page)
    for file in FOLDER.glob("*.js"):
        text = file.read_text()
        found = re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|srcdoc", text)
        assert not found, file.name
    assert not re.search(r"@import|url\(", (FOLDER / "style.css").read_text())


async def test_files_of_the_package_are_not_for_browsers(bench: Bench) -> None:
    async with bench.http() as http:
        for path in ("/dashboard/page.py", "/dashboard/index.html", "/dashboard/../page.py", "/dashboard/vendor/"):
            assert (await http.get(path)).status_code == 404


@pytest.mark.parametrize("how", ["sign out", "revoke", "idle"])
async def test_streams_end_with_their_session(bench: Bench, how: str) -> None:
    async with signed_in(bench) as http, signed_in(bench) as other, events(http) as mine, events(other) as theirs:
        await mine.until('"agents": []')
        await theirs.until('"agents": []')
        if how == "sign out":
            await http.post("/dashboard/api/logout", json={})
        elif how == "revoke":
            sessions.revoke(bench.store.db)
        else:
            bench.store.db.execute("UPDATE dashboard_sessions SET seen=seen-?", (sessions.IDLE,))
        await mine.end()
        if how == "sign out":
            await bench.agent()
            await theirs.until('"name": "node"')
        else:
            await theirs.end()
        assert (await http.get("/dashboard/events")).status_code == 401


async def test_many_dashboards_cost_one_snapshot_a_second(bench: Bench) -> None:
    pages, counted = 50, bench.router.dashboard.feed
    async with signed_in(bench) as http, trio.open_nursery() as nursery:
        begun, opened = trio.current_time(), 0

        async def look() -> None:
            nonlocal opened
            async with events(http) as stream:
                await stream.until('"agents": []')
                opened += 1
                await stream.until('"name": "node"')
                opened -= 1

        for _ in range(pages):
            nursery.start_soon(look)
        await until(lambda: opened == pages)
        assert counted.open == pages
        await bench.agent()
        await until(lambda: not opened)
    assert counted.made <= trio.current_time() - begun + 2


async def test_streams_are_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "MOST", 2)
    counted = bench.router.dashboard.feed
    async with signed_in(bench) as http:
        async with events(http) as one, events(http) as two:
            await one.until('"agents": []')
            await two.until('"agents": []')
            reply = await http.get("/dashboard/events")
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "dashboard_full")
        await until(lambda: not counted.open)
        async with events(http) as again:
            await again.until('"agents": []')


async def test_a_session_outlives_the_router(tmp_path: Path) -> None:
    async with running(tmp_path / "router") as bench, signed_in(bench) as http:
        kept, token = dict(http.cookies), http.headers["x-csrf-token"]
    async with running(tmp_path / "router") as bench, bench.http(cookies=kept) as http:
        assert (await http.get("/dashboard/api/session")).json() == {"role": "admin", "csrf": token, "insecure": False}


async def test_links_by_command_beside_a_running_router(tmp_path: Path) -> None:
    def made(*words: str) -> str:
        done = CliRunner().invoke(command, ["admin-link", *words, "--data", str(tmp_path / "router")])
        assert done.exit_code == 0, done.output
        return done.stdout.removesuffix("\n")

    async with running(tmp_path / "router") as bench, stranger(bench) as http:
        for words, role in ((["--read-only"], "read-only"), ([], "admin")):
            url, _, token = made(*words).partition("#/login/")
            assert url == f"{bench.url}/dashboard/"
            assert (await sign_in(http, token)).status_code == 204
            assert (await http.get("/dashboard/api/session")).json()["role"] == role
        unused = made().rpartition("/")[2]
        last = made("--revoke-others", "--url", "https://router.example:8443/").partition("#")
        assert last[0] == "https://router.example:8443/dashboard/"
        assert (await http.get("/dashboard/agents.json")).status_code == 401
        assert (await sign_in(http, unused)).json()["error"]["code"] == "link_unknown"
        assert (await sign_in(http, last[2].rpartition("/")[2])).status_code == 204


async def test_a_start_takes_back_the_link_of_the_start_before(bench: Bench) -> None:
    db, now = bench.store.db, time.time()
    by_hand, before, again = (sessions.make_link(db, now, at_start=start) for start in (False, True, True))
    async with stranger(bench) as http:
        assert (await sign_in(http, before)).json()["error"]["code"] == "link_unknown"
        for token in (by_hand, again):
            assert (await sign_in(http, token)).status_code == 204
