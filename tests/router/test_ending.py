"""The last word of an answer, however the connection cuts it up."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xim_agent.router.ending import Ending

CHAT = b'data: {"n": 1}\n\n'
RESPONSES = b'event: response.output_text.delta\ndata: {"delta": "event: error"}\n\n'


def fed(*pieces: bytes) -> Ending:
    ending = Ending()
    for piece in pieces:
        ending.feed(piece)
    return ending


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", False),
        (CHAT, False),
        (CHAT + b"data: [DONE]\n\n", True),
        (CHAT + b"data:[DONE]\r\n\r\n", True),
        (b"data: [DONE]\n\n\n", True),
        (CHAT + b"data: [DONE]\n", False),
        (CHAT + b"data: [DONE] or not\n\n", False),
        (b"data: [DONE]\n\n" + CHAT, False),
        (b"data: [DONE]\n\ndata", False),
        (RESPONSES, False),
        (RESPONSES + b'event: response.completed\ndata: {"response": "' + b"x" * 9000 + b'"}\n\n', True),
        (RESPONSES + b"event: response.incomplete\ndata: {}\n\n", True),
        (RESPONSES + b"event: response.failed\r\ndata: {}\r\n\r\n", True),
        (RESPONSES + b"event: error\ndata: {}\n\n", True),
        (RESPONSES + b"event: response.completed_tool\ndata: {}\n\n", False),
        (b"data: " + b"y" * 500 + b"event: error\n\n", False),
    ],
)
def test_last_word(text: bytes, said: bool) -> None:
    assert fed(text).said is said
    assert fed(*(text[i : i + 1] for i in range(len(text)))).said is said


@pytest.mark.parametrize("at", [-3, -2, -1])
def test_a_cut_in_the_break_after_a_long_event(at: int) -> None:
    long = b"data: " + b"y" * 500 + b"\r\n\r\n"
    assert fed(long[:at], long[at:], b"data: [DONE]\r\n\r\n").said


PIECES = [CHAT, RESPONSES, b"data: [DONE]\n\n", b"event: response.completed\n", b"data: x\r\n\r\n", b"\n", b"z" * 200]


@given(st.lists(st.sampled_from(PIECES)), st.lists(st.integers(0, 2000)))
def test_cuts_change_nothing(pieces: list[bytes], cuts: list[int]) -> None:
    """The oracle sees everything at once."""
    text = b"".join(pieces)
    edges = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    ending = fed(*(text[a:b] for a, b in pairwise(edges)))
    *whole, rest = re.split(rb"\r\n\r\n|\n\n|\r\r", text)
    events = [event for event in whole if event.strip()]
    assert ending.between is (bool(events) and not rest.strip())
    last = events[-1].splitlines()[0].strip() if events and ending.between else b""
    assert ending.said is (last in (b"data: [DONE]", b"event: response.completed"))
