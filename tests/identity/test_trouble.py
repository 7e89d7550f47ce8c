"""What a failed attempt leaves behind: how long to wait, what people see, and whose clock it is."""

import itertools
from typing import Any

import pytest
import trio
import trio.testing
from fakes.identity import OTHER, URL, Agent, Router, assignment, running, until

from xim_agent.errors import AgentError
from xim_agent.health import Health
from xim_agent.identity import refusals
from xim_agent.identity.claims import TokenRefused
from xim_agent.identity.trouble import Trouble
from xim_agent.outcome import RouterError

AWAY = RouterError("connection_refused", "nobody is there")
PROOF = RouterError("dpop_invalid", "`iat` differs", status=400)
TIMES = TokenRefused("token_time", "token", "it expired", clock=True)


@pytest.fixture
def health() -> Health:
    return Health(now=lambda: 0.0)


@pytest.mark.parametrize(
    ("error", "skew", "code"),
    [
        (AWAY, 500.0, "identity_failing"),
        (TIMES, 500.0, "clock_off"),
        (TokenRefused("token_refused", "token", "`sub`"), 500.0, "identity_failing"),
        (PROOF, 500.0, "clock_off"),
        (PROOF, -31.0, "clock_off"),
        (PROOF, 29.0, "identity_failing"),
        (PROOF, None, "identity_failing"),
    ],
)
def test_one_condition_at_a_time(health: Health, error: AgentError, skew: float | None, code: str) -> None:
    async def story() -> None:
        trouble = Trouble(health)
        for before in (AWAY, TIMES):
            trouble.note(before, "refresh", 500.0, 0.5)
            trouble.note(error, "refresh", skew, 0.5)
            assert [c.code for c in health.conditions()] == [code]
        trouble.over()
        assert health.conditions() == []
        await trio.lowlevel.checkpoint()

    trio.run(story)


async def test_waits_grow_until_an_attempt_succeeds(health: Health, autojump_clock: Any) -> None:
    trouble = Trouble(health)
    waits = [trouble.note(AWAY, "refresh", None, 1.0) for _ in range(7)]
    assert waits == [1, 2, 4, 8, 16, 30, 30]
    assert trouble.failures == {"connection_refused": 7}
    trouble.over()
    assert trouble.note(PROOF, "refresh", None, 1.0) == 1
    assert trouble.failures == {"connection_refused": 7, "dpop_invalid": 1}


async def test_only_a_router_can_ask_not_to_be_called(health: Health, autojump_clock: Any) -> None:
    trouble = Trouble(health)
    trouble.note(AWAY, "refresh", None, 1.0)
    assert trouble.not_before <= trio.current_time()
    busy = RouterError("http_503", "later", status=503, retry_after=90.0)
    assert trouble.note(busy, "refresh", None, 1.0) == 90
    assert trouble.not_before == trio.current_time() + 90


