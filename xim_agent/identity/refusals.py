"""What a person reads when an identity was refused: one message and one next step per cause (wire-protocol §2)."""

from pathlib import Path

from xim_agent import PROTOCOL
from xim_agent.errors import AgentError, Exit
from xim_agent.identity.claims import TokenRefused
from xim_agent.outcome import NOT_A_ROUTER, SKEW_SECONDS, Action, RouterError
from xim_agent.text import printable

SET_CLOCK = "set this machine's clock: start chrony or ntpd, see `timedatectl`"

_NEW_KEY = "create a new join key at the router and set XEROTIER_AGENT_JOIN_KEY"
_JOIN_KEY = {
    "join_key_invalid": (
        "the router does not know the join key",
        "check that the whole key was copied, and the router",
    ),
    "join_key_expired": ("the join key has expired", _NEW_KEY),
    "join_key_revoked": ("the join key was revoked", f"ask who revoked it; then {_NEW_KEY}"),
    "join_key_used_up": ("the join key has no use left", f"{_NEW_KEY}, with more uses if it is for several agents"),
}
# After these the same call can succeed later without anybody changing the agent's configuration or state.
TRANSIENT = frozenset({Action.RETRY, Action.REFRESH, Action.CLOCK, Action.WAIT, Action.FINAL})


def explain(error: RouterError) -> AgentError:
    """The error to end the process with, or to show as a health condition."""
    if error.code in _JOIN_KEY:
        message, hint = _JOIN_KEY[error.code]
        return AgentError(error.code, message, hint=hint, exit_code=Exit.JOIN_KEY_REFUSED)
    if error.code == "rate_limited":
        wait = f"{error.retry_after:.0f} s" if error.retry_after is not None else "a minute"
        hint = f"check the join key, and wait {wait}: the router does not listen to this address for so long"
        return AgentError(error.code, error.message, hint=hint, exit_code=Exit.NO_ROUTER)
    if error.action is Action.PROTOCOL:
        theirs = _said(error, "protocols")
        message = f"this agent speaks protocol {PROTOCOL}, the router {theirs}"
        hint = "install the version of the agent that fits the router"
        return AgentError(error.code, message, hint=hint, exit_code=Exit.PROTOCOL)
    if error.code == "dpop_url":
        called, expected = _said(error, "called"), _said(error, "expected")
        message = f"the agent called {called}, the router knows itself as {expected}"
        hint = "set XEROTIER_AGENT_ROUTER_URL to the router's public URL, or add the called one to --public-url"
        return AgentError(error.code, message, hint=hint, exit_code=Exit.CONFIG)
    if error.action is Action.CLOCK and clock_is_off(error.date_skew):
        message = f"{error.message}; {clock_text(error.date_skew)}"
        return AgentError(error.code, message, hint=SET_CLOCK, exit_code=Exit.NO_ROUTER)
    if error.action is Action.FINAL:
        return AgentError(error.code, error.message, hint=error.hint or NOT_A_ROUTER, exit_code=Exit.CONFIG)
    code = Exit.NO_ROUTER if error.action in TRANSIENT else error.exit_code
    return AgentError(error.code, error.message, hint=error.hint or _next_step(error), exit_code=code)


def _next_step(error: RouterError) -> str:
    if error.status is None or error.status in (401, 403, 409, 410):
        return "see the router's log; " + NOT_A_ROUTER
    if 300 <= error.status < 400:
        return "set XEROTIER_AGENT_ROUTER_URL to the router's own address"
    return "see the router's log, and that of a proxy in front of it"


def _said(error: RouterError, name: str) -> str:
    """A member of the problem, which may be anything."""
    return printable(str(error.problem.get(name, "?")))[:300]


def clock_is_off(skew: float | None) -> bool:
    """`skew`: seconds, the router's Date minus our clock; None when no reply had one."""
    return skew is not None and abs(skew) > SKEW_SECONDS


def clock_text(skew: float | None) -> str:
    """Whose clock it is when times do not fit, measured from the Date of the router's reply."""
    if skew is None:
        return "the router's reply has no Date to compare this machine's clock with"
    if not clock_is_off(skew):
        return f"both clocks agree within {SKEW_SECONDS:.0f} s, so it is the router that signs wrong times"
    return f"this machine's clock is {abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} the router's"


def wrong_times(error: TokenRefused, skew: float | None) -> TokenRefused:
    """A refusal because of times alone, with the cause in it."""
    hint = SET_CLOCK if skew is None or clock_is_off(skew) else "the router's operator must set its clock"
    return TokenRefused(error.code, error.what, f"{error.reason}; {clock_text(skew)}", clock=True, hint=hint)


def credential_refused(error: RouterError, also: str) -> AgentError:
    """The newest and the previous refresh token were refused. `also`: what is wrong with the join key, if that is."""
    reasons = {
        "credential_reused": "an old refresh token of this agent was presented, by a copy of its state or a thief,"
        " so the router revoked them all",
        "credential_revoked": "the router does not know this agent's credential: it was revoked, or the router was put"
        " back to an older state",
    }
    hint = f"if the state directory was copied, remove the copy; {_NEW_KEY}"
    message = reasons.get(error.code, error.message) + (f"; {also}" if also else "")
    return AgentError(error.code, message, hint=hint, exit_code=Exit.CREDENTIAL_REVOKED)


def no_credential() -> AgentError:
    return AgentError(
        "no_credential",
        "this agent is not enrolled and has no join key",
        hint="set XEROTIER_AGENT_JOIN_KEY or XEROTIER_AGENT_JOIN_KEY_FILE",
        exit_code=Exit.CONFIG,
    )


def removed(agent_id: str | None, kept: Path | None) -> AgentError:
    """410: the operator removed this agent; its state is kept as `kept`. None: that was before an earlier start."""
    if agent_id is None:
        message = "the agent that this join key enrolled here was removed from the router"
    else:
        message = f"the agent {agent_id} was removed from the router; its state is kept as {kept}"
    return AgentError("agent_removed", message, hint=f"to bring it back: {_NEW_KEY}", exit_code=Exit.REMOVED)
