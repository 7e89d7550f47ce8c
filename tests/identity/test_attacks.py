"""What an attacker on the way, at the router's address or with stolen words gets: nothing, and the agent says what it
saw. Forged tokens, key sets and assignments are in test_claims.py, TLS in tests/mesh/test_failures.py.
"""

import json
import logging
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fakes.identity import URL, Agent, Router, running, some_hours
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from xim_agent.errors import AgentError
from xim_agent.identity import jose, refusals, rotation
from xim_agent.identity.claims import TokenRefused
from xim_agent.identity.join_key import JoinKey
from xim_agent.mesh import failures
from xim_agent.outcome import RouterError
from xim_agent.router.tokens import RouterKeys


class Eavesdropper:
    """Keeps every reply of a router, and can give an old one instead of the new one."""

    def __init__(self, router: Router) -> None:
        self.replies: list[dict[str, Any]] = []
        self.instead: dict[str, Any] = {}
        router.tamper = self

    def __call__(self, reply: dict[str, Any]) -> dict[str, Any]:
        self.replies.append(reply)
        return {**reply, **self.instead}


async def refused(agent: Agent) -> TokenRefused:
    before = agent.store.data
    with pytest.raises(TokenRefused) as caught:
        await agent.start().enroll_once()
    assert caught.value.exit_code == 15
    if before is not None:
        assert agent.store.data == before, "nothing of such a reply is kept"
    return caught.value


async def test_replayed_nonce(agent: Agent, router: Router, autojump_clock: Any) -> None:
    """The token of an earlier enrollment of the same agent, recorded and served again."""
    thief = Eavesdropper(router)
    await agent.start().enroll_once()
    router.db.execute("UPDATE agents SET family_revoked = 1")
    thief.instead = {"token": thief.replies[0]["token"]}
    assert "`nonce`" in (await refused(agent)).message


async def test_token_of_another_agent(agent: Agent, router: Router, autojump_clock: Any) -> None:
    thief = Eavesdropper(router)
    other = Agent(router, router.join_key())
    await other.start().enroll_once()
    await other.start().enroll_once()
    await agent.start().enroll_once()
    for stolen in thief.replies[:2]:  # by enrollment and by refresh
        thief.instead = {"token": stolen["token"]}
        assert "`sub`" in (await refused(agent)).message


async def test_whole_reply_to_another_agent(agent: Agent, router: Router, autojump_clock: Any) -> None:
    """Everything in it fits together and is well signed; only the key and the nonce are not this agent's."""
    thief = Eavesdropper(router)
    await Agent(router, router.join_key()).start().enroll_once()
    thief.instead = thief.replies[0]
    assert "`nonce`" in (await refused(agent)).message


async def test_token_bound_to_another_key(agent: Agent, router: Router, autojump_clock: Any) -> None:
    enrolled = await agent.start().enroll_once()
    claims = enrolled.claims(agent.clock.now())
    assert claims is not None
    words = {name: getattr(claims, name) for name in ("agent_id", "worker_id", "project", "region")}
    jkt = jose.thumbprint(Ed25519PrivateKey.generate().public_key())
    token = router.keys.mint_token(**words, tiers=[], jkt=jkt, nonce=None, jti="1", now=agent.clock.now())
    Eavesdropper(router).instead = {"token": token}
    assert "not this agent's key" in (await refused(agent)).message


async def test_router_with_keys_of_its_own_at_the_same_address(
    agent: Agent, router: Router, stranger: Router, autojump_clock: Any
) -> None:
    """As an interceptor would be whose TLS is trusted, or with --insecure: the join key's pin is what counts."""
    forged = RouterKeys(URL, stranger.keys.root, stranger.keys.signing)
    router.keys = forged
    error = await refused(agent)
    assert (error.code, "thumbprint" in error.message) == ("pin_mismatch", True)
    state = agent.store.load()
    assert state is not None
    assert state.enrollment is None


async def test_stolen_refresh_token_is_of_no_use_without_the_key(
    agent: Agent, router: Router, autojump_clock: Any
) -> None:
    enrolled = await agent.start().enroll_once()
    agent.join_key = None
    thief = Agent(router)
    state = agent.store.load()
    assert state is not None
    own = jose.private_text(Ed25519PrivateKey.generate())
    await thief.store.save(structs.replace(state, key=own))
    with pytest.raises(AgentError) as caught:
        await thief.start().enroll_once()
    assert caught.value.code == "dpop_invalid"
    assert (await agent.start().enroll_once()).agent_id == enrolled.agent_id, "and costs its owner nothing"


