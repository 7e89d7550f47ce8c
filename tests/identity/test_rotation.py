"""The router's signing keys rotate: agents follow through the key set that the root key signs, and enroll once only."""

import sqlite3
from typing import Any

import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fakes.identity import URL, Agent, Router, assignment, running, until
from msgspec import structs

from xim_agent.errors import AgentError
from xim_agent.identity import jose
from xim_agent.identity.claims import TokenRefused
from xim_agent.outcome import Action, RouterError
from xim_agent.router import enrollment, keyring
from xim_agent.router.tokens import RouterKeys


async def test_running_agent_follows_every_rotation(agent: Agent, router: Router, autojump_clock: Any) -> None:
    service = agent.start()

    async def body() -> None:
        for rotations in range(1, 6):
            token = (await service.wait_bearer()).token
            router.rotate()
            assert router.accepts(token), "what was signed before goes on"
            await until(lambda done=rotations: service.statistics().refreshes == done)
            assert router.accepts((await service.wait_bearer()).token)
            await service.assignments.verify_assignment(
                assignment(router, service.statistics().agent_id, generation=rotations)
            )

    await running(service, body)
    assert (router.enrolls, agent.codes) == (1, set())
    assert len(router.keys.signing) == keyring.KEEP + 1


async def test_compromised_key_is_out_at_once_and_agents_follow(
    agent: Agent, router: Router, autojump_clock: Any
) -> None:
    service = agent.start()

    async def body() -> None:
        token = (await service.wait_bearer()).token
        router.rotate(keep=0)
        assert not router.accepts(token)
        await service.refused(token)  # what the client does after a 401
        assert router.accepts((await service.wait_bearer()).token)

    await running(service, body)
    assert (router.enrolls, router.refreshes, len(router.keys.signing)) == (1, 1, 1)


