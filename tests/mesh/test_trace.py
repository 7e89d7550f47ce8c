"""Which trace a request belongs to."""

from hypothesis import given
from hypothesis import strategies as st

from xim_agent.mesh.trace import trace_id, traced

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GOOD = f"00-{TRACE}-{SPAN}-01"
BAD = [
    "", "d", f"00-{TRACE}-{SPAN}", f"00-{TRACE}-{SPAN}-01-", f"00-{TRACE}-{SPAN}-01-x", f"ff-{TRACE}-{SPAN}-01",
    f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01", GOOD.upper(), f"{GOOD}\n", f" {GOOD}",
    GOOD.replace("b", "g"), f"cc-{TRACE}-{SPAN}-01{'-' + 'x' * 300}", f"cc-{TRACE}-{SPAN}-01x",
    GOOD.replace("0af", "\u0660af"),
]  # fmt: skip


def test_a_valid_parent_is_kept_with_its_state() -> None:
    for parent in (GOOD, f"00-{TRACE}-{SPAN}-00", f"cc-{TRACE}-{SPAN}-01-of-tomorrow"):
        asked = {"accept": "x", "traceparent": parent, "tracestate": "a=b"}
        assert traced(asked, "r") == asked
        assert trace_id(parent) == TRACE


def test_another_one_is_replaced_and_its_state_means_nothing() -> None:
    for parent in BAD:
        assert trace_id(parent) is None, parent
        found = traced({"accept": "x", "traceparent": parent, "tracestate": "a=b"}, "r")
        assert found == traced({"accept": "x"}, "r"), parent
        assert set(found) == {"accept", "traceparent"}


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
def test_a_made_one_is_valid_and_of_its_request_alone(request: str, other: str) -> None:
    made = traced({}, request)["traceparent"]
    assert trace_id(made) == made[3:35]
    assert made.endswith("-00")
    assert (made == traced({}, other)["traceparent"]) is (request == other)


@given(st.text(max_size=300))
def test_any_text_is_judged(parent: str) -> None:
    kept = traced({"traceparent": parent}, "r")["traceparent"] == parent
    assert kept is (trace_id(parent) is not None)
