"""A fleet on one router: what a step costs does not grow with the agents that it is not about."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from fakes.dispatching import World, end, head
from hypothesis import given
from hypothesis import strategies as st

from xim_agent.router.jobs import Limits
from xim_agent.router.waiting import SPARE

FEW, MANY = 8, 1024


def work(step: Callable[[], Any]) -> int:
    """Calls of functions that a step takes, Python's and C's: the same on every machine."""
    count = 0

    def on_event(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(on_event)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count


def submit(world: World) -> Callable[[], Any]:
    return world.submit


def poll(world: World) -> Callable[[], Any]:
    return world.poll


def tick(world: World) -> Callable[[], Any]:
    return lambda: world.pass_time(0.25)


def answer(world: World) -> Callable[[], Any]:
    world.submit()
    agent = world.dispatch.agents["a0"]
    assert agent.poll is not None
    held = agent.poll
    return lambda: world.answer(held)


def finish(world: World) -> Callable[[], Any]:
    job = world.submit()
    assert job.grant is not None
    grant = job.grant
    frames = [(grant.id, 0, head()), (grant.id, 1, end([]))]
    return lambda: world.events(*frames, agent=grant.agent)


def leave(world: World) -> Callable[[], Any]:
    job = world.submit()
    return lambda: world.dispatch.release(job, world.now)


def no_hope(world: World) -> Callable[[], Any]:
    """Ten requests wait for a slot when all agents are drained."""
    agents = list(world.dispatch.agents)
    for _ in agents:
        world.submit()
    jobs = [world.submit() for _ in range(10)]
    for agent in agents:
        world.poll(agent, phase="draining", capacity=0)

    def step() -> None:
        world.dispatch.tick(world.now)
        assert all(job.outcome is not None for job in jobs)

    return step


def cost(prepare: Callable[[World], Callable[[], Any]], agents: int) -> int:
    world = World(Limits(queue_wait=30.0))
    world.ready(*(f"a{number}" for number in range(agents)))
    return work(prepare(world))


@pytest.mark.parametrize("prepare", [submit, poll, tick, answer, finish, leave])
def test_idle_agents_cost_nothing(prepare: Callable[[World], Callable[[], Any]]) -> None:
    few, many = cost(prepare, FEW), cost(prepare, MANY)
    assert many <= few + 16, "the logarithm of the agents at most"


def test_giving_up_looks_at_the_agents_once() -> None:
    """And not again for each request that is given up."""
    few, many = cost(no_hope, FEW), cost(no_hope, MANY)
    assert (many - few) / (MANY - FEW) < 30, "the once is about 22 calls"


@given(steps=st.lists(st.tuples(st.sampled_from("psssef"), st.integers(0, 5)), max_size=80))
def test_requests_go_to_the_least_loaded(steps: list[tuple[str, int]]) -> None:
    world = World()
    running: list[Any] = []
    for what, choice in steps:
        name = f"a{choice % 3}"
        if what == "p":
            agent = world.dispatch.agents.get(name)
            held = sorted(agent.grants) if agent else []
            found = world.poll(name, capacity=4 - len(held), held=held)
            if found.grants:
                world.answer(found)
        elif what == "s":
            able = [a for a in world.dispatch.agents.values() if a.poll is not None and a.poll.room > 0]
            busy = {a.id: a.busy for a in able}
            job = world.submit() if world.dispatch.agents else None
            if job is not None and job.grant is not None:
                assert busy[job.grant.agent] == min(busy.values())
                running.append(job)
            else:
                assert not able
        elif running:
            job = running.pop(choice % len(running))
            if what == "e" and job.grant is not None:
                world.events((job.grant.id, 0, head()), (job.grant.id, 1, end([])), agent=job.grant.agent)
            world.dispatch.release(job, world.now)


def test_equals_take_turns() -> None:
    world = World()
    world.ready("a", "b", "c", capacity=4)
    took = []
    for _ in range(6):
        job = world.submit()
        assert job.grant is not None
        took.append(job.grant.agent)
        world.events((job.grant.id, 0, head()), (job.grant.id, 1, end([])), agent=job.grant.agent)
    assert sorted(took[:3]) == sorted(took[3:]) == ["a", "b", "c"]


def test_polls_that_are_over_are_forgotten() -> None:
    """An agent that polls for days without a request, beside others that keep theirs."""
    world = World()
    world.ready("a", "b", "c")
    for _ in range(10 * SPARE):
        world.poll("a")
    assert len(world.dispatch.board.waiting) <= 2 * SPARE


def test_an_agent_is_less_busy_after_an_ending() -> None:
    world = World()
    world.ready("a", "b", capacity=4)
    jobs = [world.submit() for _ in range(3)]
    assert [job.grant.agent for job in jobs if job.grant] == ["a", "b", "a"]
    for lease in (1, 2):
        world.events((lease, 0, head()), (lease, 1, end([])), agent="a")
    job = world.submit()
    assert job.grant is not None
    assert job.grant.agent == "a"
