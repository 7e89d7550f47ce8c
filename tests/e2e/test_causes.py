"""Every cause why an agent has no valid identity, produced with the executable: message, next step, exit code, label.

README's table is what these cases print. To write it anew: XIM_WRITE_README=1 ./build/test tests/e2e/test_causes.py
"""

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from fakes.place import Place, serving_router
from fakes.readme import readme_part
from fakes.stack import free_port, until
from fakes.tls import certificate, named, server_context

from xim_agent.identity.join_key import JoinKey
from xim_agent.identity.jose import b64u, json_object, unb64u
from xim_agent.router.guesses import ALLOWED
from xim_agent.router.store import Store

pytestmark = pytest.mark.e2e

BEGIN, END = "<!-- causes: written by tests/e2e/test_causes.py -->\n", "<!-- end of causes -->\n"


@dataclass
class Row:
    cause: str
    message: str
    hint: str
    exit: str
    label: str


@pytest.fixture(scope="module")
def place(agent_exe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with serving_router(str(agent_exe), tmp_path_factory.mktemp("causes")) as place:
        yield place


def read(cause: str, done: subprocess.CompletedProcess[str], place: Place) -> Row:
    """What the executable said at its end."""
    found = re.search(r"^error: (.*) \[(\w+)\]$(?:\n\nhint: (.*))?", done.stderr, re.MULTILINE)
    assert found, done.stderr
    return Row(cause, plain(found[1], place), plain(found[3] or "", place), str(done.returncode), found[2])


def plain(text: str, place: Place) -> str:
    """Without what differs from run to run."""
    for pattern, shown in (
        (re.escape(str(place.root)) + r"/agent\d+", "DIR"),
        (re.escape(str(place.root)), "DIR"),
        (r"127\.0\.0\.1:\d+", "ROUTER"),
        (r"localhost:\d+", "localhost:PORT"),
        (r"(file system of |du -xh |remount,rw )/[^:`]*", r"\1MOUNT"),
        (r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", "ID"),
        (r"pid \d+", "pid N"),
        (r"\b\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", "TIME"),
        (r"\b(29\d|30\d) s\b", "300 s"),
        (r"(?<![\w-])[\w-]{43}(?![\w-])", "THUMBPRINT"),
        (r"wait \d+ s", "wait N s"),
        (r"uid \d+|chown -R \d+", lambda m: re.sub(r"\d+", "N", m[0])),
        (r"runs as \d+", "runs as N"),
    ):
        text = re.sub(pattern, shown, text)
    return text


# -- each case --


def malformed(place: Place) -> Row:
    return read("join key malformed", place.enroll(JOIN_KEY="xjk_demo_abc"), place)


def unknown(place: Place) -> Row:
    key = JoinKey.parse(place.join_key())
    other = JoinKey.make("p", key.routers, key.pin, b"x" * 32).text
    return read("join key unknown", place.enroll(JOIN_KEY=other), place)


def expired(place: Place) -> Row:
    number, key = place.new_key()
    with Store.open(place.data) as store:
        store.db.execute("UPDATE join_keys SET expires=1 WHERE id=?", (number,))
    return read("join key expired", place.enroll(JOIN_KEY=key), place)


def revoked(place: Place) -> Row:
    number, key = place.new_key()
    place.router("join-key", "revoke", number)
    return read("join key revoked", place.enroll(JOIN_KEY=key), place)


def used_up(place: Place) -> Row:
    key = place.join_key()
    assert place.enroll(JOIN_KEY=key).returncode == 0
    return read("join key used up", place.enroll(JOIN_KEY=key), place)


def no_key(place: Place) -> Row:
    return read("no join key at the first start", place.enroll(), place)


def clock(place: Place) -> Row:
    shifted = {"LD_PRELOAD": str(place.library), "XIM_CLOCK": "-300"}
    state = place.directory()
    key = place.join_key()
    row = read("this machine's clock is off", place.enroll(state, JOIN_KEY=key, environ=shifted), place)
    with place.run(state, shifted, JOIN_KEY=key) as agent:  # stays up, and says so
        until("the condition", lambda: agent.label("xim_agent_condition", "clock_off"), 30)
        assert agent.label("xim_agent_identity_failures_total", row.label)
    assert place.enroll(state, JOIN_KEY=key).returncode == 0, "nothing was lost by it"
    return row


def dns(place: Place) -> Row:
    done = place.enroll(JOIN_KEY=place.join_key(), ROUTER_URL="https://router.invalid:8443")
    return read("router's name is not known", done, place)


def refused(place: Place) -> Row:
    env = {"JOIN_KEY": place.join_key(), "ROUTER_URL": f"http://127.0.0.1:{free_port()}"}
    state = place.directory()
    with place.run(state, **env) as agent:
        until("it is counted", lambda: agent.label("xim_agent_router_failures_total", "connection_refused"), 30)
        assert agent.label("xim_agent_condition", "identity_failing")
    return read("router refuses connections", place.enroll(state, **env), place)


def timeout(place: Place) -> Row:
    with closing(socket.create_server(("127.0.0.1", 0), backlog=0)) as full:
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:  # the queue of connections that nobody accepts
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}"
        row = read("no connection in 10 s", place.enroll(JOIN_KEY=place.join_key(), ROUTER_URL=url), place)
        for filler in fillers:
            filler.close()
    return row


def silence(place: Place) -> Row:
    with closing(socket.create_server(("127.0.0.1", 0))) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        return read("no answer in 10 s", place.enroll(JOIN_KEY=place.join_key(), ROUTER_URL=url), place)


def tls(place: Place) -> Row:
    chain, key = certificate(place.root / "tls", subject=named("proxy.corp.example", "Corp"), issuer=named("Corp CA"))
    with serving(204, {}, b"", (chain, key)) as url:
        return read("TLS is intercepted", place.enroll(JOIN_KEY=place.join_key(), ROUTER_URL=url), place)


def proxy(place: Place) -> Row:
    with serving(407, {}, b"") as url:
        key, env = place.join_key(), {"HTTPS_PROXY": url.replace("//", "//user:hunter2@")}
        done = place.enroll(JOIN_KEY=key, ROUTER_URL="https://router.example:8443", environ=env)
    assert "hunter2" not in done.stderr
    return read("proxy refuses", done, place)


def protocol(place: Place) -> Row:
    problem = {"code": "protocol_unsupported", "protocols": [2], "detail": "this router speaks protocol 2"}
    with serving(426, {"content-type": "application/problem+json"}, json.dumps(problem).encode()) as url:
        return read("another protocol version", place.enroll(JOIN_KEY=place.join_key(), ROUTER_URL=url), place)


def no_router(place: Place) -> Row:
    with serving(404, {}, b"<html>") as url:
        return read("not a router", place.enroll(JOIN_KEY=place.join_key(), ROUTER_URL=url), place)


def other_url(place: Place) -> Row:
    url = f"http://localhost:{place.port}"
    return read("router is called by another URL", place.enroll(JOIN_KEY=place.join_key(), ROUTER_URL=url), place)


def plain_http(place: Place) -> Row:
    done = place.enroll(JOIN_KEY=place.join_key(), ROUTER_URL="http://router.example")
    return read("plain http to another host", done, place)


def impostor(place: Place) -> Row:
    """The router's address answers, but its keys are others: the join key's pin says so."""
    slug, payload = place.join_key().split("_")[1:]
    members = json_object(unb64u(payload)) | {"pin": b64u(b"p" * 32)}
    key = f"xjk_{slug}_{b64u(json.dumps(members).encode())}"
    return read("another router than the join key's", place.enroll(JOIN_KEY=key), place)


def suspended(place: Place) -> Row:
    state, agent_id = place.enrolled()
    place.router("agents", "suspend", agent_id)
    with place.run(state) as agent:
        until("the condition", lambda: agent.label("xim_agent_condition", "agent_suspended"), 30)
        assert agent.popen.poll() is None
        status = httpx.get(f"http://127.0.0.1:{agent.port}/readyz", trust_env=False).text
    found = re.search(r"agent_suspended: (.*); (.*)", status)
    assert found, status
    return Row("agent suspended", found[1], found[2], "stays up", "agent_suspended")


def removed(place: Place) -> Row:
    state, agent_id = place.enrolled()
    place.router("agents", "remove", agent_id)
    return read("agent removed", place.enroll(state), place)


def credential_revoked(place: Place) -> Row:
    state, agent_id = place.enrolled()
    place.router("agents", "revoke-credentials", agent_id)
    return read("credential revoked", place.enroll(state), place)


def credential_reused(place: Place) -> Row:
    (state, _), copy = place.enrolled(), place.directory()
    shutil.copytree(state, copy)
    for _ in range(3):
        assert place.enroll(state).returncode == 0
    return read("old copy of the state is used", place.enroll(copy), place)


def clone(place: Place) -> Row:
    (state, _), copy = place.enrolled(), place.directory()
    shutil.copytree(state, copy)
    with place.run(state) as first:
        until("the first one polls", lambda: "xim_agent_link_up 1.0" in first.metrics(), 30)
        with place.run(copy) as second:
            code = second.popen.wait(60)
            done = subprocess.CompletedProcess("", code, "", second.text)
        until("the first one is told", lambda: first.label("xim_agent_condition", "identity_in_use"), 60)
        assert first.popen.poll() is None
        assert re.search(r"this identity also runs at 127\.0\.0\.1:\d+, since ", first.text)
    return read("this identity runs elsewhere", done, place)


def same_directory(place: Place) -> Row:
    state, _ = place.enrolled()
    with place.run(state) as first:
        until("it runs", lambda: first.metrics(), 30)
        return read("state directory is in use", place.enroll(state), place)


def guessing(place: Place) -> Row:
    """Last: this address is not listened to for a while."""
    key = JoinKey.parse(place.join_key())
    wrong = JoinKey.make("p", key.routers, key.pin, b"y" * 32).text
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):  # a slow machine earns a guess every 6 s
            guesses = list(pool.map(lambda _: place.enroll(JOIN_KEY=wrong), range(ALLOWED + 1)))
            assert {guess.returncode for guess in guesses} <= {10, 69}
            if refused := [guess for guess in guesses if guess.returncode == 69]:
                return read("too many wrong join keys", refused[-1], place)
    pytest.fail("no guess was too many")


