"""Enroll, renew, hand out tokens: one agent against the router's real functions, in virtual time."""

import dataclasses
import logging
from typing import Any

import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fakes.identity import OTHER, URL, Agent, Router, assignment, running, some_hours, until

from xim_agent.errors import AgentError
from xim_agent.identity.claims import TokenRefused, UnknownKid


async def test_first_start_enrolls_and_gives_a_token(
    agent: Agent, router: Router, autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    service = agent.start()

    async def body() -> None:
        bearer = await service.wait_bearer()
        assert bearer.router == URL
        assert f"enrollment successful: {bearer.agent_id}" in caplog.messages
        assert service.statistics().project == "demo"
        assert bearer.token not in repr(bearer)

    await running(service, body)
    assert router.one("SELECT uses_left FROM join_keys") == 0
    assert not agent.codes


@pytest.mark.parametrize(("rand", "expected"), [(0.0, 0.45), (0.5, 0.5), (1.0, 0.55)])
async def test_refreshes_at_half_of_the_life(
    agent: Agent, router: Router, autojump_clock: Any, rand: float, expected: float
) -> None:
    agent.rand = rand
    service = agent.start()

    async def body() -> None:
        first = await service.wait_bearer()
        started = trio.current_time()
        await until(lambda: service.statistics().refreshes)
        assert trio.current_time() - started == pytest.approx(3600 * expected, abs=2)
        assert (await service.wait_bearer()).token != first.token

    await running(service, body)
    assert router.enrolls == 1


async def test_many_refusals_of_one_token_make_one_refresh(agent: Agent, router: Router, autojump_clock: Any) -> None:
    service = agent.start()
    router.delay = 1.0

    async def body() -> None:
        first = (await service.wait_bearer()).token

        async def caller() -> None:
            await service.refused(first)
            assert (await service.wait_bearer()).token != first, "returned before the refresh was over"

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(caller)
        assert router.refreshes == 1
        second = (await service.wait_bearer()).token
        assert second != first
        await service.refused(first)  # an old token says nothing about the new one
        await service.refused(second)  # within 10 s of the last: not due
        assert router.refreshes == 1
        await trio.sleep(10)
        await service.refused(second)
        assert router.refreshes == 2

    await running(service, body)


async def test_next_start_refreshes_and_ignores_the_stale_join_key(
    agent: Agent, router: Router, autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await agent.start().enroll_once()
    router.db.execute("UPDATE join_keys SET revoked = 1")
    service = agent.start()

    async def body() -> None:
        await service.wait_bearer()
        await until(lambda: service.statistics().refreshes)

    await running(service, body)
    assert router.enrolls == 1
    assert "join key ignored: this agent is enrolled" in caplog.messages


NO_KEY = AgentError("secret_unreadable", "cannot read /etc/key", exit_code=78)


async def test_a_join_key_that_cannot_be_read_is_no_matter_while_the_credential_works(
    agent: Agent, router: Router, autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await agent.start().enroll_once()
    agent.key_error = NO_KEY
    service = agent.start()

    async def body() -> None:
        await service.wait_bearer()
        await until(lambda: service.statistics().refreshes)

    await running(service, body)
    assert [line for line in caplog.messages if "/etc/key" in line] == [
        "join key ignored, this agent is enrolled: cannot read /etc/key"
    ]
    await agent.start().enroll_once()
    router.db.execute("UPDATE agents SET family_revoked = 1")
    with pytest.raises(AgentError) as caught:
        await running(agent.start(), some_hours)
    assert caught.value is NO_KEY


async def test_a_join_key_that_cannot_be_read_ends_the_first_start(
    agent: Agent, router: Router, autojump_clock: Any
) -> None:
    agent.key_error = NO_KEY
    for attempt in (agent.start().enroll_once, agent.start().run):
        with pytest.raises(AgentError) as caught:
            await attempt()
        assert caught.value is NO_KEY
    assert router.enrolls == 0


async def test_enroll_command_tries_each_router_once(agent: Agent, router: Router, autojump_clock: Any) -> None:
    router.down = {URL, OTHER}
    with pytest.raises(AgentError) as caught:
        await agent.start().enroll_once()
    assert caught.value.exit_code == 69
    assert router.enrolls == 2
    router.down = {URL}
    service = agent.start()
    await service.enroll_once()
    assert (await service.wait_bearer()).router == OTHER
    service.unreachable()
    assert (await service.wait_bearer()).router == URL


async def test_enroll_command_does_nothing_when_the_credential_works(
    agent: Agent, router: Router, autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = await agent.start().enroll_once()
    second = await agent.start().enroll_once()
    assert first.agent_id == second.agent_id
    assert router.enrolls == 1
    assert "already enrolled, nothing to do" in caplog.messages


async def test_run_waits_for_a_router(agent: Agent, router: Router, autojump_clock: Any) -> None:
    router.down = {URL, OTHER}
    service = agent.start()

    async def body() -> None:
        await trio.sleep(3600)
        assert 200 < router.enrolls < 2000
        router.down = set()
        await service.wait_bearer()

    await running(service, body)


async def test_assignment_is_remembered_for_a_start_without_router(
    agent: Agent, router: Router, autojump_clock: Any
) -> None:
    service = agent.start()
    agent_id = (await service.enroll_once()).agent_id
    await trio.sleep(100)
    accepted = await service.assignments.verify_assignment(assignment(router, agent_id, generation=7))
    router.down = {URL, OTHER}
    later = agent.start()
    assert later.assignments.remembered_assignment() == accepted
    with pytest.raises(TokenRefused, match="older"):
        await later.assignments.verify_assignment(assignment(router, agent_id, iat=accepted.iat - 1))
    await later.assignments.forget_assignment()
    assert agent.start().assignments.remembered_assignment() is None
    with pytest.raises(TokenRefused, match="older"):
        await agent.start().assignments.verify_assignment(assignment(router, agent_id, iat=accepted.iat - 1))


async def test_assignment_by_a_new_key_makes_one_refresh(
    agent: Agent, router: Router, stranger: Router, autojump_clock: Any
) -> None:
    service = agent.start()

    async def body() -> None:
        agent_id = (await service.wait_bearer()).agent_id
        await trio.sleep(60)
        router.keys = dataclasses.replace(router.keys, signing=[Ed25519PrivateKey.generate(), *router.keys.signing])
        await service.assignments.verify_assignment(assignment(router, agent_id))
        assert router.refreshes == 1
        await trio.sleep(60)
        stranger.keys = dataclasses.replace(stranger.keys, issuer=router.keys.issuer)
        with pytest.raises(UnknownKid):
            await service.assignments.verify_assignment(assignment(stranger, agent_id))
        assert router.refreshes == 2

    await running(service, body)
