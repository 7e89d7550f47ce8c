"""Who may see the dashboard and who may change things: links, sessions, and pages of others."""

import ipaddress
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes.dashboard import sign_in
from starlette.requests import Request
from starlette.responses import Response

from xim_agent.router.app import make_app
from xim_agent.router.dashboard import sessions
from xim_agent.router.dashboard.parts import Viewer, asked, reply
from xim_agent.router.guesses import ALLOWED
from xim_agent.router.jobs import Limits
from xim_agent.router.store import Store

HOUR, DAY = 3600.0, 86400.0
HOME = "http://127.0.0.1:8080"


class Time:
    def __init__(self) -> None:
        self.at = 1_000_000.0

    def now(self) -> float:
        return self.at


class Bell:
    """A part with a path of each kind."""

    def __init__(self) -> None:
        self.rung: list[Any] = []
        self.reads = {"/dashboard/api/bell": self.read}
        self.writes = {"/dashboard/api/bell": self.ring}

    async def read(self, request: Request, viewer: Viewer) -> Response:
        return reply(self.rung)

    async def ring(self, request: Request, viewer: Viewer) -> Response:
        self.rung.append(await asked(request))
        return reply({"by": viewer.role})


class House:
    """The application without a socket, so that a browser may be anywhere."""

    def __init__(self, store: Store) -> None:
        self.time = Time()
        self.store = store
        self.bell = Bell()
        self.router = make_app(store, Limits(), self.time)
        self.router.add(self.bell)

    def link(self, **how: Any) -> str:
        return sessions.make_link(self.store.db, self.time.at, **how)

    def browser(self, url: str = HOME, address: str = "127.0.0.1") -> httpx.AsyncClient:
        there = httpx.ASGITransport(app=self.router, client=(address, 5))  # type: ignore[arg-type]
        return httpx.AsyncClient(transport=there, base_url=url, headers={"origin": url})


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with Store.open(tmp_path) as store:
        yield House(store)


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


async def test_a_link_signs_in_once(house: House) -> None:
    token = house.link()
    async with house.browser() as mine, house.browser() as another:
        assert code(await mine.get("/dashboard/agents.json")) == (401, "signed_out")
        assert (await sign_in(mine, token)).status_code == 204
        assert (await mine.get("/dashboard/agents.json")).status_code == 200
        refused = await sign_in(another, token)
        assert code(refused) == (403, "link_used")
        assert "admin-link" in refused.json()["error"]["message"]
        assert code(await another.get("/dashboard/agents.json")) == (401, "signed_out")


@pytest.mark.parametrize(
    ("late", "token", "refusal"),
    [(DAY - 1, None, None), (DAY, None, "link_expired"), (0, "x" * 43, "link_unknown"), (0, "", "link_unknown")],
)
async def test_links_that_open_nothing(house: House, late: float, token: str | None, refusal: str | None) -> None:
    good = house.link()
    house.time.at += late
    async with house.browser() as http:
        answer = await sign_in(http, good if token is None else token)
        assert (code(answer) if refusal else answer.status_code) == ((403, refusal) if refusal else 204)


async def test_who_guesses_is_soon_not_heard(house: House) -> None:
    async with house.browser(address="192.0.2.7") as there, house.browser() as here:
        for _ in range(ALLOWED):
            assert code(await sign_in(there, "guess"))[0] == 403
        answer = await sign_in(there, house.link())
        assert code(answer) == (429, "rate_limited")
        assert int(answer.headers["retry-after"]) >= 1
        assert (await sign_in(here, house.link())).status_code == 204


async def test_old_links_are_no_guesses(house: House) -> None:
    used = house.link()
    async with house.browser() as http:
        await sign_in(http, used)
        for _ in range(ALLOWED + 1):
            assert code(await sign_in(http, used)) == (403, "link_used")


@pytest.mark.parametrize(
    ("step", "count", "ends"), [(11 * HOUR, 15, True), (11 * HOUR, 14, False), (12 * HOUR, 1, True)]
)
async def test_a_session_ends_when_unused_and_in_the_end(house: House, step: float, count: int, ends: bool) -> None:
    """Seven days are 15.3 times 11 hours."""
    async with house.browser() as http:
        await sign_in(http, house.link())
        for _ in range(count):
            house.time.at += step
            answer = await http.get("/dashboard/agents.json")
        if count == 15:
            house.time.at += 4 * HOUR
            answer = await http.get("/dashboard/agents.json")
        assert answer.status_code == (401 if ends else 200)


async def test_sign_out(house: House) -> None:
    async with house.browser() as http:
        await sign_in(http, house.link())
        kept = dict(http.cookies)
        gone = await http.post("/dashboard/api/logout", json={})
        assert gone.status_code == 204
        assert not http.cookies, "the browser forgets it"
        http.cookies.update(kept)
        assert code(await http.get("/dashboard/agents.json")) == (401, "signed_out"), "and so does the router"


async def test_signing_in_again_replaces_the_session(house: House) -> None:
    async with house.browser() as http, house.browser() as another:
        for role in ("read-only", "admin"):
            await sign_in(another, house.link())
            await sign_in(http, house.link(role=role))
            assert (await http.get("/dashboard/api/session")).json()["role"] == role
        assert house.store.db.execute("SELECT count(*) FROM dashboard_sessions").fetchone() == (2,)


async def test_what_the_database_keeps_opens_nothing(house: House) -> None:
    token = house.link()
    async with house.browser() as http:
        await sign_in(http, token)
        (secret,) = http.cookies.values()
        house.store.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        content = (house.store.directory / "router.sqlite").read_bytes()
        for word in (secret, token, http.headers["x-csrf-token"]):
            assert len(word) >= 43
            assert word.encode() not in content