def state_file(cause: str, change: Callable[[Path], None]) -> Callable[[Place], Row]:
    def case(place: Place) -> Row:
        state, _ = place.enrolled()
        change(state)
        before = kept(state)
        row = read(cause, place.enroll(state, JOIN_KEY=place.join_key()), place)
        assert kept(state) == before, "nothing overwritten"
        return row

    return case


def kept(state: Path) -> dict[str, bytes]:
    """All files but the lock, which holds the last pid."""
    return {path.name: path.read_bytes() for path in state.iterdir() if path.suffix != ".lock"}


def older(state: Path) -> None:
    path = state / "enrollment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 0}))


def owner(place: Place) -> Row:
    state, _ = place.enrolled()
    other = {"LD_PRELOAD": str(place.library), "XIM_UID": str(os.geteuid() + 1)}
    return read("state of another user", place.enroll(state, other), place)


def full(place: Place) -> Row:
    """When it writes the state: the pid in the lock file, which comes before, is not that important."""
    state = place.directory()
    done = place.enroll(state, failing(place, state, errno.ENOSPC, 6), JOIN_KEY=place.join_key())
    return read("disk full", done, place)


def read_only(place: Place) -> Row:
    state, _ = place.enrolled()
    return read("state directory is read-only", place.enroll(state, failing(place, state, errno.EROFS, 2)), place)


