"""Whether the agent can say who it is, and to which routers. Pure."""

from collections.abc import Sequence
from datetime import UTC, datetime

from xim_agent.doctor.report import Finding, failure, ok, warning
from xim_agent.errors import AgentError, Exit
from xim_agent.identity.claims import TokenRefused, verify_token
from xim_agent.identity.join_key import JoinKey
from xim_agent.identity.rotation import Enrollment, State

SET_KEY = "set XEROTIER_AGENT_JOIN_KEY or XEROTIER_AGENT_JOIN_KEY_FILE"
Key = JoinKey | AgentError | None


def credential(state: State | None, key: Key, now: float) -> Finding:
    """`key`: the join key given, or why it cannot be used. `now`: Unix seconds. No secret is in what is said."""
    if state is not None and state.enrollment is not None:
        text = f"enrolled as {state.enrollment.agent_id}; {_expiry(state.enrollment, now)}"
        if isinstance(key, AgentError):  # it is of no matter until the credential is revoked
            return warning("credential", f"{text}; but {key.message}", key.hint or "remove the join key")
        return ok("credential", text)
    if isinstance(key, AgentError):
        return failure("credential", key.message, key.hint or SET_KEY, key.exit_code)
    if key is None:
        return failure("credential", "this agent is not enrolled and has no join key", SET_KEY, Exit.CONFIG)
    where = ", ".join(key.routers)
    return ok("credential", f"not enrolled yet; a join key for {where} is given, whose expiry the router alone knows")


def _expiry(enrollment: Enrollment, now: float) -> str:
    """Tokens live for minutes: where no agent has run for longer, an expired one is as it should be."""
    keys = enrollment.key_set().keys
    try:
        found = verify_token(enrollment.token, keys=keys, issuer=enrollment.issuer, now=now)
    except TokenRefused as error:
        return f"its token is refreshed at the start ({error.reason})"
    return f"its token is valid until {datetime.fromtimestamp(found.exp, UTC):%Y-%m-%d %H:%M:%S} UTC"


def routers(given: str | None, state: State | None, key: Key) -> Sequence[str]:
    """Where a start would call: `given` (ROUTER_URL), else the credential's, else the join key's."""
    if given:
        return (given,)
    if state is not None and state.enrollment is not None:
        return state.enrollment.routers
    return key.routers if isinstance(key, JoinKey) else ()
