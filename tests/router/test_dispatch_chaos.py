"""Calls lost, repeated and reordered at will: every answer arrives byte for byte and ends once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from fakes.dispatching import World, end, head
from hypothesis import given, settings
from hypothesis import strategies as st

from xim_agent.mesh.messages import EventsReply, Lease, PollReply
from xim_agent.router.fleet import Poll
from xim_agent.router.jobs import COMPLETE, Job, Limits

CEILING = 2
WINDOW = 80  # two of the largest pieces, as the real one is two of the largest frames
PIECES = st.lists(st.binary(max_size=40), max_size=8)
STEPS = st.lists(st.tuples(st.sampled_from("ppaaAsssSdddDtcg"), st.integers(0, 1000)), max_size=120)


@dataclass
class Output:
    """What the agent has to send for one lease: within credit, kept until acknowledged."""

    frames: list[Any]
    credit: int
    acked: int = -1
    sent: int = -1

    def sendable(self) -> list[tuple[int, Any]]:
        used, found = 0, []
        for seq, payload in enumerate(self.frames):
            used += len(payload) if isinstance(payload, bytes) else 0
            if used > self.credit:
                break
            if seq > self.acked:
                found.append((seq, payload))
        return found

    def cancel(self) -> None:
        """Nothing new after what was sent, but the ending."""
        if self.sent < len(self.frames) - 1:
            kept = self.frames[: self.sent + 1]
            self.frames = [*kept, end([f for f in kept if isinstance(f, bytes)], "cancelled")]


@dataclass
class Client:
    job: Job
    pieces: list[bytes]
    got: bytes = b""
    left: bool = False


@dataclass
class Chaos:
    """An agent, its clients and a network that does as the steps say."""

    world: World = field(default_factory=lambda: World(Limits(window=WINDOW, retries=0)))
    held: dict[int, Output] = field(default_factory=dict)
    over: set[int] = field(default_factory=set)
    poll: Poll | None = None
    flying: list[list[Any]] = field(default_factory=list)
    clients: list[Client] = field(default_factory=list)

    def send_poll(self) -> None:
        capacity = CEILING - len(self.held)
        self.poll = self.world.poll(capacity=capacity, held=sorted(self.held), wait_ms=5000)

    def answer_poll(self, *, lost: bool = False) -> None:
        if self.poll is None or (reply := self.world.dispatch.answer(self.poll, self.world.now)) is None:
            return
        self.poll = None
        if not lost:
            self.receive(reply)

    def receive(self, reply: PollReply | EventsReply) -> None:
        for lease in getattr(reply, "leases", []):
            self.accept(lease)
        for lease_id, total in reply.credit.items():
            if lease_id in self.held:
                self.held[lease_id].credit = max(self.held[lease_id].credit, total)
        for lease_id, seq in getattr(reply, "acked", {}).items():
            if (output := self.held.get(lease_id)) is not None:
                output.acked = max(output.acked, seq)
                if output.acked == len(output.frames) - 1:
                    self.forget(lease_id)
        for lease_id in getattr(reply, "unknown", []):
            self.forget(lease_id)
        for lease_id in reply.cancel:
            if lease_id in self.held:
                self.held[lease_id].cancel()

    def accept(self, lease: Lease) -> None:
        if lease.id in self.held or lease.id in self.over:
            return
        pieces = next(c.pieces for c in self.clients if c.job.request == lease.request)
        self.held[lease.id] = Output([head(), *pieces, end(pieces)], lease.credit)
        assert len(self.held) <= CEILING

    def forget(self, lease_id: int) -> None:
        if self.held.pop(lease_id, None) is not None:
            self.over.add(lease_id)

    def send(self, choice: int, *, all_of_it: bool = False) -> None:
        frames = [(lease, *frame) for lease, output in self.held.items() for frame in output.sendable()]
        if frames:
            first = 0 if all_of_it else choice % len(frames)
            batch = frames[first:] if all_of_it else frames[first : first + 1 + choice % 5]
            for lease, seq, _ in batch:
                self.held[lease].sent = max(self.held[lease].sent, seq)
            self.flying.append(batch)

    def deliver(self, choice: int, *, lost: bool = False, twice: bool = False) -> None:
        """One of the calls in flight arrives; its reply may get lost, and it may arrive again later."""
        if self.flying:
            batch = self.flying[choice % len(self.flying)]
            if not twice:
                self.flying.remove(batch)
            reply = self.world.events(*batch)
            if not lost:
                self.receive(reply)

    def take(self) -> None:
        for client in self.clients:
            if not client.left and client.job.chunks:
                data = self.world.dispatch.take(client.job)
                client.got += data
                assert b"".join(client.pieces).startswith(client.got)
                self.world.dispatch.consumed(client.job, len(data), self.world.now)

    def leave(self, choice: int) -> None:
        if self.clients:
            client = self.clients[choice % len(self.clients)]
            client.left = True
            self.world.dispatch.release(client.job, self.world.now)

    def step(self, what: str, choice: int) -> None:
        does: dict[str, Callable[[], None]] = {
            "p": self.send_poll,
            "a": self.answer_poll,
            "A": lambda: self.answer_poll(lost=True),
            "s": lambda: self.send(choice),
            "S": lambda: self.send(choice, all_of_it=True),
            "d": lambda: self.deliver(choice, lost=choice % 3 == 0),
            "D": lambda: self.deliver(choice, twice=True),
            "t": lambda: self.world.pass_time(choice / 1000),
            "c": self.take,
            "g": lambda: self.leave(choice) if choice % 4 == 0 else None,
        }
        does[what]()

    def settle(self) -> None:
        """From here on the network works."""
        for _ in range(400):
            running = [c for c in self.clients if not c.left and not c.job.outcome]
            if not (running or self.held or self.flying or self.world.dispatch.agents["a"].grants):
                break
            self.send_poll()
            self.world.pass_time(0.5)
            self.answer_poll()
            self.send(0, all_of_it=True)
            while self.flying:
                self.deliver(0)
            self.take()
        self.take()


@settings(max_examples=300, deadline=None)
@given(answers=st.lists(PIECES, min_size=1, max_size=4), steps=STEPS)
def test_every_answer_is_whole_and_ends_once(answers: list[list[bytes]], steps: list[tuple[str, int]]) -> None:
    chaos = Chaos()
    chaos.send_poll()
    for pieces in answers:
        chaos.clients.append(Client(chaos.world.submit(), pieces))
    endings: dict[str, Any] = {}
    for what, choice in steps:
        chaos.step(what, choice)
        for client in chaos.clients:
            if client.job.outcome is not None:
                assert endings.setdefault(client.job.request, client.job.outcome) is client.job.outcome
    chaos.settle()
    for client in chaos.clients:
        if not client.left:
            assert client.job.outcome is COMPLETE
            assert client.got == b"".join(client.pieces)
    assert not chaos.held, "every lease ended on both sides"
    assert not chaos.world.dispatch.agents["a"].grants
    counts = chaos.world.dispatch.statistics().counts
    assert counts["submitted"] == counts.get("completed", 0) + counts.get("cancelled", 0)


@pytest.mark.parametrize("lost", [(3,), (2, 3), (2, 3, 3), (1, 2, 3, 3)])
@pytest.mark.parametrize("cut_poll", [False, True])
def test_credit_comes_however_many_replies_are_lost(lost: tuple[int, ...], cut_poll: bool) -> None:
    """The agent has sent what its credit allows; every reply that said more is gone."""
    chaos = Chaos()
    chaos.send_poll()
    chaos.answer_poll()
    chaos.send_poll()
    pieces = [b"a" * 40, b"b" * 5, b"c" * 35, b"d" * 40]
    chaos.clients.append(Client(chaos.world.submit(), pieces))
    chaos.answer_poll()
    chaos.send_poll()
    frames = chaos.held[1].frames
    for seq in sorted({0, 1, 2, 3} - set(lost)) + list(lost):
        chaos.held[1].sent = max(chaos.held[1].sent, seq)
        chaos.flying.append([(1, seq, frames[seq])])
        chaos.deliver(0, lost=seq in lost)
        chaos.take()
    chaos.world.pass_time(6)
    chaos.answer_poll(lost=cut_poll)
    chaos.settle()
    assert chaos.clients[0].job.outcome is COMPLETE
    assert chaos.clients[0].got == b"".join(pieces)
    assert chaos.world.now < 20
