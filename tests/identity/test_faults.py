"""Lost replies, full disks, crashes: no sequence of them strands the agent."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from fakes.identity import OTHER, URL, Agent, Router, assignment, opened, running, some_hours, until
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from xim_agent.errors import AgentError
from xim_agent.identity.rotation import State


async def test_stored_token_serves_while_the_router_is_away(agent: Agent, router: Router, autojump_clock: Any) -> None:
    await agent.start().enroll_once()
    router.down = {URL, OTHER}
    agent.join_key = None
    service = agent.start()

    async def body() -> None:
        await service.wait_bearer()
        await trio.sleep(1000)
        assert agent.codes == {"identity_failing"}
        with trio.move_on_after(4000) as scope:
            await trio.sleep(3600)
            await service.wait_bearer()  # expired now, and none can be had
        assert scope.cancelled_caught
        router.down = set()
        await service.wait_bearer()
        assert not agent.codes

    await running(service, body)


async def test_lost_enroll_reply_spends_one_use(agent: Agent, router: Router, autojump_clock: Any) -> None:
    router.lose = 5
    service = agent.start()

    async def body() -> None:
        await service.wait_bearer()

    await running(service, body)
    assert router.one("SELECT count(*) FROM agents") == 1
    assert router.one("SELECT uses_left FROM join_keys") == 0


async def test_lost_refresh_reply_gives_the_same_successor_again(
    agent: Agent, router: Router, autojump_clock: Any
) -> None:
    await agent.start().enroll_once()
    agent.join_key = None
    router.lose = 3
    service = agent.start()

    async def body() -> None:
        await until(lambda: service.statistics().refreshes)

    await running(service, body)
    assert router.one("SELECT used FROM agents") == 1
    assert router.one("SELECT count(*) FROM refresh_tokens") == 2


async def test_disk_full_after_the_router_committed(agent: Agent, router: Router, autojump_clock: Any) -> None:
    await agent.start().enroll_once()
    agent.join_key = None
    service = agent.start()
    before = agent.store.data

    async def body() -> None:
        agent.store.fail = True
        await trio.sleep(60)
        assert agent.codes == {"identity_failing"}
        assert agent.store.data == before
        assert router.one("SELECT used FROM agents") == 1, "a token that is not on disk must not be used"
        agent.store.fail = False
        await trio.sleep(60)
        assert not agent.codes
        assert agent.store.data != before

    await running(service, body)


async def test_disk_full_for_longer_than_the_token_lives(agent: Agent, router: Router, autojump_clock: Any) -> None:
    await agent.start().enroll_once()
    service = agent.start()

    async def body() -> None:
        agent.store.fail = True
        await some_hours()
        assert agent.codes == {"identity_failing"}
        router.db.execute("UPDATE agents SET family_revoked = 1")
        await trio.sleep(600)  # enrolling again meets the same disk
        agent.store.fail = False
        await service.wait_bearer()
        assert not agent.codes

    await running(service, body)


async def test_disk_full_at_the_first_start_ends_it(agent: Agent, autojump_clock: Any) -> None:
    agent.store.fail = True
    with pytest.raises(AgentError) as caught:
        await running(agent.start(), some_hours)
    assert caught.value.exit_code == 77


async def test_assignment_is_good_though_it_cannot_be_remembered(
    agent: Agent, router: Router, autojump_clock: Any
) -> None:
    service = agent.start()
    agent_id = (await service.enroll_once()).agent_id
    agent.store.fail = True
    await service.assignments.verify_assignment(assignment(router, agent_id))
    assert agent.start().assignments.remembered_assignment() is None


def _with_tokens(state: State, **tokens: str | None) -> State:
    assert state.enrollment is not None
    return structs.replace(state, enrollment=structs.replace(state.enrollment, **tokens))


async def test_previous_token_is_tried_when_the_newest_is_refused(
    agent: Agent, router: Router, autojump_clock: Any
) -> None:
    enrollment = await agent.start().enroll_once()
    agent.join_key = None
    state = agent.store.load()
    assert state is not None
    await agent.store.save(_with_tokens(state, current="xrt_lost", previous=enrollment.current))
    await agent.start().enroll_once()
    after = agent.store.load()
    assert after is not None
    assert after.enrollment is not None
    assert after.enrollment.previous == enrollment.current
    assert after.enrollment.current not in ("xrt_lost", enrollment.current)


FAULTS = ("ok", "down", "lost", "disk", "crash after commit", "wait")


@given(faults=st.lists(st.sampled_from(FAULTS), max_size=25))
@settings(max_examples=40, deadline=None)
def test_no_run_of_faults_strands_the_agent(faults: list[str]) -> None:
    """After any faults at any step the next start authenticates with its stored credential alone."""

    async def story(directory: str) -> None:
        with opened(Path(directory)) as router:
            agent = Agent(router, router.join_key())
            enrolled = await agent.start().enroll_once()
            agent.join_key = None
            for fault in faults:
                router.down = {URL, OTHER} if fault == "down" else set()
                router.lose = 2 if fault == "lost" else 0
                agent.store.fail = fault == "disk"
                if fault == "crash after commit":
                    router.tamper = crash
                try:
                    await agent.start().enroll_once()
                except (AgentError, Crash):
                    assert fault not in ("ok", "wait")
                router.tamper = lambda reply: reply
                await trio.sleep(2000 if fault == "wait" else 1)
            router.down, router.lose, agent.store.fail = set(), 0, False
            assert (await agent.start().enroll_once()).agent_id == enrolled.agent_id
            assert router.enrolls == 1

    with tempfile.TemporaryDirectory() as directory:
        trio.run(story, directory, clock=trio.testing.MockClock(autojump_threshold=0))


class Crash(BaseException):
    pass


def crash(reply: dict[str, Any]) -> dict[str, Any]:
    raise Crash
