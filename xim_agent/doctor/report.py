"""Findings of `doctor`, their exit code, and their two forms: lines for people, one JSON object for programs. Pure.

The object: `schema` (SCHEMA, raised when a member goes or changes its meaning), `version` of the agent, `status` (the
worst), `exit_code`, and `checks`: one object for each name of CHECKS, in that order, with `check`, `status` ("ok",
"warning", "failure", "skipped": does not apply here), `text` (what was found), `cure` (what to do; empty when there is
nothing to do) and `exit_code` (0 unless a failure: what `run` would end with, 78 where it would go on in trouble).
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from xim_agent.errors import AgentError, Exit
from xim_agent.text import printable

SCHEMA = 1
Status = Literal["ok", "warning", "failure", "skipped"]
# From what all the rest depends on to what matters last.
CHECKS = (
    *("configuration", "state", "credential", "agent", "sockets", "cache"),
    *("router", "clock", "vllm", "gpu", "amd", "shm"),
    *("files", "memlock", "buffers", "drain", "docker", "compose", "toolkit"),
)
_SIGNS: dict[Status, str] = {"ok": "ok", "warning": "WARN", "failure": "FAIL", "skipped": "-"}
_WORST: tuple[Status, ...] = ("failure", "warning", "ok", "skipped")


@dataclass(frozen=True)
class Finding:
    check: str
    status: Status
    text: str
    cure: str = ""
    exit_code: int = 0


def ok(check: str, text: str) -> Finding:
    return Finding(check, "ok", text)


def warning(check: str, text: str, cure: str) -> Finding:
    return Finding(check, "warning", text, cure)


def failure(check: str, text: str, cure: str, exit_code: int = Exit.CONFIG) -> Finding:
    return Finding(check, "failure", text, cure, int(exit_code))


def skipped(check: str, why: str) -> Finding:
    return Finding(check, "skipped", why)


def from_error(check: str, error: AgentError) -> Finding:
    """As the agent itself would say it."""
    return failure(check, error.message, error.hint, error.exit_code)


def worst(check: str, findings: Sequence[Finding]) -> Finding:
    """One for several of the same kind: what is said by those of the worst status."""
    status = status_of(findings)
    told = [finding for finding in findings if finding.status == status]
    texts, cures = (dict.fromkeys(filter(None, words)) for words in ([f.text for f in told], [f.cure for f in told]))
    return Finding(check, status, "; ".join(texts), "; ".join(cures), exit_code(told))


def status_of(findings: Iterable[Finding]) -> Status:
    found = {finding.status for finding in findings}
    return next((status for status in _WORST if status in found), "skipped")


def exit_code(findings: Iterable[Finding]) -> int:
    """Of the first failure, because later ones may only follow from it; 0 when there is none."""
    return next((finding.exit_code for finding in findings if finding.status == "failure"), int(Exit.OK))


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """One for each check, in the order of CHECKS. Raises KeyError when one is missing."""
    by_name = {finding.check: finding for finding in findings}
    return [by_name[name] for name in CHECKS]


def document(findings: Sequence[Finding], version: str) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "version": version,
        "status": status_of(findings),
        "exit_code": exit_code(findings),
        "checks": [asdict(finding) for finding in findings],
    }


def lines(findings: Sequence[Finding]) -> list[str]:
    """One screen: a line for each check and one for each cure; what does not apply here last, in short."""
    width = max(map(len, CHECKS))
    shown = []
    for finding in findings:
        if finding.status != "skipped":
            shown.append(f"{_SIGNS[finding.status]:<4}  {finding.check:<{width}}  {printable(finding.text)}")
            if finding.cure:
                shown.append(f"      {'':<{width}}  cure: {printable(finding.cure)}")
    shown += [
        f"{_SIGNS['skipped']:<4}  {finding.check:<{width}}  {printable(finding.text)}"
        for finding in findings
        if finding.status == "skipped"
    ]
    bad = [_many([finding.status for finding in findings].count(status), status) for status in ("warning", "failure")]
    return [*shown, "", ", ".join(bad)]


def _many(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"