@pytest.mark.parametrize("rotations", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("hours", [0.1, 200])
async def test_agent_that_was_off_meanwhile_comes_back(
    agent: Agent, router: Router, autojump_clock: Any, rotations: int, hours: float
) -> None:
    await agent.start().enroll_once()
    agent.join_key = None
    for _ in range(rotations):
        router.rotate()
    await trio.sleep(hours * 3600)
    service = agent.start()

    async def body() -> None:
        bearer = await service.wait_bearer()
        if not router.accepts(bearer.token):
            await service.refused(bearer.token)
        assert router.accepts((await service.wait_bearer()).token)

    await running(service, body)
    assert router.enrolls == 1


async def test_two_rotations_in_a_moment_with_an_assignment_each(
    agent: Agent, router: Router, autojump_clock: Any
) -> None:
    """The second one waits for its refresh, as refreshes on demand are 10 s apart; it is not refused."""
    service = agent.start()

    async def body() -> None:
        agent_id = (await service.wait_bearer()).agent_id
        await trio.sleep(60)
        for generation in (1, 2):
            router.rotate(keep=0)
            accepted = await service.assignments.verify_assignment(assignment(router, agent_id, generation=generation))
            assert accepted.generation == generation

    await running(service, body)


async def test_unknown_key_while_no_router_answers_is_tried_again(
    agent: Agent, router: Router, autojump_clock: Any
) -> None:
    service = agent.start()

    async def body() -> None:
        agent_id = (await service.wait_bearer()).agent_id
        router.rotate(keep=0)
        jws = assignment(router, agent_id)
        router.down = set(router.urls)
        with pytest.raises(RouterError) as caught:
            await service.assignments.verify_assignment(jws)
        assert (caught.value.action, caught.value.code) == (Action.RETRY, "assignment_unknown_key")
        router.down = set()
        await trio.sleep(60)
        await service.assignments.verify_assignment(jws)

    await running(service, body)


async def test_assignment_whose_key_is_rotated_out_is_fetched_again(
    agent: Agent, router: Router, autojump_clock: Any
) -> None:
    """Or the agent would not start its engine after a reboot during an outage."""
    service = agent.start()
    outdated: list[float] = []
    service.outdated = lambda: outdated.append(trio.current_time())

    async def body() -> None:
        agent_id = (await service.wait_bearer()).agent_id
        await service.assignments.verify_assignment(assignment(router, agent_id))
        for done in range(1, keyring.KEEP + 1):
            router.rotate()
            await until(lambda done=done: service.statistics().refreshes == done)
            assert service.assignments.remembered_assignment() is not None
        assert not outdated
        router.rotate()
        await until(lambda: outdated)
        await service.assignments.verify_assignment(assignment(router, agent_id))

    await running(service, body)
    assert agent.start().assignments.remembered_assignment() is not None


async def test_set_signed_by_a_stranger_is_refused_at_a_rotation(
    agent: Agent, router: Router, stranger: Router, autojump_clock: Any
) -> None:
    await agent.start().enroll_once()
    agent.join_key = None
    before = agent.store.data
    router.rotate()
    # The stranger has taken over the address and knows everything but the root's private key.
    keys = router.keys
    router.keys = RouterKeys(keys.issuer, stranger.keys.root, keys.signing)
    with pytest.raises(TokenRefused, match="root key"):
        await agent.start().enroll_once()
    assert agent.store.data == before


async def test_set_does_not_grow_older_when_the_clock_is_set_back(
    agent: Agent, router: Router, autojump_clock: Any
) -> None:
    await agent.start().enroll_once()
    agent.join_key = None
    for offset in (-86400.0, -2 * 86400.0):
        router.clock.offset = agent.clock.offset = offset
        router.rotate()
        await agent.start().enroll_once()
    assert router.enrolls == 1


async def test_older_set_is_refused(agent: Agent, router: Router, autojump_clock: Any) -> None:
    """One that names a key which was taken out for a reason."""
    await agent.start().enroll_once()
    stolen, before = router.keys, int(router.clock.now())
    await trio.sleep(2)
    router.rotate(keep=0)
    await agent.start().enroll_once()
    good = agent.store.data
    router.tamper = lambda reply: {**reply, "keys": stolen.key_set(before)}
    with pytest.raises(TokenRefused, match="older"):
        await agent.start().enroll_once()
    assert agent.store.data == good


def test_only_two_older_keys_stay(router: Router) -> None:
    seen = [router.keys.signing[0]]
    for number in range(4):
        keyring.rotate(router.db, float(number))  # a clock that stands far behind the first key's
        keys = keyring.open_keys(router.db, "http://x", 0.0)
        seen.insert(0, keys.signing[0])
        assert [k.private_bytes_raw() for k in keys.signing] == [k.private_bytes_raw() for k in seen[:3]]
        assert keys.pin() == router.keys.pin()


async def test_revoked_credential_ends_tokens_too(agent: Agent, router: Router, autojump_clock: Any) -> None:
    enrolled = await agent.start().enroll_once()
    assert router.accepts(enrolled.token)
    router.db.execute("UPDATE agents SET family_revoked = 1")
    assert not router.accepts(enrolled.token)
    again = await agent.start().enroll_once()
    assert router.accepts(again.token)
    assert not router.accepts(enrolled.token), "a stolen token must not come back to life"
    assert enrollment.standing(router.db, again.agent_id) == "enrolled"


async def test_state_of_one_agent_is_of_no_use_to_another(agent: Agent, router: Router, autojump_clock: Any) -> None:
    """A thief's own agent with stolen tokens in its state: the key is missing."""
    stolen = await agent.start().enroll_once()
    thief = Agent(router, router.join_key())
    await thief.start().enroll_once()
    state = thief.store.load()
    assert state is not None
    assert state.enrollment is not None
    forged = structs.replace(state.enrollment, current=stolen.current, previous=None, agent_id=stolen.agent_id)
    await thief.store.save(structs.replace(state, enrollment=forged))
    thief.join_key = None
    with pytest.raises(AgentError) as caught:
        await thief.start().enroll_once()
    assert caught.value.code == "dpop_invalid"
    agent.join_key = None
    assert (await agent.start().enroll_once()).agent_id == stolen.agent_id


class Backup:
    """The router's database as it is now, to be put back later."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.copy = sqlite3.connect(":memory:")
        router.db.backup(self.copy)

    def restore(self) -> None:
        self.copy.backup(self.router.db)
        self.copy.close()
        self.router.keys = keyring.open_keys(self.router.db, URL, self.router.clock.now())


@pytest.mark.parametrize("refreshes", [0, 1, 2, 40])
@pytest.mark.parametrize("rotated", [False, True])
async def test_router_put_back_to_an_older_state_strands_nobody(
    agent: Agent, router: Router, autojump_clock: Any, refreshes: int, rotated: bool
) -> None:
    """Neither by refresh tokens that it does not remember nor by a key set that is older than the agent's."""
    await agent.start().enroll_once()
    agent.join_key = None
    backup = Backup(router)
    if rotated:
        router.rotate(keep=0)
    for _ in range(refreshes):
        await trio.sleep(1800)
        await agent.start().enroll_once()
    backup.restore()
    await trio.sleep(2)
    for _ in range(3):
        await agent.start().enroll_once()
    state = agent.store.load()
    assert state is not None
    assert state.enrollment is not None
    assert router.accepts(state.enrollment.token)
    assert router.enrolls == 1


async def test_token_of_the_future_needs_the_key_of_its_agent(
    agent: Agent, router: Router, autojump_clock: Any
) -> None:
    await agent.start().enroll_once()
    agent.join_key = None
    backup = Backup(router)
    for _ in range(3):
        await agent.start().enroll_once()
    backup.restore()
    thief = Agent(router)
    state = agent.store.load()
    assert state is not None
    await thief.store.save(structs.replace(state, key=jose.private_text(Ed25519PrivateKey.generate())))
    with pytest.raises(AgentError) as caught:
        await thief.start().enroll_once()
    assert caught.value.exit_code == 11
    await agent.start().enroll_once()


async def test_life_without_end_is_renewed_once_a_day(agent: Agent, router: Router, autojump_clock: Any) -> None:
    enrolled = await agent.start().enroll_once()
    found = enrolled.claims(agent.clock.now())
    assert found is not None
    words = {name: getattr(found, name) for name in ("agent_id", "worker_id", "project", "region", "jkt")}

    def forever(reply: dict[str, Any]) -> dict[str, Any]:
        now = router.clock.now()
        token = router.keys.mint_token(**words, tiers=[], nonce=None, jti="1.x", now=now, life=10**10)
        return {**reply, "token": token}

    router.tamper = forever
    service = agent.start()

    async def body() -> None:
        await until(lambda: service.statistics().refreshes == 1)
        began = trio.current_time()
        await until(lambda: service.statistics().refreshes > 1, every=60)
        assert trio.current_time() - began == pytest.approx(43200, abs=61)

    await running(service, body)
