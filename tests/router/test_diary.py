"""What happened to an agent: noticed from its polls, in order, bounded, and there after a restart of the router."""

import time
from pathlib import Path
from typing import Any

import pytest
import trio
from fakes.agent import MODEL, Bench, FakeAgent, running, until
from fakes.dashboard import signed_in
from hypothesis import given, settings
from hypothesis import strategies as st

from xim_agent.mesh.messages import Condition, Load, PollRequest
from xim_agent.router import chronicle, roster
from xim_agent.router.diary import KEEP_TEXT, KEPT, LASTING, Diary
from xim_agent.router.dispatch import Dispatch
from xim_agent.router.fleet import Agent, Duty
from xim_agent.router.jobs import Limits
from xim_agent.router.sql import transaction
from xim_agent.router.store import Store


def said(diary: Diary, agent_id: str = "a") -> list[tuple[str, str]]:
    return [(event.kind, event.text) for event in diary.of(agent_id)]


class Polls:
    """Polls of one agent, one a second."""

    def __init__(self) -> None:
        self.dispatch = Dispatch(Limits())
        self.diary = self.dispatch.board.diary
        self.now = 0.0
        self.n = 0

    def poll(self, *, boot: str = "b", serves: str | None = "toy", duty: Duty | None = None, **changed: Any) -> None:
        self.now += 1
        self.n += 1
        asked: dict[str, Any] = {
            "boot": boot, "n": self.n, "phase": "ready", "capacity": 0, "wait_ms": 0, "held": [], "model": None,
            "ceiling": 4, "load": Load(), "progress": None, "health": [],
        }  # fmt: skip
        poll = self.dispatch.poll(
            "a",
            duty or Duty("p", 1, "toy"),
            PollRequest(**(asked | changed)),
            serves=serves,
            address="x",
            wake=lambda: None,
            now=self.now,
            wall=self.now,
        )
        self.dispatch.abandon(poll, self.now)


def test_changes_between_polls() -> None:
    polls = Polls()
    polls.poll(phase="starting", serves=None)
    assert said(polls.diary) == [("connected", "starting; toy is assigned")]
    polls.poll(phase="starting", serves=None)
    polls.poll()
    disk = Condition("disk", "full", 1.0)
    polls.poll(health=[disk])
    polls.poll(health=[disk, Condition("engine_failed", "it died", 1.0)])
    polls.poll(duty=Duty("p", 2, "other"))
    polls.poll(boot="c", duty=Duty("p", 2, "other"), serves=None)
    assert said(polls.diary)[1:] == [
        ("serving", "toy"),
        ("phase", "ready, was starting"),
        ("health", "disk: full"),
        ("engine_failed", "it died"),
        ("assigned", "other"),
        ("health_over", "disk is over"),
        ("health_over", "engine_failed is over"),
        ("restarted", "a new process of it polls"),
        ("serving", "no model any more, was toy"),
    ]


def test_silence_is_told_once_and_at_its_time() -> None:
    polls = Polls()
    polls.poll()
    for now in (70.0, 80.0, 90.0):
        polls.diary.silent(polls.dispatch.agents, now, Limits())
    assert [(e.kind, e.at) for e in polls.diary.of("a")] == [("connected", 1.0), ("disconnected", 76.0)]
    polls.now = 100.0
    polls.poll()
    assert said(polls.diary)[2:] == [("connected", "ready; toy is assigned")]


def test_an_agent_without_a_page_is_no_trouble() -> None:
    polls = Polls()
    polls.diary.silent({"x": Agent("x", Duty("p"))}, 1e9, Limits())
    assert said(polls.diary, "x") == []


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.sampled_from(["", "disk", "engine_failed"]), st.booleans(), st.text(max_size=9)), max_size=300
    )
)
def test_bounded_in_memory_and_in_order(steps: list[tuple[str, bool, str]]) -> None:
    polls, boot = Polls(), 0
    for code, restarted, text in steps:
        boot += restarted
        conditions = [Condition(code, text * 100, 1.0)] * 2 if code else []
        polls.poll(health=conditions, boot=str(boot), phase="degraded" if restarted else "ready")
    events = polls.diary.of("a")
    assert len(events) <= 2 * KEPT
    assert [e.at for e in events] == sorted(e.at for e in events)
    assert all(len(e.text) <= KEEP_TEXT and e.text.isprintable() for e in events)
    assert {e.kind for _, e in polls.diary.unwritten()} <= LASTING