def failing(place: Place, state: Path, error: int, at: int) -> dict[str, str]:
    """The operation number `at` on the files of a state directory fails."""
    words = {"DIR": str(state), "HOW": str(error), "ONLY": "files", "AT": str(at)}
    return {"LD_PRELOAD": str(place.library), **{f"XIM_FAIL_{name}": value for name, value in words.items()}}


@contextmanager
def serving(status: int, headers: dict[str, str], body: bytes, tls: tuple[Path, Path] | None = None) -> Iterator[str]:
    """Something on loopback that answers every call so."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_CONNECT = do_POST

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that does not trust us
    if tls is not None:
        server.socket = server_context(*tls).wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


CASES: list[Callable[[Place], Row]] = [
    *(malformed, unknown, expired, revoked, used_up, no_key, clock, dns, refused, timeout, silence, tls, proxy),
    *(no_router, other_url, plain_http, impostor, protocol, suspended, removed, credential_revoked, credential_reused),
    *(clone, same_directory),
    state_file("state can be read by others", lambda state: (state / "enrollment.json").chmod(0o644)),
    state_file("state is damaged", lambda state: (state / "enrollment.json").write_bytes(b"{")),
    state_file("state of an older version", older),
    *(owner, full, read_only),
]


@pytest.fixture(scope="module")
def rows(place: Place) -> list[Row]:
    """All cases, several at a time: some wait for 10 s. The last one shuts this address out."""
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda case: case(place), CASES))
    return [*rows, guessing(place)]


def table(rows: list[Row]) -> str:
    lines = ["| cause | message | next step | exit | `code` |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        cells = (row.cause, row.message, row.hint, row.exit, f"`{row.label}`")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def test_every_cause_has_a_name_of_its_own_and_a_next_step(rows: list[Row]) -> None:
    assert len({row.cause for row in rows}) == len(rows)
    assert len({row.message for row in rows}) == len(rows)
    assert [row.cause for row in rows if not row.message or not row.hint] == []
    allowed = {"join_key": "10", "credential_re": "11", "agent_removed": "12", "protocol": "13", "state_": "77"}
    for row in rows:
        for prefix, code in allowed.items():
            if row.label.startswith(prefix) and not row.label.endswith("malformed"):
                assert row.exit == code


def test_readme_has_the_table_that_these_cases_give(rows: list[Row]) -> None:
    readme_part(BEGIN, table(rows), END)
