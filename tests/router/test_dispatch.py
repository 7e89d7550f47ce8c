"""The dispatcher as a pure machine: who gets what, what is told to whom, and when."""

from typing import Any

import pytest
from fakes.dispatching import DUTY, LIMITS, MODEL, PROJECT, World, end, fail, head, stream

from xim_agent.mesh.messages import PollReply
from xim_agent.router.boots import KEEP
from xim_agent.router.dispatch import AgentSuspended, CloneDetected
from xim_agent.router.fleet import Duty
from xim_agent.router.jobs import COMPLETE, Limits, Refused


@pytest.fixture
def world() -> World:
    return World()


# -- polls --


def test_first_poll_of_a_boot_is_answered_at_once(world: World) -> None:
    assert world.answer(world.poll(wait_ms=25_000)).generation == 1
    assert world.dispatch.answer(world.poll(), world.now) is None


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({"wait_ms": 20_000}, 20),
        ({"wait_ms": 90_000}, 25),
        ({"wait_ms": -5}, 0),
        ({"wait_ms": 20_000, "capacity": 0}, 5),
        ({"wait_ms": 2_000, "capacity": 0}, 2),
    ],
)
def test_how_long_a_poll_is_held(world: World, fields: dict[str, Any], seconds: float) -> None:
    (poll,) = world.ready(**fields)
    assert poll.until == seconds


def test_a_third_of_the_ttl_while_leases_are_held() -> None:
    world = World(Limits(ttl=30.0))
    _, lease = world.leased()
    assert world.poll(held=[lease], wait_ms=25_000).until == 10


def test_poll_is_answered_when_its_time_is_over(world: World) -> None:
    (poll,) = world.ready(wait_ms=3000)
    world.now = 2.9
    assert world.dispatch.answer(poll, world.now) is None
    world.now = 3.0
    assert world.answer(poll) == PollReply(generation=1, idle_reason=f"no request waits for {MODEL}")


def test_change_of_the_assignment_is_told_at_once(world: World) -> None:
    (poll,) = world.ready()
    world.woken = 0
    world.dispatch.assign("a", Duty(PROJECT, 2, "other"), MODEL, world.now)
    assert world.woken
    assert world.answer(poll).generation == 2


def test_higher_n_ends_the_held_poll_and_nothing_goes_into_it(world: World) -> None:
    (old,) = world.ready()
    new = world.poll()
    job = world.submit()
    assert world.answer(old) == PollReply(generation=1)
    assert [lease.request for lease in world.answer(new).leases] == [job.request]


def test_late_poll_says_and_gets_nothing(world: World) -> None:
    (held,) = world.ready()
    n = world.numbers["a", "b1"]
    late = world.poll(n=n - 1, phase="draining", capacity=0)
    assert world.answer(late) == PollReply(generation=1)
    world.submit()
    assert len(world.answer(held).leases) == 1


def test_closed_poll_was_never_answered(world: World) -> None:
    first, second = world.ready("a", "b")
    job = world.submit()
    chosen, other = (first, second) if first.grants else (second, first)
    world.dispatch.abandon(chosen, world.now)
    assert [lease.request for lease in world.answer(other).leases] == [job.request]


@pytest.mark.parametrize("fields", [{"capacity": 0}, {"phase": "starting"}, {"phase": "degraded"}, {"serves": None}])
def test_no_lease_for_an_agent_that_takes_none(world: World, fields: dict[str, Any]) -> None:
    (poll,) = world.ready(**fields)
    world.submit()
    world.now = 25.0
    assert world.answer(poll).leases == []


def test_draining_agent_gives_no_hope(world: World) -> None:
    world.ready(phase="draining", capacity=0)
    with pytest.raises(Refused):
        world.submit()


def test_lease_offered_again_that_proves_received_is_offered_to_nobody(world: World) -> None:
    job, lease = world.leased()
    poll = world.poll()
    world.events(*stream(lease, [b"x"])[:2])
    assert world.answer(poll).leases == []
    assert world.events(*stream(lease, [b"x"])[2:]).acked == {lease: 2}
    assert job.outcome is COMPLETE


def test_never_more_leases_than_capacity(world: World) -> None:
    (poll,) = world.ready(capacity=3)
    for _ in range(5):
        world.submit()
    assert len(world.answer(poll).leases) == 3
    assert world.dispatch.statistics().queued == 2


