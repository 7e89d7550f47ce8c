"""What the router refuses and how the agent takes it: exit codes, health conditions, nothing stored."""

from typing import Any

import pytest
import trio
import trio.testing
from fakes.identity import URL, Agent, Router, running, some_hours, until

from xim_agent.errors import AgentError
from xim_agent.outcome import NOT_A_ROUTER, RouterError
from xim_agent.router import roster


async def test_both_refused_without_a_join_key_is_exit_11(agent: Agent, router: Router, autojump_clock: Any) -> None:
    await agent.start().enroll_once()
    agent.join_key = None
    router.db.execute("UPDATE agents SET family_revoked = 1")
    with pytest.raises(AgentError) as caught:
        await running(agent.start(), some_hours)
    assert (caught.value.code, caught.value.exit_code) == ("credential_revoked", 11)


async def test_both_refused_enrolls_again_with_the_join_key_but_not_twice_in_a_row(
    agent: Agent, router: Router, autojump_clock: Any
) -> None:
    first = await agent.start().enroll_once()
    service = agent.start()

    async def body() -> None:
        await trio.sleep(60)
        router.db.execute("UPDATE agents SET family_revoked = 1")
        await service.refused((await service.wait_bearer()).token)
        assert router.enrolls == 2
        assert service.statistics().agent_id == first.agent_id
        await trio.sleep(60)
        router.db.execute("UPDATE agents SET family_revoked = 1")
        await service.refused((await service.wait_bearer()).token)

    with pytest.raises(AgentError) as caught:
        await running(service, body)
    assert caught.value.exit_code == 11
    assert "already" in caught.value.message
    assert router.enrolls == 2


@pytest.mark.parametrize("uses", [1, 5])
async def test_revoked_again_and_again_it_comes_back_and_spends_one_use(
    router: Router, autojump_clock: Any, uses: int
) -> None:
    """Also in the start in which it enrolled first: a routine of the router's operator strands no host."""
    agent = Agent(router, router.join_key(uses=uses))
    service = agent.start()

    async def body() -> None:
        first = (await service.wait_bearer()).agent_id
        for done in range(1, 4):
            await trio.sleep(900)
            router.db.execute("UPDATE agents SET family_revoked = 1")
            await until(lambda done=done: service.statistics().enrollments > done)
            assert router.accepts((await service.wait_bearer()).token)
            assert service.statistics().agent_id == first

    await running(service, body)
    assert router.one("SELECT uses_left FROM join_keys") == uses - 1


@pytest.mark.parametrize(
    ("change", "words"),
    [("revoked = 1", "the join key was revoked"), ("expires = 1", "the join key has expired")],
)
async def test_refused_credential_is_named_before_a_join_key_that_is_of_no_use_either(
    agent: Agent, router: Router, autojump_clock: Any, change: str, words: str
) -> None:
    await agent.start().enroll_once()
    await agent.start().enroll_once()
    router.db.execute("UPDATE agents SET family_revoked = 1")
    router.db.execute(f"UPDATE join_keys SET {change}")
    with pytest.raises(AgentError) as caught:
        await running(agent.start(), some_hours)
    assert (caught.value.code, caught.value.exit_code) == ("credential_revoked", 11)
    assert caught.value.message.endswith(f"; {words}")
    assert "create a new join key" in caught.value.hint


@pytest.mark.parametrize("uses", [1, 9])
async def test_removed_agent_does_not_come_back_by_itself(router: Router, autojump_clock: Any, uses: int) -> None:
    """Though a supervisor starts it again with the same join key, which has uses left; with another one it does."""
    agent = Agent(router, router.join_key(uses=uses))
    first = await agent.start().enroll_once()
    router.db.execute("UPDATE agents SET state = 'removed'")
    for _ in range(3):
        with pytest.raises(AgentError) as caught:
            await running(agent.start(), some_hours)
        assert (caught.value.code, caught.value.exit_code) == ("agent_removed", 12)
        assert "create a new join key" in caught.value.hint
    assert router.one("SELECT count(*) FROM agents") == 1
    agent.join_key = router.join_key()
    assert (await agent.start().enroll_once()).agent_id != first.agent_id


async def test_agent_that_left_may_join_again_with_what_is_left_of_its_key(router: Router, autojump_clock: Any) -> None:
    agent = Agent(router, router.join_key(uses=2))
    service = agent.start()
    first = await service.enroll_once()
    roster.remove(router.db, first.agent_id, 1.0)  # as `leave` does
    await service.left()
    assert (await agent.start().enroll_once()).agent_id != first.agent_id


async def test_enrolling_again_survives_an_outage(agent: Agent, router: Router, autojump_clock: Any) -> None:
    await agent.start().enroll_once()
    router.db.execute("UPDATE agents SET family_revoked = 1")
    service = agent.start()
    router.lose = 4

    async def body() -> None:
        await until(lambda: service.statistics().enrollments)

    await running(service, body)
    assert router.one("SELECT count(*) FROM agents") == 1


async def test_neither_credential_nor_join_key_is_exit_78(router: Router, autojump_clock: Any) -> None:
    agent = Agent(router)
    for attempt in (agent.start().enroll_once, agent.start().run):
        with pytest.raises(AgentError) as caught:
            await attempt()
        assert (caught.value.code, caught.value.exit_code) == ("no_credential", 78)
    assert agent.store.data is None


