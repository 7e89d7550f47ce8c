"""What a look decides, to the second."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xim_agent.engine.liveness import COMPUTING_COUNTS, LONGEST_GAP, Liveness, Sign
from xim_agent.engine.scrape import Scrape, parse

LIMIT = 60.0


def fired(signs: Iterable[Sign]) -> float | None:
    """When a hang was seen, None when it was not."""
    liveness = Liveness(LIMIT)
    return next((sign.now for sign in signs if liveness.hung(sign)), None)


def standing(gap: float, *, since: float = 0.0, busy: bool = True, computing: bool = False) -> Iterable[Sign]:
    """Looks `gap` apart; the engine stands still from `since` on. Its last proof is seen one look later at most."""
    for n in range(5000):
        now = n * gap
        yield Sign(now, min(now, since // gap * gap), int(busy), computing)


@given(st.floats(0.2, 6.0), st.floats(0.0, 500.0))
def test_a_hang_is_found_within_the_limit(gap: float, since: float) -> None:
    """From when it may have begun, just after the look before the last proof, to the look that tells."""
    at = fired(standing(gap, since=since))
    assert at is not None
    assert at - (since // gap) * gap <= LIMIT
    assert at - since >= LIMIT - 10 - 2 * gap, "and not at once"


def test_looks_a_second_apart_leave_it_nearly_the_whole_limit() -> None:
    assert fired(standing(1.0)) == LIMIT - 2


def test_nobody_asks_anything_of_an_idle_engine() -> None:
    assert fired(standing(1.0, busy=False)) is None


@pytest.mark.parametrize("gap", [1, 6])
def test_an_idle_hang_is_found_within_the_limit_by_a_canary(gap: int) -> None:
    """Asked at the look that sees half of the limit, it counts from that look on."""
    liveness = Liveness(LIMIT)
    for now in range(0, 31, gap):
        assert not liveness.hung(Sign(now, 0, 0))
    liveness.asked()
    found = next(now for now in range(30 + gap, 99, gap) if liveness.hung(Sign(now, 0, 1)))
    assert LIMIT - 10 <= found <= LIMIT - gap


def test_a_request_to_a_long_idle_engine_has_half_the_limit() -> None:
    late = (Sign(float(t), 0, int(t >= 500)) for t in range(1000))
    assert fired(late) == 500 + LIMIT / 2 - 2


@pytest.mark.parametrize(
    "signs",
    [
        [Sign(t, t, 64) for t in range(0, 600, 5)],
        [Sign(t, 5, 0) for t in range(0, 600, 5)],
        [Sign(t, t // 45, 1) for t in range(0, 600, 5)],
        [Sign(t, 5, t % 20 < 10) for t in range(0, 600, 5)],
        [Sign(t * 3600, t // 7, 1) for t in range(600)],
        [Sign(t, t // 100, 1, computing=True) for t in range(0, 600, 5)],
    ],
    ids=["saturated", "idle", "a step in 45 s", "busy now and then", "suspended between all looks", "computing"],
)
def test_no_false_alarm(signs: list[Sign]) -> None:
    assert fired(signs) is None


@given(st.floats(0.0, 1e7), st.integers(0, 40))
def test_a_jump_of_the_clock_counts_as_one_late_look(jump: float, after: int) -> None:
    jumped = (Sign(n + (jump if n > after else 0.0), 0, 1) for n in range(200))
    at = fired(jumped)
    assert at is not None
    still = at - (jump if at > after else 0.0)
    assert still >= LIMIT - LONGEST_GAP - 10


def test_computing_without_a_step_is_a_hang_in_the_end() -> None:
    at = fired(standing(1.0, computing=True))
    assert at is not None
    assert LIMIT / COMPUTING_COUNTS - 12 <= at <= LIMIT / COMPUTING_COUNTS


def test_the_core_is_seen_to_move_when_only_the_cache_fills() -> None:
    """A long prefill: vLLM counts steps that bring tokens."""
    text = 'vllm:iteration_tokens_total_count{{engine="0"}} 7.0\nvllm:kv_cache_usage_perc{{engine="0"}} {0}\n'
    assert parse(text.format(0.25)).core != parse(text.format(0.26)).core
    assert parse(text.format(0.25)).core == parse(text.format(0.25)).core
    assert Scrape(running=1.0).core is None, "a version without the step counter"
