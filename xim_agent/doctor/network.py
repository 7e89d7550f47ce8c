"""What a round over the routers has shown. Pure."""

from collections.abc import Sequence
from typing import Protocol

from xim_agent.doctor.report import Finding, failure, ok, skipped, warning, worst
from xim_agent.errors import AgentError, Exit
from xim_agent.identity.claims import LEEWAY
from xim_agent.identity.refusals import SET_CLOCK, clock_text
from xim_agent.outcome import SKEW_SECONDS

_ORDER = ("settings", "DNS", "TCP", "proxy", "TLS", "protocol")


class Reached(Protocol):
    """See mesh/reach.py."""

    @property
    def router(self) -> str: ...
    @property
    def step(self) -> str: ...
    @property
    def error(self) -> AgentError | None: ...
    @property
    def skew(self) -> float | None: ...
    @property
    def via(self) -> str | None: ...


def router(answers: Sequence[Reached]) -> Finding:
    """One that does not answer is only a warning while another does: the agent goes on to the next."""
    if not answers:
        return skipped("router", "no router is known: there is neither a credential nor a join key nor a ROUTER_URL")
    found = [_one(answer) for answer in answers]
    good = [finding for finding in found if finding.status == "ok"]
    if good and len(good) < len(found):
        bad = worst("router", [finding for finding in found if finding.status != "ok"])
        return warning("router", f"{'; '.join(f.text for f in good)}; but {bad.text}", bad.cure)
    return worst("router", found)


def _one(answer: Reached) -> Finding:
    steps = _steps(answer)
    if answer.error is None:
        return ok("router", f"{answer.router}: {', '.join(steps)} all good")
    begun = steps[: steps.index(answer.step)] if answer.step in steps else []
    passed = f"{', '.join(begun)} good, " if begun else ""
    text = f"{answer.router}: {passed}{answer.step} failed: {answer.error.message}"
    return failure("router", text, answer.error.hint, answer.error.exit_code or Exit.NO_ROUTER)


def _steps(answer: Reached) -> list[str]:
    left_out = {"settings"} | (set() if answer.via else {"proxy"})
    left_out |= set() if answer.router.startswith("https:") else {"TLS"}
    return [step for step in _ORDER if step not in left_out]


def clock(answers: Sequence[Reached]) -> Finding:
    """Tokens are refused beyond LEEWAY seconds; SKEW_SECONDS is what a running agent complains of."""
    skew = next((answer.skew for answer in answers if answer.skew is not None), None)
    if skew is None:
        return skipped("clock", "no router's Date to compare it with")
    if abs(skew) > LEEWAY:
        return failure(
            "clock", f"{clock_text(skew)}: tokens with a difference of over {LEEWAY} s are refused", SET_CLOCK
        )
    if abs(skew) > SKEW_SECONDS:
        return warning("clock", clock_text(skew), SET_CLOCK)
    return ok("clock", f"within {max(1.0, abs(skew)):.0f} s of the router's")