@pytest.mark.parametrize(
    ("url", "secure"), [(HOME, False), ("https://router.example", True), ("http://router.example:8080", False)]
)
async def test_the_cookie_goes_to_the_dashboard_alone(house: House, url: str, secure: bool) -> None:
    async with house.browser(url) as http:
        answer = await sign_in(http, house.link())
        first, *rest = answer.headers["set-cookie"].split("; ")
        assert {part.lower() for part in rest if not part.startswith("Max-Age")} == (
            {"httponly", "samesite=strict", "path=/dashboard"} | ({"secure"} if secure else set())
        )
        assert first.startswith("__Secure-xim_dashboard_" if secure else "xim_dashboard_")
        assert "domain" not in answer.headers["set-cookie"].lower(), "to this host alone"
        assert "cookie" not in (await http.get("/v1/models")).request.headers
        assert (await http.get("/dashboard/api/session")).json()["role"] == "admin"


async def test_tls_before_the_router_is_seen_by_the_origin(house: House) -> None:
    async with house.browser("http://router.example") as http:
        http.headers["origin"] = "https://router.example"
        answer = await http.post("/dashboard/api/login", json={"token": house.link()})
        assert "; secure" in answer.headers["set-cookie"].lower()


def test_two_routers_on_one_machine_have_cookies_of_their_own(tmp_path: Path) -> None:
    names = set()
    for directory in ("a", "b", "a"):
        with Store.open(tmp_path / directory) as store:
            names.add(sessions.own_id(store.db))
    assert len(names) == 2


EVIL: dict[str, dict[str, str | None]] = {
    "no token": {"x-csrf-token": None},
    "another token": {"x-csrf-token": "0" * 64},
    "no ascii": {"x-csrf-token": "\xe9" * 64},
    "no origin": {"origin": None},
    "another origin": {"origin": "https://evil.example"},
    "another port": {"origin": "http://127.0.0.1:9090"},
    "no origin at all": {"origin": "http://["},
    "origin null": {"origin": "null"},
    "another site": {"sec-fetch-site": "cross-site"},
    "a sibling": {"sec-fetch-site": "same-site"},
}


@pytest.mark.parametrize("changed", EVIL.values(), ids=EVIL)
async def test_pages_of_others_change_nothing(house: House, changed: dict[str, str | None]) -> None:
    async with house.browser() as http:
        await sign_in(http, house.link())
        headers = {**http.headers, **{name: value for name, value in changed.items() if value is not None}}
        for name in [name for name, value in changed.items() if value is None]:
            del headers[name], http.headers[name]
        raw = {name: value.encode("latin-1") for name, value in headers.items()}
        for path in ("/dashboard/api/bell", "/dashboard/api/logout"):
            assert (await http.post(path, json={}, headers=raw)).status_code == 403
        assert house.bell.rung == []
        assert (await http.get("/dashboard/api/session")).status_code == 200, "still signed in"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_forms_change_nothing(house: House, kind: str) -> None:
    async with house.browser() as http:
        await sign_in(http, house.link())
        answer = await http.post("/dashboard/api/bell", content=b"{}", headers={"content-type": kind})
        assert (answer.status_code, house.bell.rung) == (415, [])


async def test_a_link_in_another_sites_page_does_not_sign_in(house: House) -> None:
    async with house.browser() as http:
        http.headers["origin"] = "https://evil.example"
        assert code(await sign_in(http, house.link())) == (403, "other_origin")
        assert not http.cookies


async def test_own_page_changes_things(house: House) -> None:
    async with house.browser() as http:
        assert code(await http.post("/dashboard/api/bell", json={"n": 1})) == (401, "signed_out")
        await sign_in(http, house.link())
        for site in (None, "same-origin"):
            headers = {"sec-fetch-site": site} if site else {}
            answer = await http.post("/dashboard/api/bell", json={"n": 1}, headers=headers)
            assert (answer.status_code, answer.json()) == (200, {"by": "admin"})
        assert (await http.get("/dashboard/api/bell")).json() == [{"n": 1}] * 2
        assert (
            code(await http.post("/dashboard/api/bell", content=b"[]", headers={"content-type": "application/json"}))[0]
            == 400
        )
        assert code(await http.put("/dashboard/api/bell", json={})) == (405, "method_not_allowed")


async def test_who_may_look_changes_nothing(house: House) -> None:
    async with house.browser() as http:
        await sign_in(http, house.link(role="read-only"))
        assert (await http.get("/dashboard/api/session")).json()["role"] == "read-only"
        assert (await http.get("/dashboard/api/bell")).status_code == 200
        for path in house.router.dashboard.writes:
            answer = await http.post(path, json={})
            assert code(answer) == (403, "read_only")
            assert "to look only" in answer.json()["error"]["message"]
        assert house.bell.rung == []
        assert (await http.post("/dashboard/api/logout", json={})).status_code == 204, "but may go"


@pytest.mark.parametrize(
    ("url", "address", "insecure"),
    [
        (HOME, "127.0.0.1", False),
        ("http://localhost:9000", "::1", False),
        ("http://10.0.0.5:8080", "10.0.0.9", True),
        ("http://router.example", "127.0.0.1", True),
        ("https://router.example", "10.0.0.9", False),
        (HOME, "172.18.0.1", False),
    ],
)
async def test_plain_http_from_elsewhere_is_warned_of(
    house: House, caplog: pytest.LogCaptureFixture, url: str, address: str, insecure: bool
) -> None:
    house.router.dashboard.also = (ipaddress.ip_network("172.16.0.0/12"),)
    async with house.browser(url, address) as http:
        assert (await sign_in(http, house.link())).status_code == 204
        assert (await http.get("/dashboard/api/session")).json()["insecure"] is insecure
    assert any("plain http" in record.message for record in caplog.records) is insecure
