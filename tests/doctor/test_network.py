import pytest

from xim_agent.doctor.network import clock, router
from xim_agent.errors import AgentError, Exit
from xim_agent.mesh.reach import Reached

AWAY = AgentError("connection_refused", "a:443 refused the connection", hint="check it", exit_code=Exit.NO_ROUTER)
OLD = AgentError("protocol_unsupported", "it speaks protocol 2", hint="update", exit_code=Exit.PROTOCOL)


def test_a_router_that_answers() -> None:
    assert router([Reached("https://a")]).text == "https://a: DNS, TCP, TLS, protocol all good"
    assert router([Reached("http://a")]).text == "http://a: DNS, TCP, protocol all good"
    assert router([Reached("https://a", via="p:1")]).text == "https://a: DNS, TCP, proxy, TLS, protocol all good"
    assert router([Reached("https://a")]).status == "ok"


@pytest.mark.parametrize(
    ("answer", "said", "code"),
    [
        (Reached("https://a", "settings", AWAY), "https://a: settings failed: a:443 refused", 69),
        (Reached("https://a", "DNS", AWAY), "https://a: DNS failed: a:443 refused", 69),
        (Reached("https://a", "TCP", AWAY), "https://a: DNS good, TCP failed: a:443 refused", 69),
        (Reached("https://a", "TLS", AWAY), "https://a: DNS, TCP good, TLS failed: ", 69),
        (Reached("https://a", "proxy", AWAY, via="p:1"), "https://a: DNS, TCP good, proxy failed: ", 69),
        (Reached("http://a", "protocol", OLD), "http://a: DNS, TCP good, protocol failed: it speaks protocol 2", 13),
    ],
)
def test_the_step_that_failed_is_named(answer: Reached, said: str, code: int) -> None:
    found = router([answer])
    assert (found.status, found.exit_code) == ("failure", code)
    assert found.text.startswith(said), found.text
    assert found.cure in ("check it", "update")


def test_one_of_several_is_enough() -> None:
    found = router([Reached("https://b", "TCP", AWAY), Reached("https://a")])
    assert (found.status, found.exit_code) == ("warning", 0)
    assert found.text == (
        "https://a: DNS, TCP, TLS, protocol all good; but https://b: DNS good, TCP failed: a:443 refused the connection"
    )
    both = router([Reached("https://b", "TCP", AWAY), Reached("https://a", "protocol", OLD)])
    assert (both.status, both.exit_code, both.cure) == ("failure", 69, "check it; update")


def test_without_a_router_nothing_is_asked() -> None:
    assert router([]).status == "skipped"


@pytest.mark.parametrize(
    ("skews", "status", "said"),
    [
        ([], "skipped", "no router's Date"),
        ([None], "skipped", "no router's Date"),
        ([None, 0.2], "ok", "within 1 s"),
        ([-29.0], "ok", "within 29 s"),
        ([31.0], "warning", "this machine's clock is 31 s behind the router's"),
        ([-60.0], "warning", "60 s ahead of"),
        ([61.0], "failure", "61 s behind the router's: tokens with a difference of over 60 s are refused"),
    ],
)
def test_the_clock(skews: list[float | None], status: str, said: str) -> None:
    found = clock([Reached("https://a", skew=skew) for skew in skews])
    assert (found.status, said in found.text) == (status, True), found
    assert found.exit_code == (78 if status == "failure" else 0)
    assert ("chrony" in found.cure) == (status in ("warning", "failure"))