def test_suspended_agent_keeps_its_leases(world: World) -> None:
    _, lease = world.leased()
    for _ in range(4):
        world.now += 30
        with pytest.raises(AgentSuspended):
            world.poll(held=[lease], duty=Duty(PROJECT, 1, MODEL, suspended=True))
        world.dispatch.tick(world.now)
    assert world.events((lease, 0, head())).acked == {lease: 0}


# -- clones --


def test_restart_ends_the_older_leases(world: World) -> None:
    job, lease = world.leased()
    world.answer(world.poll(boot="b2", capacity=0))
    assert world.events((lease, 0, head())).unknown == [lease]
    assert [again.request for again in world.answer(world.poll(boot="b2")).leases] == [job.request]


def test_alternating_boots_are_a_clone_and_both_are_told(world: World) -> None:
    world.answer(world.poll(boot="early"))
    world.now = 10
    world.answer(world.poll(boot="late"))
    with pytest.raises(CloneDetected) as told_early:
        world.poll(boot="early")
    with pytest.raises(CloneDetected) as told_late:
        world.poll(boot="late")
    assert (told_early.value.start, told_late.value.start) == (1e9 + 10, 1e9)
    world.answer(world.poll(boot="early"))
    for _ in range(3):
        with pytest.raises(CloneDetected):
            world.poll(boot="late")
        world.answer(world.poll(boot="early", wait_ms=0))
    world.now += 80
    world.answer(world.poll(boot="early", wait_ms=0))
    with pytest.raises(CloneDetected):
        world.poll(boot="late")
    with pytest.raises(CloneDetected):
        world.poll(boot="early")


def test_copy_that_starts_again_and_again_never_becomes_the_earlier_one(world: World) -> None:
    """A supervisor does that. The original one is told, by the router's own clock, that the other one is later."""
    world.answer(world.poll(boot="original"))
    for number in range(100):
        world.now += 9
        copy = f"copy {number}"
        world.poll(boot=copy)
        with pytest.raises(CloneDetected) as told:
            world.poll(boot="original")
        assert told.value.start > told.value.yours == 1e9
        world.answer(world.poll(boot="original", wait_ms=0))
        with pytest.raises(CloneDetected) as told:
            world.poll(boot=copy)
        assert told.value.start == 1e9 < told.value.yours
    assert len(world.dispatch.agents["a"].boots.known) <= KEEP + 1


def test_original_that_holds_its_poll_is_not_forgotten_meanwhile(world: World) -> None:
    world.answer(world.poll(boot="original"))
    for number in range(KEEP - 1):
        world.poll(boot=f"copy {number}")
    with pytest.raises(CloneDetected) as told:
        world.poll(boot="original", wait_ms=0)
    assert told.value.yours == 1e9


def test_late_clone_takes_over_when_the_early_one_is_silent(world: World) -> None:
    for boot in ("early", "late"):
        world.answer(world.poll(boot=boot))
    with pytest.raises(CloneDetected):
        world.poll(boot="early")
    world.now += 76
    assert world.answer(world.poll(boot="late")).generation == 1


# -- placing --


def test_least_loaded_first(world: World) -> None:
    world.ready("a", "b", "c", capacity=2)
    for _ in range(6):
        world.submit()
    assert {name: len(agent.grants) for name, agent in world.dispatch.agents.items()} == {"a": 2, "b": 2, "c": 2}


def test_jobs_that_wait_are_shared_with_agents_about_to_poll(world: World) -> None:
    polls = world.ready("a", "b", capacity=4)
    for poll in polls:
        world.dispatch.abandon(poll, world.now)
    for _ in range(4):
        world.submit()
    assert len(world.poll("a", capacity=4).grants) == 2
    assert len(world.poll("b", capacity=4).grants) == 2


@pytest.mark.parametrize("duty", [Duty("other", 1, MODEL), Duty(PROJECT, 1, "other")])
def test_job_is_for_its_project_and_model_only(world: World, duty: Duty) -> None:
    world.poll("x", duty=duty, serves=duty.assigned)
    with pytest.raises(Refused) as refused:
        world.submit()
    assert refused.value.outcome.code == "endpoint_inactive"


def test_old_model_serves_until_the_agent_switches(world: World) -> None:
    (poll,) = world.ready(duty=Duty(PROJECT, 2, "next"), serves=MODEL)
    job = world.submit()
    assert world.answer(poll).leases[0].request == job.request


def test_queue_has_an_end() -> None:
    world = World(Limits(queue_length=2))
    world.ready(capacity=0)
    world.submit()
    world.submit()
    with pytest.raises(Refused) as refused:
        world.submit()
    assert refused.value.outcome.code == "capacity_exceeded"


