"""MessagePack of wire-protocol §5, both ends: sizes first, then types. Decoding raises nothing but `CodecError`."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Raw

from xim_agent.mesh.messages import (
    MAX_EVENTS,
    MAX_POLL_REPLY,
    End,
    Error,
    EventsReply,
    EventsRequest,
    Head,
    Lease,
    OddLease,
    PollOrders,
    PollReply,
    PollRequest,
)

Kind = Literal["head", "data", "end", "error"]
Payload = Head | bytes | End | Error
T = TypeVar("T")

# A poll request lists held leases (at most 5 bytes each) and conditions; thousands of leases stay far below.
MAX_POLL_REQUEST = 1024 * 1024

_PAYLOADS: dict[str, Any] = {"head": Head, "data": bytes, "end": End, "error": Error}
_encoder = msgspec.msgpack.Encoder()
_decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {}


class CodecError(ValueError):
    """The bytes are too many, are not MessagePack, or have another shape. `code` is stable."""

    def __init__(self, code: Literal["too_large", "malformed"], message: str) -> None:
        super().__init__(message)
        self.code = code


def encode(message: Any) -> bytes:
    """Any message of `messages.py`, as the map of the protocol."""
    return _encoder.encode(message)


def decode(data: bytes | Raw, kind: type[T] | Any, limit: int) -> T:
    """`limit` in bytes of encoded map."""
    if len(memoryview(data)) > limit:
        raise CodecError("too_large", f"{len(memoryview(data))} bytes, the limit is {limit}")
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    try:
        result: T = decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise CodecError("malformed", str(error)) from None
    return result


def decode_poll_request(data: bytes) -> PollRequest:
    return decode(data, PollRequest, MAX_POLL_REQUEST)


class _Received(PollOrders, frozen=True):
    leases: list[Raw] = msgspec.field(default_factory=list)


class _Named(msgspec.Struct):
    id: int


def decode_poll_reply(data: bytes, nameless: Callable[[str], None] = lambda reason: None) -> PollReply:
    """One odd lease costs itself only: it comes as `OddLease`, or not at all and to `nameless` when it has no id."""
    received: _Received = decode(data, _Received, MAX_POLL_REPLY)
    leases = []
    for raw in received.leases:
        try:
            leases.append(_lease(raw))
        except CodecError as error:
            nameless(str(error))
    orders = {name: getattr(received, name) for name in PollOrders.__struct_fields__}
    return PollReply(leases=leases, **orders)


def _lease(raw: Raw) -> Lease:
    try:
        return decode(raw, Lease, MAX_POLL_REPLY)
    except CodecError as error:
        named: _Named = decode(raw, _Named, MAX_POLL_REPLY)
        return OddLease(named.id, "", "", "", {}, None, False, "", 0, 0, flaw=str(error))


def encode_events(boot: str, frames: Sequence[bytes | Raw]) -> bytes:
    """An `EventsRequest`; encoded frames are put behind the length of their array as they are."""
    empty = _encoder.encode(EventsRequest(boot=boot, frames=[]))
    return b"".join((empty[:-1], b"\xdd", len(frames).to_bytes(4, "big"), *frames))


def decode_events_request(data: bytes) -> EventsRequest:
    """The frames stay encoded: one bad frame must cost its own lease only."""
    return decode(data, EventsRequest, MAX_EVENTS)


def decode_events_reply(data: bytes) -> EventsReply:
    return decode(data, EventsReply, MAX_EVENTS)


def encode_frame(lease: int, seq: int, kind: Kind, payload: Payload) -> bytes:
    return _encoder.encode((lease, seq, kind, payload))


def frame_lease(frame: bytes | Raw) -> int | None:
    """The lease of a frame that may be otherwise undecodable; None when not even that can be read."""
    try:
        parts: list[Raw] = decode(frame, list[Raw], MAX_EVENTS)
        return decode(parts[0], int, 16) if parts else None
    except CodecError:
        return None


def decode_frame(frame: bytes | Raw) -> tuple[int, int, Kind, Payload]:
    """(lease, seq, kind, payload); an unknown kind is a CodecError, which makes the lease `unknown`."""
    parts: tuple[int, int, Kind, Raw] = decode(frame, tuple[int, int, Kind, Raw], MAX_EVENTS)
    lease, seq, kind, raw = parts
    if lease < 0 or seq < 0:
        raise CodecError("malformed", "negative lease or seq")
    return lease, seq, kind, decode(raw, _PAYLOADS[kind], MAX_EVENTS)
