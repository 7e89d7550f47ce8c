"""Who must act on a failed call: the one table of wire-protocol §2. Decides by status and `code`, never by text."""

from collections.abc import Mapping
from enum import Enum
from typing import Any

from xim_agent.errors import AgentError, Exit


class Action(Enum):
    RETRY = "retry"  # full-jitter backoff, for ever
    REFRESH = "refresh"  # refresh the token, repeat once; a second 401 is RETRY
    CLOCK = "clock"  # repeat once with the time of the reply's Date header, then RETRY
    ENROLL_AGAIN = "enroll_again"  # previous refresh token, then the join key, each once
    JOIN_KEY = "join_key"  # final: the join key is refused
    WAIT = "wait"  # suspended: stay up, take no work
    REMOVED = "removed"
    PROTOCOL = "protocol"
    CLONE = "clone"  # 409 identity_in_use
    FINAL = "final"  # this call is over: log, count, report, never loop


_BY_CODE: Mapping[tuple[int, str], Action] = {
    (401, "token_expired"): Action.REFRESH,
    (401, "token_invalid"): Action.REFRESH,
    (400, "dpop_invalid"): Action.CLOCK,
    (403, "credential_reused"): Action.ENROLL_AGAIN,
    (403, "credential_revoked"): Action.ENROLL_AGAIN,
    (403, "join_key_invalid"): Action.JOIN_KEY,
    (403, "join_key_expired"): Action.JOIN_KEY,
    (403, "join_key_revoked"): Action.JOIN_KEY,
    (403, "join_key_used_up"): Action.JOIN_KEY,
    (403, "agent_suspended"): Action.WAIT,
    (410, "agent_removed"): Action.REMOVED,
    (426, "protocol_unsupported"): Action.PROTOCOL,
    (409, "identity_in_use"): Action.CLONE,
}

_EXIT: Mapping[Action, Exit] = {
    Action.RETRY: Exit.NO_ROUTER,
    Action.ENROLL_AGAIN: Exit.CREDENTIAL_REVOKED,
    Action.JOIN_KEY: Exit.JOIN_KEY_REFUSED,
    Action.REMOVED: Exit.REMOVED,
    Action.PROTOCOL: Exit.PROTOCOL,
    Action.CLONE: Exit.ALREADY_RUNNING,
    Action.FINAL: Exit.CONFIG,
}
CODES = frozenset(code for _, code in _BY_CODE) | {
    *("dpop_url", "invalid_request", "lease_unknown", "method_not_allowed", "not_found"),
    *("rate_limited", "request_timeout", "request_too_large", "router_busy", "router_stopping"),
}
SKEW_SECONDS = 30.0  # wire-protocol §1: clocks that differ by more are named
NOT_A_ROUTER = "check that the URL is that of a XIM router"


def classify(status: int | None, code: str | None) -> Action:
    """`status` None means that no reply came (DNS, refused, timeout, TLS, cut)."""
    if status is None or 300 <= status < 400 or status in (408, 425, 429) or status >= 500:
        return Action.RETRY
    return _BY_CODE.get((status, code or ""), Action.FINAL)


class RouterError(AgentError):
    """A call to the router failed. `problem` is the decoded problem+json (empty when there was none).

    Seconds: `retry_after` from Retry-After; `date_skew` the router's Date minus our clock, None when unknown.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        status: int | None = None,
        problem: Mapping[str, Any] | None = None,
        retry_after: float | None = None,
        date_skew: float | None = None,
        hint: str = "",
    ) -> None:
        self.action = classify(status, code)
        super().__init__(code, message, hint=hint, exit_code=_EXIT.get(self.action, Exit.NO_ROUTER))
        self.status = status
        self.problem = dict(problem or {})
        self.retry_after = retry_after
        self.date_skew = date_skew

    def retry(self) -> None:
        """What could be done about it was done: from now on it is of the retry class."""
        self.action, self.exit_code = Action.RETRY, int(Exit.NO_ROUTER)