def test_bodies_that_wait_have_a_bound_together() -> None:
    world = World(Limits(queue_bytes=100))
    world.ready(capacity=0)
    jobs = [world.submit(body=b"x" * 50) for _ in range(2)]
    with pytest.raises(Refused) as refused:
        world.submit(body=b"x")
    assert (refused.value.outcome.code, refused.value.outcome.status) == ("capacity_exceeded", 429)
    world.dispatch.release(jobs[0], world.now)
    world.submit(body=b"x" * 50)
    world.answer(world.poll())
    world.submit(body=b"x" * 50)


def test_bodies_beyond_the_reply_travel_apart() -> None:
    world = World(Limits(inline=150))
    (poll,) = world.ready(capacity=3)
    for _ in range(3):
        world.submit(body=b"x" * 100)
    assert [lease.body is None for lease in world.answer(poll).leases] == [False, True, True]


# -- waiting --


def test_wait_ends_with_the_reason(world: World) -> None:
    (poll,) = world.ready(capacity=0)
    busy = world.submit()
    world.dispatch.abandon(poll, world.now)
    world.pass_time(59.9)
    world.poll(capacity=0)
    assert busy.queued
    world.pass_time(0.2)
    assert busy.outcome is not None
    assert (busy.outcome.code, busy.outcome.status) == ("capacity_exceeded", 429)


def test_wait_for_an_agent_that_starts_ends_as_inactive(world: World) -> None:
    world.ready(phase="starting", capacity=0)
    job = world.submit()
    world.pass_time(60.1)
    assert job.outcome is not None
    assert (job.outcome.code, job.outcome.status) == ("endpoint_inactive", 503)


def test_wait_ends_when_the_last_agent_is_lost(world: World) -> None:
    world.answer(world.poll(capacity=0))
    world.now = 70
    job = world.submit()
    world.pass_time(6)
    assert job.outcome is not None
    assert job.outcome.code == "endpoint_inactive"


def test_after_a_start_expected_agents_are_waited_for(world: World) -> None:
    world.dispatch.start(world.now)
    with pytest.raises(Refused):
        world.submit()
    job = world.submit(expected=True)
    world.pass_time(9)
    assert job.outcome is None
    world.pass_time(2)
    assert job.outcome is not None


# -- leases --


def test_lease_not_received_is_offered_again_under_its_id(world: World) -> None:
    job, lease = world.leased()
    again = world.answer(world.poll())
    assert [(x.id, x.request, x.credit) for x in again.leases] == [(lease, job.request, LIMITS.window)]
    assert world.answer(world.poll(held=[lease], wait_ms=0)).leases == []


def test_lease_not_received_goes_elsewhere_when_there_is_no_room(world: World) -> None:
    job, _ = world.leased()
    world.poll(capacity=0)
    (other,) = world.ready("b")
    assert [lease.request for lease in world.answer(other).leases] == [job.request]


def test_lease_with_a_frame_was_received(world: World) -> None:
    """A poll that does not list it any more has dropped it: another try, not another offer."""
    job, lease = world.leased()
    world.events((lease, 0, head()))
    poll = world.poll()
    assert [x.request for x in world.answer(poll).leases] == [job.request]
    assert job.retries == 1
    assert world.events((lease, 1, b"x")).unknown == [lease]


@pytest.mark.parametrize("renew", ["poll", "frame", "held poll"])
def test_lease_is_renewed_by(world: World, renew: str) -> None:
    job, lease = world.leased()
    world.events((lease, 0, head()))
    for seq in range(1, 5):
        if renew == "frame":
            world.events((lease, seq, b"x"))
        else:
            poll = world.poll(held=[lease])
            if renew == "poll":
                world.dispatch.abandon(poll, world.now)
        world.pass_time(200 if renew == "held poll" else 74)
    assert job.outcome is None
    assert job.retries == 0


def test_lapsed_lease_goes_to_another_agent_once_nothing_was_seen(world: World) -> None:
    job, lease = world.leased()
    world.events((lease, 0, head()))
    world.now = 74
    (other,) = world.ready("b")
    world.pass_time(1.5)
    assert [x.request for x in world.answer(other).leases] == [job.request]
    assert world.events((lease, 1, b"x")).unknown == [lease]


def test_lapsed_lease_after_data_is_an_error(world: World) -> None:
    job, lease = world.leased()
    world.events((lease, 0, head()), (lease, 1, b"x"))
    assert world.dispatch.take(job) == b"x"
    world.pass_time(76)
    assert job.outcome is not None
    assert job.outcome.code == "engine_lost"