def test_an_agent_that_always_changes_takes_no_more_memory() -> None:
    polls = Polls()
    for number in range(3 * KEPT):
        conditions = [Condition(code, "x", 1.0) for code in ("disk", "engine_failed")] if number % 2 else []
        polls.poll(health=conditions)
    kinds = [kind for kind, _ in said(polls.diary)]
    assert len(kinds) == 2 * KEPT
    assert kinds.count("engine_failed") == KEPT, "what matters is not pushed out by what does not"


def test_an_agent_that_left_keeps_only_what_is_not_written() -> None:
    polls = Polls()
    polls.poll()
    polls.dispatch.remove("a", polls.now)
    assert said(polls.diary) == [("connected", "ready; toy is assigned")]
    polls.diary.written()
    assert said(polls.diary) == []
    assert not list(polls.diary.unwritten())


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with Store.open(tmp_path) as store:
        yield store


def test_an_agent_cannot_push_out_what_operators_did(store: Store) -> None:
    with transaction(store.db):
        chronicle.record(store.db, [("a", 1.0, "suspended", "", "command"), ("b", 1.0, "connected", "", "")])
    for turn in range(3):
        store.save_seen({}, [("a", 2.0 + turn, "connected", str(n), "") for n in range(KEPT)])
    with transaction(store.db):
        chronicle.record(store.db, [("a", 9.0, "resumed", "", "dashboard")])
    *kept, last = chronicle.recorded(store.db, "a")
    assert last["kind"] == "resumed"
    assert (kept[0]["kind"], kept[0]["who"]) == ("suspended", "command")
    assert [(e["at"], e["text"]) for e in kept[1:]] == [(4.0, str(n)) for n in range(KEPT)]
    assert len(chronicle.recorded(store.db, "b")) == 1


async def history(bench: Bench, agent: FakeAgent) -> list[tuple[str, str]]:
    """Oldest first: kind and who."""
    async with signed_in(bench) as http:
        found = (await http.get(f"/dashboard/api/agents/{agent.id}")).json()["events"]
    assert [e["at"] for e in found] == sorted((e["at"] for e in found), reverse=True)
    return [(e["kind"], e["who"]) for e in reversed(found)]


async def test_what_matters_is_there_after_a_restart(tmp_path: Path) -> None:
    async with running(tmp_path, Limits(grace=0.0)) as bench:
        agent = await bench.agent()
        await agent.poll(wait_ms=0, phase="starting", capacity=0)
        await agent.poll(wait_ms=0)
        await agent.poll(wait_ms=0, health=[{"code": "engine_failed", "text": "out of memory", "since": 1.0}])
        roster.drain(bench.store.db, agent.id, time.time())
        before = await history(bench, agent)
        assert before == [
            *(("enrolled", ""), ("connected", ""), ("phase", ""), ("engine_failed", "")),
            ("drained", "command"),
        ]
    async with running(tmp_path, Limits(grace=0.0)) as bench:
        assert await history(bench, agent) == [event for event in before if event[0] != "phase"]


async def test_written_with_what_is_saved_now_and_then(bench: Bench, agent: FakeAgent) -> None:
    await agent.poll(wait_ms=0)
    await until(lambda: len(chronicle.recorded(bench.store.db, agent.id)) == 2)
    (first, second) = chronicle.recorded(bench.store.db, agent.id)
    assert (first["kind"], second["kind"], second["text"]) == ("enrolled", "connected", f"ready; {MODEL} is assigned")
    assert abs(second["at"] - time.time()) < 30
    assert not list(bench.router.dispatch.board.diary.unwritten())


async def test_silence_is_noticed_by_the_router_itself(bench: Bench, agent: FakeAgent) -> None:
    await agent.poll(wait_ms=0)
    bench.router.dispatch.agents[agent.id].heard = trio.current_time() - 80

    def kinds() -> list[str]:
        written = [event["kind"] for event in chronicle.recorded(bench.store.db, agent.id)]
        return written + [kind for kind, _ in said(bench.router.dispatch.board.diary, agent.id)]

    await until(lambda: "disconnected" in kinds())
