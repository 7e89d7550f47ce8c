"""What the operator of the local router does with agents, join keys and signing keys, beside a running router."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner, Result
from fakes.agent import Bench, FakeAgent, hold, until

from xim_agent.cli.router import command
from xim_agent.cli.table import ago, plain
from xim_agent.clock import SystemClock
from xim_agent.errors import AgentError
from xim_agent.router import join_keys, keyring
from xim_agent.router.guesses import ALLOWED, KEEP, REFILL_SECONDS, Guesses
from xim_agent.router.lifecycle import lifecycle
from xim_agent.router.store import Store
from xim_agent.router.tokens import Problem


async def router(bench: Bench, *args: str) -> Result:
    """The command, as another process would run it."""
    return await trio.to_thread.run_sync(run, bench.store.directory, *args)


def run(data: Path, *args: str) -> Result:
    return CliRunner().invoke(command, [*args, "--data", str(data)])


async def rows(bench: Bench, *args: str) -> list[dict[str, Any]]:
    result = await router(bench, *args, "--json")
    assert result.exit_code == 0, result.stderr
    return list(json.loads(result.stdout))


async def status(bench: Bench) -> list[str]:
    return [row["status"] for row in await rows(bench, "agents", "ls")]


async def problem(agent: FakeAgent, path: str = "/v1/assignment") -> tuple[int, str]:
    reply = await agent.http.get(agent.url + path)
    return reply.status_code, reply.json()["code"] if reply.status_code >= 400 else ""


# -- the five states --


async def test_states_of_an_agent(bench: Bench, agent: FakeAgent) -> None:
    assert await status(bench) == ["pending"]
    await agent.poll(wait_ms=0)
    await until(lambda: bench.store.db.execute("SELECT last_seen FROM agents").fetchone()[0])
    assert await status(bench) == ["active"]
    await router(bench, "agents", "suspend", agent.id)
    assert await status(bench) == ["suspended"]
    await router(bench, "agents", "resume", "node")  # its name
    assert await status(bench) == ["active"]
    for silent, expected in ((74, "active"), (76, "disconnected"), (599, "disconnected"), (601, "dead")):
        bench.store.db.execute("UPDATE agents SET last_seen=?", (time.time() - silent,))
        assert [row["status"] for row in await rows(bench, "agents", "ls")] == [expected]
    await router(bench, "agents", "remove", agent.id[:6])
    assert await rows(bench, "agents", "ls") == []
    again = await router(bench, "agents", "suspend", "node")
    assert isinstance(again.exception, AgentError)
    assert again.exception.code == "agent_unknown", "by name, only those that are here"
    (left,) = await rows(bench, "agents", "ls", "--all")
    assert (left["id"], left["status"], left["credential"]) == (agent.id, "removed", "revoked")


@pytest.mark.parametrize("silent", [None, 0.0, 100.0, 1000.0])
def test_what_the_owner_decided_comes_first(silent: float | None) -> None:
    assert lifecycle("suspended", silent, 75, 600) == "suspended"
    assert lifecycle("removed", silent, 75, 600) == "removed"


async def test_table_for_people_and_rows_for_programs(bench: Bench, agent: FakeAgent) -> None:
    bench.store.db.execute("UPDATE agents SET name=?", ("evil\x1b[2J\nname",))
    text = (await router(bench, "agents", "ls")).stdout
    heading, line = text.splitlines()
    assert heading.split() == ["ID", "NAME", "STATUS", "CREDENTIAL", "PROJECT", "REGION", "WORKER", "LAST", "SEEN"]
    assert line.split()[:4] == [agent.id, "evil?[2J?name", "pending", "valid"]
    assert line.endswith("never")
    (row,) = await rows(bench, "agents", "ls")
    assert set(row) == {
        *("id", "name", "status", "credential", "project", "region", "worker_id", "last_seen", "enrolled"),
        *("address", "version", "join_key"),
    }
    assert row["address"] == "127.0.0.1"


def test_times_for_people() -> None:
    found = [ago(when, 1e9) for when in (None, 1e9 + 5, 1e9 - 119, 1e9 - 121, 1e9 - 7200, 1e9 - 200_000)]
    assert found == ["never", "0 s ago", "119 s ago", "2 min ago", "2 h ago", "2 d ago"]
    assert plain("") == "-"


# -- what a running router does about it --


async def test_suspend_ends_the_held_poll_and_resume_brings_work_back(
    bench: Bench, agent: FakeAgent, nursery: trio.Nursery
) -> None:
    replies = await hold(bench, agent, nursery)
    await router(bench, "agents", "suspend", agent.id)
    await until(lambda: replies)
    assert replies[0]["leases"] == []
    with pytest.raises(AssertionError, match="agent_suspended"):
        await agent.poll()
    assert await problem(agent) == (200, ""), "its other calls go on"
    await router(bench, "agents", "resume", agent.id)
    await agent.poll(wait_ms=0)


async def test_removed_agent_is_told_at_every_call(bench: Bench, agent: FakeAgent) -> None:
    await agent.poll(wait_ms=0)
    await router(bench, "agents", "remove", agent.id)
    assert await problem(agent) == (410, "agent_removed")
    await until(lambda: agent.id not in bench.router.dispatch.agents)
    again = await router(bench, "agents", "suspend", agent.id)
    assert isinstance(again.exception, AgentError)
    assert (again.exception.code, again.exception.exit_code) == ("agent_removed", 2)


async def test_revoked_credentials_end_its_tokens_at_once_and_a_join_key_brings_new_ones(
    bench: Bench, agent: FakeAgent, nursery: trio.Nursery
) -> None:
    held = await hold(bench, agent, nursery)
    old, key = agent.token, bench.join_key()
    await router(bench, "agents", "revoke-credentials", agent.id)
    await until(lambda: held)
    assert await problem(agent) == (401, "token_invalid")
    headers = {"DPoP": agent.proof("/v1/enroll/refresh")}
    body = {"refresh_token": agent.reply["refresh_token"]}
    reply = await agent.http.post(f"{bench.url}/v1/enroll/refresh", json=body, headers=headers)
    assert (reply.status_code, reply.json()["code"]) == (403, "credential_revoked")
    assert (await agent.enroll(key)).status_code == 201
    await agent.poll(wait_ms=0)
    agent.http.headers["Authorization"] = f"Bearer {old}"
    assert await problem(agent) == (401, "token_invalid")


async def test_the_same_join_key_again_replaces_the_credential_and_all_it_gave(bench: Bench) -> None:
    key = bench.join_key()
    agent = FakeAgent(bench.url)
    bench.agents.append(agent)
    await agent.enroll(key)
    assert await problem(agent) == (200, "")
    first, first_id = agent.token, agent.id
    await router(bench, "agents", "revoke-credentials", agent.id)
    await agent.enroll(key)
    assert (agent.id, await problem(agent)) == (first_id, (200, ""))
    agent.http.headers["Authorization"] = f"Bearer {first}"
    assert await problem(agent) == (401, "token_invalid"), "a stolen one stays dead"


async def test_token_that_was_checked_before_still_ends(bench: Bench, agent: FakeAgent) -> None:
    assert await problem(agent) == (200, "")
    bench.router.agents._clock = Later(30 * 24 * 3600)
    assert await problem(agent) == (401, "token_expired")


class Later(SystemClock):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def now(self) -> float:
        return super().now() + self.seconds


async def test_signing_key_rotates_beside_a_running_router(
    bench: Bench, agent: FakeAgent, nursery: trio.Nursery
) -> None:
    async def kids() -> tuple[str, set[str]]:
        signed = (await agent.http.get(f"{bench.url}/v1/assignment")).text
        return header(signed)["kid"], set(bench.router.agents._keys.public)

    first, _ = await kids()
    undisturbed = await hold(bench, agent, nursery)
    result = await router(bench, "rotate-signing-key")
    second = result.stdout.strip()
    assert "2 before it" in result.stderr
    await until(lambda: second in bench.router.agents._keys.public)
    assert await kids() == (second, {first, second}), "and the old token is still good"
    assert not undisturbed, "nobody needs a new token yet"
    held = await hold(bench, agent, nursery)
    result = await router(bench, "rotate-signing-key", "--compromised")
    third = result.stdout.strip()
    await until(lambda: held)
    await until(lambda: third in bench.router.agents._keys.public)
    assert set(bench.router.agents._keys.public) == {third}
    assert await problem(agent) == (401, "token_invalid")


def header(jws: str) -> dict[str, Any]:
    from xim_agent.identity.jose import json_object, unb64u

    return json_object(unb64u(jws.split(".")[0]))


# -- join keys --


async def test_join_keys_are_listed_without_being_shown_and_revoked(bench: Bench) -> None:
    now = time.time()
    created = await router(bench, "join-key", "create", "--project", "p", "--uses", "2")
    key = created.stdout.strip()
    assert created.stderr.startswith("key 1, for 2 agents")
    bench.join_key(uses=1, expires_at=now - 1)
    first = FakeAgent(bench.url)
    bench.agents.append(first)
    await first.enroll(key)
    listed = await router(bench, "join-key", "ls")
    assert key not in listed.stdout
    found = await rows(bench, "join-key", "ls")
    assert [(row["id"], row["state"], row["uses_left"], row["agents"]) for row in found] == [
        (2, "expired", 1, 0),
        (1, "valid", 1, 1),
    ]
    assert set(found[0]) == {"id", "project", "region", "uses_left", "created", "expires", "agents", "state"}
    await router(bench, "join-key", "revoke", "1")
    when = bench.store.db.execute("SELECT revoked FROM join_keys WHERE id=1").fetchone()
    await router(bench, "join-key", "revoke", "1")
    assert bench.store.db.execute("SELECT revoked FROM join_keys WHERE id=1").fetchone() == when
    assert [row["state"] for row in await rows(bench, "join-key", "ls")] == ["expired", "revoked"]
    second = FakeAgent(bench.url)
    bench.agents.append(second)
    reply = await second.enroll(key)
    assert (reply.status_code, reply.json()["code"]) == (403, "join_key_revoked")
    assert await problem(first) == (200, ""), "who is in stays in"
    bench.store.db.execute("UPDATE join_keys SET revoked=NULL, uses_left=0")
    assert (await rows(bench, "join-key", "ls"))[1]["state"] == "used up"


# -- mistakes --


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("agents", "suspend", "nobody"), "agent_unknown"),
        (("agents", "remove", "abcdef"), "agent_ambiguous"),
        (("agents", "resume", "twin"), "agent_ambiguous"),
        (("agents", "revoke-credentials", "abcde"), "agent_unknown"),
        (("join-key", "revoke", "7"), "join_key_unknown"),
    ],
)
async def test_who_is_not_meant_clearly_is_not_touched(bench: Bench, args: tuple[str, ...], code: str) -> None:
    for _ in range(2):
        await bench.agent()
    bench.store.db.execute("PRAGMA foreign_keys = OFF")
    bench.store.db.execute("UPDATE agents SET agent_id='abcdef-' || rowid, name='twin'")
    before = bench.store.db.execute("SELECT state, family_revoked FROM agents").fetchall()
    result = await router(bench, *args)
    assert isinstance(result.exception, AgentError)
    assert (result.exception.code, result.exception.exit_code) == (code, 2)
    assert "`router " in result.exception.hint
    assert bench.store.db.execute("SELECT state, family_revoked FROM agents").fetchall() == before


@pytest.mark.parametrize(
    "args", [("agents", "ls"), ("join-key", "ls"), ("agents", "remove", "x"), ("join-key", "revoke", "1")]
)
def test_mistyped_directory_is_not_made_into_a_router(tmp_path: Path, args: tuple[str, ...]) -> None:
    result = run(tmp_path / "nowhere", *args)
    assert isinstance(result.exception, AgentError)
    assert (result.exception.code, result.exception.exit_code) == ("router_unknown", 2)
    assert not (tmp_path / "nowhere").exists()


# -- guessing --


async def test_guesses_from_one_address_are_limited(bench: Bench) -> None:
    stranger = join_keys.JoinKey.make("x", (bench.url,), bench.router.agents._keys.pin(), b"x" * 32).text
    agent = FakeAgent(bench.url)
    bench.agents.append(agent)
    for _ in range(ALLOWED):
        assert (await agent.enroll(stranger)).json()["code"] == "join_key_invalid"
    for key in (stranger, "xjk_nonsense", bench.join_key()):
        reply = await agent.enroll(key)
        assert (reply.status_code, reply.json()["code"]) == (429, "rate_limited"), "or a guess would tell"
        assert 1 <= int(reply.headers["retry-after"]) <= REFILL_SECONDS
    reply = await agent.http.post(f"{bench.url}/v1/enroll", content=b"{", headers={"DPoP": "nonsense"})
    assert reply.status_code == 429, "nor is anything looked at that costs time"


async def test_good_keys_are_not_limited(bench: Bench) -> None:
    for _ in range(ALLOWED + 5):
        await bench.agent()


def test_allowance_comes_back_with_time_and_is_per_address() -> None:
    guesses = Guesses()
    for _ in range(ALLOWED):
        guesses.check("1.2.3.4", 100)
        guesses.wrong("1.2.3.4", 100)
    for address in ("1.2.3.5", "::1", "not an address"):
        guesses.check(address, 100)
    with pytest.raises(Problem) as caught:
        guesses.check("::ffff:1.2.3.4", 100)
    wait = caught.value.retry_after
    assert wait is not None
    assert 0 < wait <= REFILL_SECONDS
    guesses.check("1.2.3.4", 100 + wait)
    guesses.wrong("1.2.3.4", 100 + wait)
    with pytest.raises(Problem):
        guesses.check("1.2.3.4", 100 + wait)
    guesses.check("1.2.3.4", 10**6)


def test_who_has_many_addresses_has_one_network() -> None:
    guesses = Guesses()
    for number in range(ALLOWED):
        guesses.wrong(f"2001:db8:1:2::{number:x}", 0)
    with pytest.raises(Problem):
        guesses.check("2001:db8:1:2:ffff::1", 0)
    guesses.check("2001:db8:1:3::1", 0)


def test_memory_of_guesses_is_bounded() -> None:
    guesses = Guesses()
    for number in range(2 * KEEP):
        guesses.wrong(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 0)
    assert len(guesses._full_at) == KEEP


def test_who_keeps_guessing_is_not_forgotten() -> None:
    guesses = Guesses()
    for number in range(3 * KEEP):
        guesses.wrong("192.0.2.1", number * 1e-6)
        guesses.wrong(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", number * 1e-6)
    with pytest.raises(Problem):
        guesses.check("192.0.2.1", 1)


def test_a_near_guess_takes_as_long_as_a_far_one(tmp_path: Path) -> None:
    """Counted in steps of SQLite's machine, which are the same on every computer, and by what it gets to see."""
    with Store.open(tmp_path) as store:
        keys = keyring.open_keys(store.db, "http://x", 1.0)
        for _ in range(50):
            _, text = join_keys.create(
                store.db, keys, project="p", region="r", uses=1, expires_at=None, tiers=[], public_urls=["http://x"],
                now=1.0,
            )  # fmt: skip
        secret = join_keys.JoinKey.parse(text).secret
        seen: list[str] = []
        steps = 0

        def step() -> int:
            nonlocal steps
            steps += 1
            return 0

        store.db.set_progress_handler(step, 1)
        store.db.set_trace_callback(seen.append)
        counts = set()
        for guess in (secret[:31] + bytes([secret[31] ^ 1]), secret[:16] + bytes(16), bytes(32), b"\xff" * 32):
            steps = 0
            with pytest.raises(Problem):
                join_keys.find(store.db, guess)
            counts.add(steps)
        store.db.set_progress_handler(None, 1)
        assert join_keys.find(store.db, secret)["project"] == "p"
        store.db.set_trace_callback(None)
    assert len(counts) == 1
    assert not [text for text in seen if secret[:8].hex().upper() in text.upper()]