def test_deadline_ends_the_job_and_cancels_the_lease() -> None:
    world = World(Limits(request_time=30))
    job, lease = world.leased()
    world.poll(held=[lease])
    world.pass_time(31)
    assert job.outcome is not None
    assert (job.outcome.code, job.outcome.status) == ("deadline", 504)
    assert world.answer(world.poll(held=[lease])).cancel == [lease]


def test_leases_of_an_earlier_router_are_cancelled(world: World) -> None:
    reply = world.answer(world.poll(held=[7, 9], n=50))
    assert reply.cancel == [7, 9]
    assert world.events((7, 3, b"x"), (7, 4, fail())).unknown == [7]
    world.submit()
    (lease,) = world.answer(world.poll()).leases
    assert lease.id not in (7, 9)
    assert lease.id > 1000, "this boot may have had any small id"


def test_cancel_of_what_was_only_offered_frees_the_slot(world: World) -> None:
    (poll,) = world.ready()
    gone, next_one = world.submit(), world.submit()
    world.dispatch.release(gone, world.now)
    assert [lease.request for lease in world.answer(poll).leases] == [next_one.request]


def test_cancel_is_repeated_but_is_no_busy_loop(world: World) -> None:
    job, lease = world.leased()
    held = world.poll(held=[lease])
    world.dispatch.release(job, world.now)
    assert world.answer(held).cancel == [lease]
    again = world.poll(held=[lease])
    assert world.dispatch.answer(again, world.now) is None
    world.woken = 0
    world.pass_time(1.1)
    assert world.woken
    assert world.answer(again).cancel == [lease]


# -- retries --


@pytest.mark.parametrize("code", ["engine_lost", "engine_overloaded", "draining"])
def test_error_before_data_goes_elsewhere(world: World, code: str) -> None:
    job, lease = world.leased()
    (other,) = world.ready("b")
    same = world.poll(held=[lease])
    world.events((lease, 0, fail(code)))
    assert [x.request for x in world.answer(other).leases] == [job.request]
    assert world.dispatch.answer(same, world.now) is None


def test_the_same_agent_again_when_there_is_no_other(world: World) -> None:
    job, lease = world.leased()
    poll = world.poll(held=[lease])
    world.events((lease, 0, fail()))
    assert [x.request for x in world.answer(poll).leases] == [job.request]


def test_other_agent_without_a_slot_is_waited_for_a_little(world: World) -> None:
    job, lease = world.leased()
    world.ready("b", capacity=0)
    poll = world.poll(held=[lease])
    world.events((lease, 0, fail()))
    assert world.dispatch.answer(poll, world.now) is None
    world.pass_time(5.1)
    assert [x.request for x in world.answer(poll).leases] == [job.request]


@pytest.mark.parametrize(("code", "status"), [("invalid_request", 400), ("internal", 500)])
def test_error_that_no_other_agent_cures(world: World, code: str, status: int) -> None:
    job, lease = world.leased()
    world.events((lease, 0, fail(code)))
    assert job.outcome is not None
    assert (job.outcome.code, job.outcome.status) == (code, status)


def test_at_most_two_retries(world: World) -> None:
    job, lease = world.leased()
    for _ in range(3):
        assert job.outcome is None
        world.events((lease, 0, fail()))
        leases = world.answer(world.poll(wait_ms=0)).leases
        lease = leases[0].id if leases else 0
    assert job.outcome is not None
    assert world.dispatch.statistics().counts["retries"] == 2


# -- frames --


def test_frames_are_applied_in_order_and_once(world: World) -> None:
    job, lease = world.leased()
    frames = stream(lease, [b"a", b"b"])
    assert world.events(frames[2]).acked == {}
    assert world.events(frames[0], frames[0]).acked == {lease: 0}
    assert world.events(frames[1], frames[2]).acked == {lease: 2}
    assert world.dispatch.take(job) == b"ab"
    assert world.events(frames[3]).acked == {lease: 3}
    assert world.events(*frames).acked == {lease: 3}, "a resent ending is acknowledged again"
    assert job.outcome is COMPLETE


@pytest.mark.parametrize(
    "frames",
    [
        [(0, b"data first")],
        [(0, head()), (1, head())],
        [(0, head(status=99))],
        [(0, head()), (1, None)],
        [(0, head()), (1, b"x" * 1025)],
        [(0, head()), (1, b"x" * 1000), (3, b"y" * 1000)],
    ],
)
def test_frame_that_breaks_the_protocol_costs_its_lease(world: World, frames: list[tuple[int, Any]]) -> None:
    job, lease = world.leased()
    reply = world.events(*[(lease, seq, payload) for seq, payload in frames])
    assert reply.unknown == [lease]
    assert job.outcome is not None
    assert job.outcome.code == "engine_lost"


