"""A router that is away without a sign of it: calls hang, whenever it comes back."""

import pytest
import trio
import trio.testing

from xim_agent.health import Health
from xim_agent.outcome import RouterError
from xim_agent.work.link import Link

PATIENCE = 10.0  # of a call that is not answered


class Swallowing:
    """Whatever is asked of it while it is away is lost; what began when it is there is answered after 50 ms."""

    def __init__(self) -> None:
        self.away = False
        self.attempts: list[float] = []

    async def ask(self, patience: float = PATIENCE) -> None:
        self.attempts.append(trio.current_time())
        if self.away:
            await trio.sleep(patience)
            raise RouterError("silence", "lost")
        await trio.sleep(0.05)


async def _calling(link: Link, router: Swallowing) -> None:
    while True:
        await link.turn()
        try:
            with link.call("events"):
                await router.ask()
        except RouterError:
            continue
        await trio.sleep(0.5)


async def _held(link: Link, ended: list[float], done: trio.Event) -> None:
    """A poll whose connection dies with the router's first absence: it would be silent for ever."""
    with pytest.raises(RouterError, match="given up"), link.call("poll"):
        await trio.sleep_forever()
    ended.append(trio.current_time())
    done.set()


async def test_it_is_found_within_two_seconds_of_any_moment(autojump_clock: trio.testing.MockClock) -> None:
    for tenths in range(110, 350):
        link, router = Link(health=Health(trio.current_time), rand=lambda: 1.0), Swallowing()
        ended: list[float] = []
        done = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_calling, link, router)
            nursery.start_soon(link.knock, router.ask)
            await trio.sleep(2)
            nursery.start_soon(_held, link, ended, done)
            await trio.sleep(2.01)
            router.away, began = True, trio.current_time()
            await trio.sleep(tenths / 10)
            tried = sum(when > began for when in router.attempts)
            assert tried <= tenths / 10
            assert not link.up
            router.away, back = False, trio.current_time()
            with trio.fail_after(2):
                await done.wait()
            assert link.up
            assert back < ended[0]
            nursery.cancel_scope.cancel()


async def test_it_is_not_knocked_at_for_ever(autojump_clock: trio.testing.MockClock) -> None:
    link, router = Link(health=Health(trio.current_time), rand=lambda: 1.0), Swallowing()
    router.away = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_calling, link, router)
        nursery.start_soon(link.knock, router.ask)
        await trio.sleep(1000)
        router.attempts.clear()
        await trio.sleep(300)
        assert len(router.attempts) <= 20
        nursery.cancel_scope.cancel()


async def test_a_router_that_is_slow_is_not_taken_for_one_that_is_away(autojump_clock: trio.testing.MockClock) -> None:
    """No call is cut for taking its time: while the router is there, and while it comes back."""
    link, router = Link(health=Health(trio.current_time), rand=lambda: 1.0), Swallowing()
    answered = 0

    async def slow() -> None:
        nonlocal answered
        await trio.sleep(8)
        answered += 1

    async def calls() -> None:
        while True:
            await link.turn()
            with link.call("events"):
                await slow()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.knock, slow)
        try:
            with link.call("events"):
                raise RouterError("silence", "lost")
        except RouterError:
            pass
        nursery.start_soon(calls)
        await trio.sleep(100)
        assert answered >= 10
        assert link.up
        nursery.cancel_scope.cancel()
    assert router.attempts == []


async def test_what_has_just_been_asked_is_not_cut(autojump_clock: trio.testing.MockClock) -> None:
    """The router answers again while a call that is 0.2 s old, and may well have reached it, waits for its reply."""
    link = Link(health=Health(trio.current_time), rand=lambda: 0.0)
    ended: list[str] = []

    async def asks(name: str, seconds: float, lost: bool = False) -> None:
        try:
            with link.call("events"):
                await trio.sleep(seconds)
                if lost:
                    raise RouterError("silence", "lost")
        except RouterError as error:
            name += f": {error.message}"
        ended.append(name)

    await asks("first", 0.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(asks, "old", 60.0)
        nursery.start_soon(asks, "fails", 2.0, True)
        await trio.sleep(1.9)
        nursery.start_soon(asks, "young", 5.0)
        await trio.sleep(0.15)
        assert not link.up
        await link.turn()
        await asks("again", 0.05)
    old = "old: given up: the router, back again, answers later calls"
    assert ended == ["first", "fails: lost", "again", old, "young"]
