import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xim_agent.engine.output import LINE_BYTES, TAIL_BYTES, Lines, Tail, level_of, phase_of
from xim_agent.engine.state import LONGEST_DELAY, MOST_FAILURES, WINDOW, EngineState, RestartBudget, may_follow


def test_no_state_is_a_dead_end_and_ready_comes_only_from_starting() -> None:
    states = list(EngineState)
    assert all(any(may_follow(now, after) for after in states) for now in states)
    assert [now for now in states if may_follow(now, EngineState.READY)] == [EngineState.STARTING]
    assert [now for now in states if may_follow(now, EngineState.DRAINING)] == [EngineState.STARTING, EngineState.READY]


def test_failing_starts_are_tried_later_and_later_then_every_five_minutes() -> None:
    budget = RestartBudget()
    assert [budget.failed(float(now), 0.0) for now in (0, 10, 25, 50)] == [5.0, 10.0, 20.0, 40.0]
    assert not budget.degraded(50.0)
    assert budget.failed(100.0, 0.0) == LONGEST_DELAY
    assert budget.degraded(100.0)
    assert not budget.degraded(100.0 + WINDOW), "failures older than the window count no more"


def test_a_crash_after_a_good_run_is_started_again_at_once() -> None:
    budget = RestartBudget()
    budget.failed(0.0, 0.0)
    assert budget.failed(1000.0, 900.0) == 0.0
    assert budget.failed(1010.0, 0.0) == 5.0


@given(st.lists(st.tuples(st.floats(0.1, 2000), st.floats(0, 1000)), max_size=30))
def test_budget_never_loops_hot_and_never_waits_longer_than_the_cap(runs: list[tuple[float, float]]) -> None:
    budget, now, at = RestartBudget(), 0.0, []
    for pause, ready_for in runs:
        now += pause + ready_for
        delay = budget.failed(now, ready_for)
        assert 0.0 <= delay <= LONGEST_DELAY
        assert delay > 0.0 or ready_for >= 60.0
        at.append(now)
        recent = [t for t in at if now - t < WINDOW]
        assert budget.degraded(now) == (len(recent) >= MOST_FAILURES)


def test_level_and_phase_of_what_vllm_writes() -> None:
    line = "(EngineCore pid=11864) WARNING 11-23 15:54:52 [vllm.py:725] Model Runner V2 requires Triton"
    assert level_of(line) == logging.WARNING
    assert level_of("ERROR 11-23 15:54:52 [x.py:1] down") == logging.ERROR
    assert level_of("Loading safetensors checkpoint shards: 100%") == logging.INFO
    assert (
        phase_of("(Worker pid=1) INFO 11-23 [default_loader.py:1] Loading weights took 0.1 seconds")
        == "loading weights"
    )
    assert phase_of("something else") is None


def test_the_tail_is_the_last_64_kib() -> None:
    tail = Tail()
    for number in range(20_000):
        tail.add(b"%06d\n" % number)
    lines = tail.text().splitlines()
    assert TAIL_BYTES - 7 <= len(tail.text()) <= TAIL_BYTES
    assert (lines[0], lines[-1]) == ("010638", "019999"), "whole lines only"


@pytest.mark.parametrize("break_", ["\n", " "])
def test_no_word_is_cut_in_two(break_: str) -> None:
    """A secret would not be recognised as one, and both halves would show."""
    word = "xjk_demo_" + "s" * 3991
    text = break_.join([word] * 50).encode()
    tail, lines = Tail(), Lines()
    tail.add(text)
    for found in [*lines.feed(text), tail.text()]:
        assert set(found.split()) == {word}


def test_a_line_without_any_gap_is_cut_all_the_same() -> None:
    assert [len(line) for line in Lines().feed(b"x" * 20_000)] == [LINE_BYTES, LINE_BYTES]


@given(st.binary(max_size=400), st.integers(1, 7))
def test_lines_do_not_depend_on_how_the_stream_is_cut(data: bytes, step: int) -> None:
    whole, pieces = Lines(), Lines()
    cut = [line for i in range(0, len(data), step) for line in pieces.feed(data[i : i + step])]
    assert cut == whole.feed(data)