async def test_nobody_makes_the_agent_call_a_router_before_it_wishes(
    agent: Agent, router: Router, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = agent.start()
    calls: list[float] = []

    async def busy(*call: Any) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        calls.append(trio.current_time())
        raise RouterError("http_503", "later", status=503, retry_after=200.0)

    async def body() -> None:
        token = (await service.wait_bearer()).token
        await trio.sleep(60)
        monkeypatch.setattr(router, "refresh", busy)
        for _ in range(19):
            await service.refused(token)
            await trio.sleep(10)
        assert len(calls) == 2, "one round over both routers"
        await trio.sleep(200)
        assert len(calls) == 4

    await running(service, body)


async def test_refreshes_on_demand_are_ten_seconds_apart_whoever_asks(
    agent: Agent, router: Router, autojump_clock: Any
) -> None:
    service = agent.start()

    async def body() -> None:
        agent_id = (await service.wait_bearer()).agent_id
        await trio.sleep(60)
        times = []
        for generation in range(1, 5):
            router.rotate(keep=0)
            await service.assignments.verify_assignment(assignment(router, agent_id, generation=generation))
            times.append(trio.current_time())
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert min(gaps) == pytest.approx(10, abs=0.1)

    await running(service, body)


async def test_token_of_the_last_run_is_used_for_what_is_left_of_it(
    agent: Agent, router: Router, autojump_clock: Any
) -> None:
    await agent.start().enroll_once()
    await trio.sleep(3000)
    router.down = {URL, OTHER}
    service = agent.start()

    async def body() -> None:
        await service.wait_bearer()
        await trio.sleep(590)
        await service.wait_bearer()
        await trio.sleep(20)
        with trio.move_on_after(60) as scope:
            await service.wait_bearer()
        assert scope.cancelled_caught, "it ended 3600 s after it was given out"

    await running(service, body)


async def test_assignment_outlives_refreshes_and_goes_with_the_agent(
    agent: Agent, router: Router, autojump_clock: Any
) -> None:
    service = agent.start()

    async def body() -> None:
        agent_id = (await service.wait_bearer()).agent_id
        await service.assignments.verify_assignment(assignment(router, agent_id))
        await until(lambda: service.statistics().refreshes)
        assert service.assignments.remembered_assignment() is not None

    await running(service, body)
    router.db.execute("UPDATE agents SET family_revoked = 1")
    agent.join_key = router.join_key()  # another key: the router makes another agent of it
    await agent.start().enroll_once()
    state = agent.store.load()
    assert state is not None
    assert state.enrollment is not None
    assert (state.enrollment.assignment, state.enrollment.assignment_iat) == (None, 0)


# -- whose clock it is --


@pytest.mark.parametrize(
    ("skew", "words", "hint"),
    [
        (300.4, "this machine's clock is 300 s behind the router's", "timedatectl"),
        (-31.0, "this machine's clock is 31 s ahead of the router's", "timedatectl"),
        (30.0, "it is the router that signs wrong times", "the router's operator"),
        (0.0, "it is the router that signs wrong times", "the router's operator"),
        (None, "has no Date", "timedatectl"),
    ],
)
def test_wrong_times_are_measured(skew: float | None, words: str, hint: str) -> None:
    error = refusals.wrong_times(TIMES, skew)
    assert (error.code, error.clock, error.exit_code) == ("token_time", True, 15)
    assert error.message.startswith("the router's token was refused: it expired; ")
    assert words in error.message
    assert hint in error.hint


@pytest.mark.parametrize(("skew", "named"), [(45.0, True), (-45.0, True), (10.0, False), (None, False)])
def test_refused_proof_is_the_clocks_fault_only_when_it_is(skew: float | None, named: bool) -> None:
    shown = refusals.explain(RouterError("dpop_invalid", "the proof", status=400, date_skew=skew))
    assert ("this machine's clock is 45 s" in shown.message) is named
    assert ("timedatectl" in shown.hint) is named


async def test_clock_is_named_where_a_token_was_refused_for_it(
    agent: Agent, router: Router, autojump_clock: Any
) -> None:
    router.clock.offset = 300
    with pytest.raises(TokenRefused) as caught:
        await agent.start().enroll_once()
    assert "this machine's clock is 300 s behind the router's" in caught.value.message
    router.clock.offset = 0
    await agent.start().enroll_once()
    router.clock.offset = 300
    with pytest.raises(TokenRefused) as caught:
        await agent.start().enroll_once()  # a refresh
    assert "this machine's clock is 300 s behind the router's" in caught.value.message


def test_limited_address_is_told_to_wait() -> None:
    error = RouterError("rate_limited", "429", status=429, retry_after=42.0)
    assert "wait 42 s" in refusals.explain(error).hint
    assert "wait a minute" in refusals.explain(RouterError("rate_limited", "429", status=429)).hint


async def test_what_a_person_must_change_is_shown_before_what_may_pass(
    agent: Agent, router: Router, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two routers one is called by a wrong URL and the other is away."""

    async def answer(at: str, *call: Any) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        if at == URL:
            raise RouterError("dpop_url", "wrong", status=400, problem={"called": at, "expected": "x"})
        raise AWAY

    monkeypatch.setattr(router, "enroll", answer)
    with pytest.raises(AgentError) as caught:
        await agent.start().enroll_once()
    assert caught.value.code == "dpop_url"
