"""The outbox against a small model of the receiving side, through calls that are lost, repeated and reordered."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from xim_agent.mesh import codec
from xim_agent.mesh.messages import MAX_BATCH, End, Error, Head
from xim_agent.work.batch import Batch
from xim_agent.work.outbox import BATCH_SECONDS, MAX_DATA, MAX_IN_FLIGHT, RESEND_SECONDS, Outbox

HEAD = Head(200, {"content-type": "text/event-stream"})
END = End("complete", 0, 0, None, 1)


@dataclass
class Received:
    """What the router has of one lease."""

    frames: dict[int, tuple[str, Any]] = field(default_factory=dict)
    next: int = 0
    data: bytes = b""
    endings: int = 0


class Router:
    def __init__(self) -> None:
        self.leases: dict[int, Received] = {}
        self.raw: dict[tuple[int, int], bytes] = {}
        self.unknown: set[int] = set()

    def receive(self, batch: Batch) -> tuple[dict[int, int], list[int]]:
        assert len(codec.encode_events("b" * 32, batch.raw)) <= MAX_BATCH
        request = codec.decode_events_request(codec.encode_events("b" * 32, batch.raw))
        touched = set()
        for raw in request.frames:
            lease, seq, kind, payload = codec.decode_frame(raw)
            assert self.raw.setdefault((lease, seq), bytes(raw)) == bytes(raw), "cut again"
            touched.add(lease)
            got = self.leases.setdefault(lease, Received())
            got.frames.setdefault(seq, (kind, payload))
            while got.next in got.frames:
                kind, payload = got.frames[got.next]
                assert not got.endings, "frames after the ending"
                got.next += 1
                got.endings += kind in ("end", "error")
                got.data += payload if kind == "data" else b""
        known = touched - self.unknown
        acked = {lease: self.leases[lease].next - 1 for lease in known if self.leases[lease].next}
        return acked, sorted(touched & self.unknown)


class Traffic(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.outbox, self.router = Outbox(), Router()
        self.now = 0.0
        self.sent: dict[int, bytes] = {}
        self.credit: dict[int, int] = {}
        self.ended: set[int] = set()
        self.over: list[int] = []
        self.dropped: set[int] = set()
        # A call and what the router said to it; None while it has not got there.
        self.calls: list[tuple[Batch, Any]] = []

    @initialize()
    def begin(self) -> None:
        self.open(1000)

    @rule(credit=st.integers(0, 5000))
    def open(self, credit: int) -> None:
        lease = len(self.sent) + 1
        self.outbox.open(lease, credit)
        self.outbox.head(lease, HEAD)
        self.sent[lease], self.credit[lease] = b"", credit

    @rule(data=st.data(), chunk=st.binary(min_size=1, max_size=50), big=st.booleans())
    def write(self, data: st.DataObject, chunk: bytes, big: bool) -> None:
        lease = data.draw(st.sampled_from(sorted(self.sent)))
        room = self.outbox.room(lease)
        if lease not in self.ended | self.dropped:
            assert room == max(0, self.credit[lease] - len(self.sent[lease]))
        chunk = (chunk * (MAX_DATA // 25) if big else chunk)[:room]
        if chunk:
            self.outbox.data(lease, chunk)
            self.sent[lease] += chunk

    @rule(data=st.data(), more=st.integers(-10, 400_000))
    def grant(self, data: st.DataObject, more: int) -> None:
        lease = data.draw(st.sampled_from(sorted(self.sent)))
        total = self.credit[lease] + more
        assert self.outbox.grant({lease: total, 999: 5}) == ([lease] if more > 0 and self.alive(lease) else [])
        self.credit[lease] = max(total, self.credit[lease])

    def alive(self, lease: int) -> bool:
        return lease not in self.over and lease not in self.dropped

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(sorted(self.sent)))
        told = self.outbox.end(lease, END)
        assert told == (lease not in self.ended and lease not in self.dropped)
        if told:
            self.ended.add(lease)

    @rule(seconds=st.sampled_from([0.0, 0.004, 0.011, 1.1]))
    def take(self, seconds: float) -> None:
        self.now += seconds
        batch = self.outbox.take(self.now)
        if batch is not None:
            self.calls.append((batch, None))
            assert len(self.calls) <= MAX_IN_FLIGHT
            assert all(frame.seq > frame.stream.acked for frame in batch.frames)

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), times=st.integers(1, 2))
    def arrive(self, data: st.DataObject, times: int) -> None:
        k = data.draw(st.integers(0, len(self.calls) - 1))
        batch = self.calls[k][0]
        for _ in range(times):
            reply = self.router.receive(batch)
        self.calls[k] = batch, reply

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), lost=st.booleans())
    def finish(self, data: st.DataObject, lost: bool) -> None:
        batch, reply = self.calls.pop(data.draw(st.integers(0, len(self.calls) - 1)))
        if lost or reply is None:
            self.outbox.failed(batch)
        else:
            self.apply(batch, reply)

    def apply(self, batch: Batch, reply: Any) -> None:
        acked, unknown = reply
        self.over += self.outbox.delivered(batch, acked, self.now)
        for lease in unknown:
            self.outbox.drop(lease)

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        """The router loses a lease, and says so in some reply."""
        lease = data.draw(st.sampled_from(sorted(self.sent)))
        self.router.unknown.add(lease)
        if self.outbox.drop(lease):
            self.dropped.add(lease)

    @invariant()
    def memory_is_counted(self) -> None:
        held = [f for s in self.outbox._streams.values() for f in s.frames]
        statistics = self.outbox.statistics()
        assert statistics.unacknowledged == len(held)
        assert statistics.unacknowledged_bytes == sum(len(f.raw) for f in held)
        assert self.outbox._urgent == sum(f.urgent for f in held if f.queued)

    def teardown(self) -> None:
        """The link heals: everything arrives, once and whole."""
        while self.calls:
            self.outbox.failed(self.calls.pop()[0])
        for lease in self.sent:
            self.outbox.end(lease, END)
        for _ in range(10_000):
            self.now += 0.011
            batch = self.outbox.take(self.now)
            if batch is None:
                break
            self.apply(batch, self.router.receive(batch))
        self.now += RESEND_SECONDS
        while (batch := self.outbox.take(self.now)) is not None:
            self.apply(batch, self.router.receive(batch))
            self.now += 0.011
        assert self.outbox.due(self.now) is None
        assert self.outbox.statistics().unacknowledged == 0
        assert len(self.over) == len(set(self.over))
        for lease, sent in self.sent.items():
            if lease in self.dropped:
                assert lease not in self.over
                continue
            got = self.router.leases[lease]
            assert (got.data, got.endings) == (sent, 1)
            assert lease in self.over


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def frames(batch: Batch | None) -> list[tuple[int, int, str]]:
    return [] if batch is None else [codec.decode_frame(raw)[:3] for raw in batch.raw]


@pytest.fixture
def outbox() -> Outbox:
    box = Outbox()
    box.open(1, 10_000_000)
    return box


def test_what_leaves_at_once_and_what_waits(outbox: Outbox) -> None:
    outbox.head(1, HEAD)
    assert outbox.due(5.0) == 5.0  # nothing has left for 10 ms
    outbox.data(1, b"a")
    assert frames(outbox.take(5.0)) == [(1, 0, "head"), (1, 1, "data")]
    outbox.data(1, b"b")
    assert outbox.due(5.001) == 5.0 + BATCH_SECONDS
    assert outbox.take(5.001) is None
    outbox.open(2, 9)
    outbox.head(2, HEAD)
    assert outbox.take(5.002) is None
    outbox.end(2, Error("internal", "x", False))
    assert outbox.due(5.002) == 5.002
    second = outbox.take(5.002)
    assert frames(second) == [(1, 2, "data"), (2, 0, "head"), (2, 1, "error")]
    outbox.end(1, END)
    assert outbox.due(5.003) is None  # two calls are out
    assert outbox.take(6.0) is None
    outbox.failed(second)
    assert frames(outbox.take(5.004)) == [(1, 2, "data"), (2, 0, "head"), (2, 1, "error"), (1, 3, "end")]


def test_a_delivered_frame_without_acknowledgement_goes_again_after_a_second(outbox: Outbox) -> None:
    outbox.end(1, END)
    batch = outbox.take(0.0)
    assert outbox.delivered(batch, {}, 0.1) == []
    assert outbox.due(0.2) == 0.1 + RESEND_SECONDS
    again = outbox.take(1.2)
    assert [bytes(r) for r in again.raw] == [bytes(r) for r in batch.raw]
    assert outbox.statistics().resent_frames == 1
    assert outbox.delivered(again, {1: 0}, 1.3) == [1]
    assert outbox.due(9.0) is None


def test_an_acknowledgement_of_what_was_never_sent_loses_nothing(outbox: Outbox) -> None:
    outbox.data(1, b"a")
    batch = outbox.take(0.0)
    outbox.data(1, b"b")
    outbox.end(1, END)
    assert outbox.delivered(batch, {1: 99}, 0.1) == []
    assert frames(outbox.take(0.2)) == [(1, 1, "data"), (1, 2, "end")]


def test_large_data_is_cut_once(outbox: Outbox) -> None:
    outbox.data(1, bytes(3 * MAX_DATA + 1))
    assert outbox.totals(1) == (3 * MAX_DATA + 1, 4)
    sizes = []
    while (batch := outbox.take(len(sizes) / 50)) is not None:
        sizes.append(len(codec.encode_events("b", batch.raw)))
        outbox.delivered(batch, {}, 0.0)
    assert max(sizes) <= MAX_BATCH
    assert len(sizes) == 2


def test_only_endings_are_spooled(outbox: Outbox) -> None:
    outbox.data(1, b"a")
    outbox.end(1, END)
    outbox.open(2, 0)
    assert [codec.decode_frame(raw)[:3] for raw in outbox.unacknowledged_endings()] == [(1, 1, "end")]


def test_no_more_is_taken_than_there_is_credit(outbox: Outbox) -> None:
    assert outbox.data(1, bytes(9_999_999)) == (9_999_999, True)
    assert outbox.data(1, b"ab") == (1, False)
    assert outbox.data(1, b"b") == (0, False)
    assert outbox.totals(1)[0] == 10_000_000
    outbox.grant({1: 10_000_002})
    assert outbox.data(1, b"bc") == (2, False)
    sent = [codec.decode_frame(raw) for raw in drained(outbox)]
    assert sum(len(frame[3]) for frame in sent) == 10_000_002
    assert [frame[1] for frame in sorted(sent)] == list(range(len(sent)))


def drained(outbox: Outbox) -> list[bytes]:
    found, now = [], 0.0
    while (batch := outbox.take(now)) is not None:
        found += batch.raw
        outbox.delivered(batch, {}, now)
        now += 0.02
    return found


def test_many_are_sent_by_length(outbox: Outbox) -> None:
    sizes = [n * 7 % 20 + 1 for n in range(20)]
    for size in sizes:
        outbox.data(1, bytes(size))
    batch = outbox.take(0.0)
    assert batch is not None
    sent = [codec.decode_frame(raw) for raw in batch.raw]
    assert [len(frame[3]) for frame in sent] == sorted(sizes)
    assert [len(frame[3]) for frame in sorted(sent)] == sizes
