import json

import pytest

from xim_agent.doctor.report import (
    CHECKS,
    Finding,
    document,
    exit_code,
    failure,
    from_error,
    lines,
    ok,
    ordered,
    skipped,
    status_of,
    warning,
    worst,
)
from xim_agent.errors import AgentError, Exit

FINE = [ok(name, "fine") for name in CHECKS]


def changed(*findings: Finding) -> list[Finding]:
    return ordered([*FINE, *findings])


@pytest.mark.parametrize(
    ("findings", "status", "code"),
    [
        ([], "ok", 0),
        ([skipped("gpu", "none")], "ok", 0),
        ([warning("files", "few", "more")], "warning", 0),
        ([failure("vllm", "none", "install it")], "failure", 78),
        ([failure("cache", "full", "free", Exit.STATE), failure("vllm", "none", "install it")], "failure", 77),
        ([failure("router", "away", "start it", Exit.NO_ROUTER), warning("files", "few", "more")], "failure", 69),
    ],
)
def test_the_first_failure_gives_the_exit_code(findings: list[Finding], status: str, code: int) -> None:
    found = changed(*findings)
    assert (status_of(found), exit_code(found)) == (status, code)
    assert (document(found, "1")["status"], document(found, "1")["exit_code"]) == (status, code)


def test_the_document_has_a_stable_form() -> None:
    found = json.loads(json.dumps(document(changed(failure("vllm", "none", "install it")), "1.2.3")))
    assert found.keys() == {"schema", "version", "status", "exit_code", "checks"}
    assert (found["schema"], found["version"]) == (1, "1.2.3")
    assert [check["check"] for check in found["checks"]] == [
        "configuration", "state", "credential", "agent", "sockets", "cache", "router", "clock", "vllm", "gpu", "amd",
        "shm", "files", "memlock", "buffers", "drain", "docker", "compose", "toolkit",
    ]  # fmt: skip
    assert found["checks"][8] == {
        "check": "vllm", "status": "failure", "text": "none", "cure": "install it", "exit_code": 78,
    }  # fmt: skip
    assert found["checks"][0] == {"check": "configuration", "status": "ok", "text": "fine", "cure": "", "exit_code": 0}


def test_a_missing_check_is_a_bug() -> None:
    with pytest.raises(KeyError, match="toolkit"):
        ordered(FINE[:-1])


def test_people_get_one_screen_with_the_cure_below_its_failure() -> None:
    shown = lines(
        changed(skipped("gpu", "no\ncard\x1b[2J"), warning("files", "few", "more"), failure("vllm", "n\ro", "x\x1b"))
    )
    assert len(shown) <= 24
    assert shown[:2] == ["ok    configuration  fine", "ok    state          fine"]
    assert [line.split() for line in shown if "cure" in line] == [["cure:", "x?"], ["cure:", "more"]]
    assert shown[shown.index("FAIL  vllm           n o") + 1] == "                     cure: x?"
    assert shown[-3] == "-     gpu            no card?[2J", "what does not apply comes last, and moves no cursor"
    assert shown[-1] == "1 warning, 1 failure"


def test_several_of_a_kind_become_one() -> None:
    found = worst(
        "gpu", [ok("gpu", "a"), warning("gpu", "b", "x"), failure("gpu", "c", "y", 77), failure("gpu", "d", "y")]
    )
    assert found == Finding("gpu", "failure", "c; d", "y", 77)
    assert worst("gpu", [ok("gpu", "a"), ok("gpu", "b")]) == ok("gpu", "a; b")


def test_errors_of_the_agent_keep_message_cure_and_exit_code() -> None:
    error = AgentError("x", "it failed", hint="do this", exit_code=Exit.STATE)
    assert from_error("state", error) == Finding("state", "failure", "it failed", "do this", 77)
