import json

import pytest
import trio
from fakes.identity import EPOCH, OTHER, URL, Agent, opened
from msgspec import structs
from trio.testing import MockClock

from xim_agent.doctor.identity import credential, routers
from xim_agent.errors import AgentError, Exit
from xim_agent.identity.claims import LEEWAY
from xim_agent.identity.join_key import JoinKey
from xim_agent.identity.rotation import State

BROKEN = AgentError("join_key_malformed", "the join key is malformed: it is cut", hint="copy it", exit_code=Exit.CONFIG)


@pytest.fixture(scope="module")
def enrolled(tmp_path_factory: pytest.TempPathFactory) -> tuple[State, JoinKey]:
    """What a real enrollment leaves on the disk, and the key that it took."""

    async def enroll(agent: Agent) -> State:
        async with trio.open_nursery() as nursery:
            service = agent.start()
            nursery.start_soon(service.run)
            await service.wait_bearer()
            nursery.cancel_scope.cancel()
        state = agent.store.load()
        assert state is not None
        return state

    with opened(tmp_path_factory.mktemp("router")) as router:
        key = router.join_key()
        return trio.run(enroll, Agent(router, key), clock=MockClock(autojump_threshold=0)), key


def test_an_enrolled_agent_needs_no_key(enrolled: tuple[State, JoinKey]) -> None:
    state, key = enrolled
    for given in (None, key):
        found = credential(state, given, EPOCH + 5)
        assert (found.status, found.exit_code) == ("ok", 0)
        assert state.enrollment
        assert found.text.startswith(f"enrolled as {state.enrollment.agent_id}; its token is valid until 2023-11-14 ")
    assert key.text not in credential(state, key, EPOCH).text


def test_an_expired_token_is_no_fault(enrolled: tuple[State, JoinKey]) -> None:
    found = credential(enrolled[0], None, EPOCH + 10**6)
    assert found.status == "ok"
    assert "refreshed at the start (it expired 9" in found.text
    assert "valid only in" in credential(enrolled[0], None, EPOCH - LEEWAY - 10).text


def test_a_stale_key_beside_a_credential_is_a_warning(enrolled: tuple[State, JoinKey]) -> None:
    found = credential(enrolled[0], BROKEN, EPOCH)
    assert (found.status, found.exit_code, found.cure) == ("warning", 0, "copy it")
    assert "but the join key is malformed" in found.text


def test_a_key_will_do_for_the_first_start(enrolled: tuple[State, JoinKey]) -> None:
    state, key = enrolled
    for nothing in (None, structs.replace(state, enrollment=None)):
        found = credential(nothing, key, EPOCH)
        assert found.status == "ok"
        assert f"a join key for {URL}, {OTHER} is given" in found.text
        assert key.text not in json.dumps(found.text)


def test_neither_credential_nor_key() -> None:
    found = credential(None, None, EPOCH)
    assert (found.status, found.exit_code) == ("failure", Exit.CONFIG)
    assert "XEROTIER_AGENT_JOIN_KEY_FILE" in found.cure
    found = credential(None, BROKEN, EPOCH)
    assert (found.status, found.exit_code, found.cure) == ("failure", Exit.CONFIG, "copy it")


def test_where_it_would_call(enrolled: tuple[State, JoinKey]) -> None:
    state, key = enrolled
    assert routers("https://mine", state, key) == ("https://mine",)
    assert routers(None, state, None) == (URL, OTHER)
    assert routers(None, None, key) == (URL, OTHER)
    assert routers(None, structs.replace(state, enrollment=None), key) == (URL, OTHER)
    assert routers(None, None, BROKEN) == routers(None, None, None) == ()
