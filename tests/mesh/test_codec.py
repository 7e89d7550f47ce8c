from typing import Any

import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from xim_agent.mesh import codec, content
from xim_agent.mesh.messages import MAX_EVENTS, End, Error, EventsReply, Head, Lease, OddLease, PollReply, PollRequest

ids = st.integers(0, 2**53)
text = st.text(max_size=20)
payloads = st.one_of(
    st.tuples(st.just("head"), st.builds(Head, st.integers(100, 599), st.dictionaries(text, text, max_size=3))),
    st.tuples(st.just("data"), st.binary(max_size=100)),
    st.tuples(
        st.just("end"),
        st.builds(End, st.sampled_from(["complete", "cancelled", "deadline"]), ids, ids, st.none() | ids, ids),
    ),
    st.tuples(st.just("error"), st.builds(Error, st.sampled_from(["engine_lost", "internal"]), text, st.booleans())),
)


@given(ids, ids, payloads)
def test_a_frame_arrives_as_it_was(lease: int, seq: int, kind_payload: Any) -> None:
    kind, payload = kind_payload
    frame = codec.encode_frame(lease, seq, kind, payload)
    assert codec.decode_frame(frame) == (lease, seq, kind, payload)
    assert codec.frame_lease(frame) == lease
    request = codec.decode_events_request(codec.encode_events("boot", [Raw(frame), Raw(frame)]))
    assert [bytes(f) for f in request.frames] == [frame, frame]


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | ids | text | st.binary(max_size=9), lambda x: st.lists(x) | st.dictionaries(text, x)
    ).map(msgspec.msgpack.encode)
)
def test_nothing_but_codec_errors(data: bytes) -> None:
    for decode in (
        codec.decode_poll_request, codec.decode_poll_reply, codec.decode_events_request, codec.decode_events_reply,
        codec.decode_frame,
    ):  # fmt: skip
        try:
            decode(data)
        except codec.CodecError:
            pass
    codec.frame_lease(data)


@pytest.mark.parametrize(
    "data",
    [b"\x91" * 100_000, b"\x83\xa1", b"\xc1", msgspec.msgpack.encode({"credit": {"x": 1}}), msgspec.msgpack.encode([])],
    ids=["nested", "cut", "never used byte", "wrong key type", "wrong shape"],
)
def test_malformed(data: bytes) -> None:
    with pytest.raises(codec.CodecError) as error:
        codec.decode_poll_reply(data)
    assert error.value.code == "malformed"


LEASE = Lease(7, "r", "POST", "/tokenize", {}, b"{}", False, "t", 1000, 10)
odd_changes = st.dictionaries(
    st.sampled_from([f.name for f in msgspec.structs.fields(Lease) if f.name != "id"]), st.none() | st.floats() | text
)


@given(st.lists(odd_changes, max_size=4))
def test_an_odd_lease_costs_itself_only(odd: list[dict[str, Any]]) -> None:
    good = msgspec.to_builtins(LEASE, builtin_types=(bytes,))
    leases = [good | change | {"id": 100 + n} for n, change in enumerate(odd)]
    lost: list[str] = []
    data = msgspec.msgpack.encode({"leases": [*leases, {"id": "x"}, 5, good], "generation": 2})
    reply = codec.decode_poll_reply(data, lost.append)
    assert [lease.id for lease in reply.leases] == [*range(100, 100 + len(odd)), 7]
    assert reply.leases[-1] == LEASE
    assert (reply.generation, len(lost)) == (2, 2)
    for change, lease in zip(odd, reply.leases, strict=False):
        if {"stream", "credit"} & change.keys():
            assert isinstance(lease, OddLease)
            assert lease.flaw


def test_too_large() -> None:
    with pytest.raises(codec.CodecError) as error:
        codec.decode_events_request(b"\x00" * (MAX_EVENTS + 1))
    assert error.value.code == "too_large"


def test_types_on_the_wire() -> None:
    """Maps with str keys, int lease keys, bin bodies, nil for the unknown; unknown keys are passed over."""
    lease = Lease(1, "r", "POST", "/tokenize", {}, b"\xff", False, "t", 1000, 10)
    wire = msgspec.msgpack.decode(codec.encode(PollReply(leases=[lease], credit={7: 9})))
    assert wire["leases"][0]["body"] == b"\xff"
    assert wire["credit"] == {7: 9}
    assert wire["idle_reason"] is None
    assert codec.decode_events_reply(msgspec.msgpack.encode({"acked": {3: 4}, "new": {}})) == EventsReply(acked={3: 4})
    with pytest.raises(codec.CodecError):
        codec.decode_poll_request(codec.encode(PollReply()))
    fields = {f.name for f in msgspec.structs.fields(PollRequest)}
    assert fields >= {"boot", "n", "phase", "capacity", "wait_ms", "held", "model", "ceiling", "load", "progress"}


def test_an_unknown_kind_is_refused_with_its_lease_known() -> None:
    frame = msgspec.msgpack.encode([5, 0, "news", {}])
    with pytest.raises(codec.CodecError):
        codec.decode_frame(frame)
    assert codec.frame_lease(frame) == 5


@given(st.binary(max_size=5000))
def test_content_round_trip(body: bytes) -> None:
    headers, packed = content.pack(body)
    assert len(packed) <= len(body)
    assert content.unpack(packed, headers.get("content-encoding", ""), 5000) == body


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (zstandard.compress(bytes(10_000_000)), "zstd"),
        (b"x" * 1001, ""),
        (b"not zstd", "zstd"),
        (b"", "gzip"),
        (
            zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=27)).compress(
                bytes(99)
            ),
            "zstd, zstd",
        ),
    ],
    ids=["bomb", "plain", "garbage", "gzip", "twice"],
)
def test_content_refused(body: bytes, encoding: str) -> None:
    with pytest.raises(content.ContentError):
        content.unpack(body, encoding, 1000)