async def test_removed_agent_keeps_its_state_aside(agent: Agent, router: Router, autojump_clock: Any) -> None:
    await agent.start().enroll_once()
    router.db.execute("UPDATE agents SET state = 'removed'")
    with pytest.raises(AgentError) as caught:
        await running(agent.start(), some_hours)
    assert caught.value.exit_code == 12
    assert agent.store.aside["removed"] is not None
    state = agent.store.load()
    assert state is not None
    assert state.enrollment is None


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("uses_left = 0", "join_key_used_up"),
        ("revoked = 1", "join_key_revoked"),
        ("expires = 1", "join_key_expired"),
        ("secret_hash = x'00'", "join_key_invalid"),
    ],
)
async def test_refused_join_key_is_final_and_named(
    agent: Agent, router: Router, autojump_clock: Any, change: str, code: str
) -> None:
    router.db.execute(f"UPDATE join_keys SET {change}")
    with pytest.raises(AgentError) as caught:
        await running(agent.start(), some_hours)
    assert (caught.value.code, caught.value.exit_code) == (code, 10)
    assert caught.value.hint
    assert router.enrolls == 1
    state = agent.store.load()
    assert state is not None
    assert state.enrollment is None


async def test_wrong_url_is_named_with_both(agent: Agent, router: Router, autojump_clock: Any) -> None:
    agent.router_url = "http://10.0.0.9:8080"
    with pytest.raises(AgentError) as caught:
        await agent.start().enroll_once()
    assert caught.value.exit_code == 78
    assert "10.0.0.9" in caught.value.message
    assert URL in caught.value.message


async def test_what_is_no_router_is_a_matter_of_configuration(
    agent: Agent, router: Router, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def not_found(*call: Any) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        raise RouterError("http_404", "POST https://shop.example/v1/enroll: 404 http_404", status=404)

    monkeypatch.setattr(router, "enroll", not_found)
    with pytest.raises(AgentError) as caught:
        await agent.start().enroll_once()
    assert (caught.value.exit_code, caught.value.hint) == (78, NOT_A_ROUTER)


async def test_router_of_another_protocol_is_exit_13(
    agent: Agent, router: Router, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xim_agent.router.enrollment.PROTOCOL", 2)
    with pytest.raises(AgentError) as caught:
        await running(agent.start(), some_hours)
    assert caught.value.exit_code == 13
    assert "protocol 1" in caught.value.message
    assert "[2]" in caught.value.message


async def test_clock_off_is_named_and_cured_by_setting_it(agent: Agent, router: Router, autojump_clock: Any) -> None:
    router.clock.offset = 300
    with pytest.raises(AgentError) as caught:
        await agent.start().enroll_once()
    assert caught.value.exit_code == 15
    assert "clock" in caught.value.message
    service = agent.start()

    async def body() -> None:
        await trio.sleep(60)
        assert agent.codes == {"clock_off"}
        agent.clock.offset = 300
        await service.wait_bearer()
        assert not agent.codes

    await running(service, body)
    assert router.one("SELECT count(*) FROM agents") == 1


async def test_proof_is_corrected_once_by_the_routers_date(agent: Agent, router: Router, autojump_clock: Any) -> None:
    agent.clock.offset = 300  # ahead: the router's token is valid by this clock, the proof is not by the router's
    await agent.start().enroll_once()
    assert router.enrolls == 2
    await agent.start().enroll_once()
    assert router.refreshes == 2
    assert router.one("SELECT used FROM agents") == 1


async def test_refresh_reply_by_a_stranger_changes_nothing(
    agent: Agent, router: Router, stranger: Router, autojump_clock: Any
) -> None:
    await agent.start().enroll_once()
    agent.join_key = None
    before = agent.store.data
    router.tamper = lambda reply: {**reply, "keys": stranger.keys.key_set(int(agent.clock.now()))}
    service = agent.start()

    async def body() -> None:
        token = (await service.wait_bearer()).token
        await trio.sleep(60)
        assert agent.codes == {"identity_failing"}
        assert (await service.wait_bearer()).token == token
        assert agent.store.data == before
        router.tamper = lambda reply: reply
        await trio.sleep(60)
        assert not agent.codes
        assert agent.store.data != before

    await running(service, body)


@pytest.mark.parametrize("part", ["token", "keys", "root", "issuer", "agent_id", "worker_id", "project", "region"])
async def test_enroll_reply_with_one_wrong_part_stores_nothing_but_the_key(
    agent: Agent, router: Router, stranger: Router, autojump_clock: Any, part: str
) -> None:
    other = Agent(stranger, stranger.join_key())
    foreign: dict[str, Any] = {}

    def copy(reply: dict[str, Any]) -> dict[str, Any]:
        foreign.update(reply)
        return reply

    stranger.tamper = copy
    await other.start().enroll_once()
    changed = foreign[part] if part in ("token", "keys", "root") else "other"
    router.tamper = lambda reply: {**reply, part: changed}
    with pytest.raises(AgentError) as caught:
        await running(agent.start(), some_hours)
    assert caught.value.exit_code == 15
    state = agent.store.load()
    assert state is not None
    assert state.enrollment is None