def test_bad_frame_costs_no_other_lease(world: World) -> None:
    (poll,) = world.ready(capacity=2)
    jobs = [world.submit(), world.submit()]
    first, second = (lease.id for lease in world.answer(poll).leases)
    reply = world.events((first, 0, None), *stream(second, [b"x"]))
    assert (reply.unknown, reply.acked) == ([first], {second: 2})
    assert jobs[1].outcome is COMPLETE


@pytest.mark.parametrize("pieces", [[b"ab"], [b"a"], []])
def test_ending_that_counts_otherwise_is_no_answer(world: World, pieces: list[bytes]) -> None:
    job, lease = world.leased()
    world.events((lease, 0, head()), (lease, 1, b"a"), (lease, 2, b"b"))
    world.dispatch.take(job)
    world.events((lease, 3, end(pieces)))
    assert job.outcome is not None
    assert job.outcome.code == "engine_lost"


def test_ending_of_an_earlier_boot_with_a_gap_is_settled_by_the_next_boot(world: World) -> None:
    job, lease = world.leased()
    world.events((lease, 0, head()), (lease, 1, b"a"))
    world.dispatch.take(job)
    assert world.events((lease, 3, end([b"a", b"b"]))).acked == {lease: 1}
    world.answer(world.poll(boot="b2"))
    assert job.outcome is not None
    assert job.outcome.code == "engine_lost"


def test_spooled_ending_without_a_gap_is_settled_before_the_next_boot(world: World) -> None:
    job, lease = world.leased()
    world.events((lease, 0, head()), (lease, 1, b"a"))
    world.dispatch.take(job)
    world.events((lease, 2, end([b"a"])))
    world.answer(world.poll(boot="b2"))
    assert job.outcome is COMPLETE


def test_events_of_strangers(world: World) -> None:
    assert world.events((1, 0, head()), (2, 0, b"")).unknown == [1, 2]


# -- credit --


def test_credit_comes_with_what_the_client_took(world: World) -> None:
    job, lease = world.leased()
    world.events((lease, 0, head()), (lease, 1, b"x" * 600))
    world.dispatch.consumed(job, len(world.dispatch.take(job)), world.now)
    assert world.events((lease, 2, b"")).credit == {lease: 1624}


def test_used_up_credit_wakes_a_held_poll_when_the_client_reads(world: World) -> None:
    job, lease = world.leased()
    world.events((lease, 0, head()), (lease, 1, b"x" * 1024))
    poll = world.poll(held=[lease])
    assert world.dispatch.answer(poll, world.now) is None
    world.woken = 0
    world.dispatch.consumed(job, len(world.dispatch.take(job)), world.now)
    assert world.woken
    assert world.answer(poll).credit == {lease: 2048}


def test_credit_in_a_lost_reply_is_told_again(world: World) -> None:
    job, lease = world.leased()
    world.events((lease, 0, head()), (lease, 1, b"x" * 1024))
    world.dispatch.consumed(job, len(world.dispatch.take(job)), world.now)
    world.answer(world.poll(held=[lease]))  # lost
    poll = world.poll(held=[lease])
    assert world.dispatch.answer(poll, world.now) is None
    world.woken = 0
    world.pass_time(1.1)
    assert world.woken
    assert world.answer(poll).credit == {lease: 2048}


def test_whole_answers_get_credit_as_they_come(world: World) -> None:
    job, lease = world.leased()
    json = {"content-type": "application/json"}
    reply = world.events((lease, 0, head(headers=json)), (lease, 1, b"x" * 1024))
    assert reply.credit == {lease: 2048}
    assert not job.committed


def test_whole_answer_has_a_bound() -> None:
    world = World(Limits(window=1024, buffered=1500))
    job, lease = world.leased()
    world.events((lease, 0, head(headers={})), (lease, 1, b"x" * 1024))
    reply = world.events((lease, 2, b"x" * 1024))
    assert job.outcome is not None
    assert job.outcome.code == "response_too_large"
    assert reply.cancel == [lease]


def test_status_by_silence(world: World) -> None:
    world.answer(world.poll())
    agent = world.dispatch.agents["a"]
    assert agent.duty == DUTY
    seen = {s: agent.status(s, LIMITS) for s in (0, 74, 76, 599, 601)}
    assert seen == {0: "online", 74: "online", 76: "disconnected", 599: "disconnected", 601: "dead"}
