"""Status, drain and resume as calls: what they change, when they return, what they say meanwhile."""

from dataclasses import dataclass, field
from typing import Any

import trio
import trio.testing

from xim_agent.control.commands import OPERATOR, calls


@dataclass
class Work:
    """Requests that run for so many seconds from the start."""

    seconds: tuple[float, ...] = ()
    asked: set[str] = field(default_factory=set)
    start: float = field(default_factory=trio.current_time)

    def calls(self) -> Any:
        return calls(
            status=self.status,
            requests=lambda: {"requests": [7]},
            logs=lambda: {"agent": ["a line"]},
            drain=lambda: self.asked.add(OPERATOR),
            resume=lambda: self.asked.discard(OPERATOR),
            drained_by=lambda: sorted(self.asked),
            drained=self.drained,
        )

    def running(self) -> int:
        return sum(trio.current_time() < self.start + s for s in self.seconds)

    def status(self) -> dict[str, Any]:
        return {"work": {"sender": {"running": self.running(), "longest": None}}, "idle": ["because"]}

    async def drained(self) -> None:
        await trio.sleep_until(self.start + max(self.seconds, default=0))


async def test_drain_waits_until_nothing_runs_and_tells_what_does(autojump_clock: trio.testing.MockClock) -> None:
    work, told = Work((2, 5)), []
    found = await work.calls()["drain"]({"wait": True}, told.append)
    assert found == {"drained_by": [OPERATOR], "running": 0, "longest": None}
    assert trio.current_time() == work.start + 5
    assert {one["running"] for one in told} == {1, 2}
    assert len(told) == 10


async def test_drain_need_not_wait_and_resume_ends_it(autojump_clock: trio.testing.MockClock) -> None:
    work = Work((1000,))
    assert (await work.calls()["drain"]({}, print))["running"] == 1
    assert (await work.calls()["drain"]({}, print))["drained_by"] == [OPERATOR]
    assert (await work.calls()["resume"]({}, print))["drained_by"] == []
    assert trio.current_time() == work.start
    assert work.asked == set()


async def test_a_wait_ends_when_somebody_resumes_whoever_else_drains(autojump_clock: trio.testing.MockClock) -> None:
    work = Work((1000,), {"the router"})
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            assert (await work.calls()["drain"]({"wait": True}, lambda now: None))["running"] == 1
            assert trio.current_time() < work.start + 5

        nursery.start_soon(wait)
        await trio.sleep(3)
        assert (await work.calls()["resume"]({}, print))["drained_by"] == ["the router"]


async def test_a_wait_that_is_cut_leaves_the_drain(autojump_clock: trio.testing.MockClock) -> None:
    work = Work((1000,))
    with trio.move_on_after(3):
        await work.calls()["drain"]({"wait": True}, lambda now: None)
    assert work.asked == {OPERATOR}


async def test_status_is_what_the_agent_says(autojump_clock: trio.testing.MockClock) -> None:
    assert (await Work().calls()["status"]({}, print))["idle"] == ["because"]
    assert await Work().calls()["requests"]({}, print) == {"requests": [7]}
    assert await Work().calls()["logs"]({}, print) == {"agent": ["a line"]}