async def test_reuse_revokes_the_family_and_the_agent_says_what_happened(
    agent: Agent, router: Router, autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """State and key are stolen together. Whoever of the two comes later with an old token ends it for both."""
    await agent.start().enroll_once()
    agent.join_key = None
    copy = Agent(router)
    copy.store.data = agent.store.data
    for _ in range(3):
        await agent.start().enroll_once()
    with pytest.raises(AgentError) as caught:
        await copy.start().enroll_once()
    assert (caught.value.code, caught.value.exit_code) == ("credential_reused", 11)
    assert "a copy of its state or a thief" in caught.value.message
    with pytest.raises(AgentError) as caught:
        await running(agent.start(), some_hours)
    assert (caught.value.code, caught.value.exit_code) == ("credential_revoked", 11)
    assert "remove the copy" in caught.value.hint
    assert agent.store.data is not None, "kept: the operator may want to look at it"


async def test_no_refusal_makes_the_agent_call_again_and_again(
    agent: Agent, router: Router, autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A router that answers everything with refusals of the retry class is called less and less often."""
    caplog.set_level(logging.CRITICAL)
    await agent.start().enroll_once()
    router.keys = RouterKeys(URL, Ed25519PrivateKey.generate(), router.keys.signing)
    before = router.refreshes
    await running(agent.start(), some_hours)
    assert router.enrolls == 1
    assert router.refreshes - before < 4 * 3600 / 10, "backoff reaches 30 s, half of that on average"


# -- whatever the router says --

WORDS = st.text(max_size=60) | st.sampled_from(["code", "detail", "protocols", "called", "expected", "title"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=80),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=8,
)
CODES = st.sampled_from(["dpop_url", "dpop_invalid", "protocol_unsupported", "join_key_invalid", "credential_reused"])
PROBLEMS = st.dictionaries(WORDS, JSON, max_size=5) | st.builds(
    lambda code, rest: {**rest, "code": code}, CODES, st.dictionaries(WORDS, JSON, max_size=5)
)
BODIES = st.binary(max_size=200) | PROBLEMS.map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass"))
HEADERS = st.dictionaries(
    st.sampled_from(["date", "retry-after", "location"]),
    st.text(st.characters(max_codepoint=0x2FF), max_size=60)
    | st.sampled_from(["Thu, 01 Jan 1970 00:00:00 -0000", "Mon, 99 Xxx 2026 99:99:99 GMT", "9" * 400, "http://[::1"]),
)


@given(st.integers(300, 599), HEADERS, BODIES)
def test_any_problem_has_a_name_and_fits_a_screen(status: int, headers: dict[str, str], body: bytes) -> None:
    error = failures.from_reply("POST https://r.example/v1/enroll", status, headers, body, 1e9)
    shown = refusals.explain(error)
    for text in (error.message, shown.message, shown.hint):
        assert text.isprintable()
        assert len(text) < 1500
    assert error.retry_after is None or error.retry_after >= 0
    assert shown.hint
    assert shown.exit_code in (10, 11, 12, 13, 14, 69, 78)


KEY = JoinKey.make("demo", ("https://r.example",), jose.b64u(b"p" * 32), b"s" * 32).text


@given(st.integers(0, len(KEY) - 1), st.text(max_size=3), st.integers(0, 3))
def test_join_key_with_a_piece_changed_is_refused_by_name_or_still_one(at: int, inserted: str, removed: int) -> None:
    error = refusal_of(KEY[:at] + inserted + KEY[at + removed :])
    if error is not None:
        assert (error.exit_code, error.message.isprintable()) == (78, True)
        assert jose.b64u(b"s" * 32) not in error.message


def refusal_of(key: str) -> AgentError | None:
    try:
        JoinKey.parse(key)
    except AgentError as error:
        return error
    return None


@given(JSON)
def test_join_key_with_any_payload_is_refused_by_name(payload: Any) -> None:
    text = "xjk_demo_" + jose.b64u(json.dumps(payload).encode("utf-8", "surrogatepass"))
    with pytest.raises(AgentError):
        JoinKey.parse(text)


@given(st.dictionaries(st.sampled_from(["agent_id", "token", "keys", "root", "issuer", "refresh_token"]), JSON))
def test_any_reply_is_refused_by_name(changed: dict[str, Any]) -> None:
    """A reply of the right shape with parts that are anything."""
    texts = dict.fromkeys(("agent_id", "worker_id", "project", "region", "token", "refresh_token", "issuer"), "x")
    reply = {**texts, "keys": "a.b.c", "root": {}, **changed}
    with pytest.raises(TokenRefused):
        rotation.enrolled(reply, join_key=JoinKey.parse(KEY), nonce="n", jkt="j", now=0.0)


def test_error_of_another_kind_is_not_swallowed() -> None:
    error = RouterError("http_418", "a teapot", status=418)
    assert refusals.explain(error).exit_code == 78
