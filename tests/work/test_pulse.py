"""How the watchdog sees that the poll loop turns: `beats` grow, or it `waits`. Virtual time."""

from typing import Any

import pytest
import trio

from xim_agent.notify import Life
from xim_agent.outcome import RouterError

LOOK = 5.0


async def lives(bench: Any, seconds: float) -> bool:
    """Whether the watchdog would have been fed all the time."""
    life = Life()
    end = trio.current_time() + seconds
    fed = True
    while trio.current_time() < end:
        fed = fed and life.alive(bench.poller.beats, bench.poller.waits, LOOK)
        await trio.sleep(LOOK)
    return fed


def away(**more: Any) -> RouterError:
    return RouterError("connection_refused", "nobody there", **more)


@pytest.mark.parametrize(
    "error",
    [
        away(),
        RouterError("http_503", "away", status=503),
        RouterError("rate_limited", "later", status=429, retry_after=300.0),
        RouterError("agent_suspended", "suspended", status=403),
        RouterError("bad_request", "refused", status=400),
    ],
    ids=lambda error: error.code,
)
async def test_it_lives_through_every_outage(
    bench: Any, router: Any, error: RouterError, error_logs: Any, autojump_clock: Any
) -> None:
    await trio.sleep(60)
    router.cut(error)
    assert await lives(bench, 1500)
    router.cut(None)
    assert await lives(bench, 120)


@pytest.mark.parametrize("change", [{"retry_ms": 300_000}, {"instant": True}, {}], ids=str)
async def test_it_lives_with_a_router_that_has_no_work(
    bench: Any, router: Any, change: dict[str, Any], autojump_clock: Any
) -> None:
    router.say(**change)
    assert await lives(bench, 300)


def hang(router: Any, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    async def never(*_: Any) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(router, call, never)


@pytest.mark.parametrize("after", [None, away()], ids=["link up", "link down"])
async def test_a_poll_that_hangs_is_no_life(
    bench: Any,
    router: Any,
    monkeypatch: pytest.MonkeyPatch,
    after: RouterError | None,
    autojump_clock: Any,
) -> None:
    router.cut(after)
    await trio.sleep(60)
    assert await lives(bench, 60)
    hang(router, monkeypatch, "poll")
    assert not await lives(bench, 180)


async def test_a_turn_that_never_comes_is_no_life(
    bench: Any, monkeypatch: pytest.MonkeyPatch, autojump_clock: Any
) -> None:
    """A lost wake-up, say."""
    await trio.sleep(60)
    monkeypatch.setattr(bench.link, "turn", trio.sleep_forever)
    assert not await lives(bench, 180)


async def test_it_lives_while_what_was_spooled_is_sent(
    boot: Any, router: Any, monkeypatch: pytest.MonkeyPatch, autojump_clock: Any
) -> None:
    bench = await boot(start=False)
    sent = trio.Event()
    monkeypatch.setattr(bench.sender, "send_spooled", sent.wait)
    await bench.start()
    assert await lives(bench, 300)
    sent.set()
    assert await lives(bench, 300)
    monkeypatch.setattr(bench.link, "turn", trio.sleep_forever)
    assert not await lives(bench, 180)
