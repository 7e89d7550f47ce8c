from hypothesis import given
from hypothesis import strategies as st

from xim_agent.engine.poison import LOSS_SECONDS, MOST, Losses, Poison, mark

REQUESTS = st.sets(st.sampled_from([bytes([n]) for n in range(6)]), max_size=4)


def test_a_request_is_known_by_path_and_body() -> None:
    marks = {mark(p, b) for p in ("/v1/completions", "/v1/chat/completions") for b in (b"", b"x")}
    assert len(marks) == 4
    assert mark("/a", b"x") == mark("/a", b"x")


@given(st.lists(st.tuples(REQUESTS, REQUESTS), max_size=12))
def test_refused_is_exactly_what_ran_at_two_crashes_in_a_row(events: list[tuple[set[bytes], set[bytes]]]) -> None:
    """An answer in between, which each pair begins with, clears a request."""
    poison, before, guilty = Poison(), set[bytes](), set[bytes]()
    for served, running in events:
        for request in served - guilty:
            poison.served(request)
        running -= guilty  # they do not reach the engine any more
        new = running & (before - served)
        assert poison.crashed(running) == len(new)
        guilty |= new
        before = running - new
        assert {bytes([n]) for n in range(6) if poison.refuses(bytes([n]))} == guilty
        assert poison.watchful == bool(before or guilty)
    poison.forget()
    assert not poison.watchful


def test_what_is_remembered_is_bounded() -> None:
    poison = Poison()
    for n in range(MOST + 5):
        for _ in range(2):
            poison.crashed([n.to_bytes(4, "big")])
    refused = [n for n in range(MOST + 5) if poison.refuses(n.to_bytes(4, "big"))]
    assert refused == list(range(5, MOST + 5))


def test_a_loss_is_remembered_for_as_long_as_the_engine_may_take_to_end() -> None:
    losses = Losses()
    losses.note(b"again and again", 0.0)
    losses.note(b"early", 1.0)
    losses.note(b"again and again", 2.0)
    assert losses.recent(LOSS_SECONDS) == [b"early", b"again and again"]
    assert losses.recent(LOSS_SECONDS + 1.0) == [b"again and again"]
    assert losses.recent(LOSS_SECONDS + 2.0) == []


def test_losses_of_an_engine_that_goes_on_are_not_kept() -> None:
    """It answers with an error of its own, day after day, and does not end."""
    losses = Losses()
    for number in range(1000):
        losses.note(b"%d" % number, float(number))
    assert len(losses) == LOSS_SECONDS
