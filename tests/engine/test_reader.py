"""The reader of vLLM's answers against h11: same bytes, same end, same errors, however the bytes are cut."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from xim_agent.engine.reader import CLOSED, MAX_HEAD, Malformed, Reader

HEAD = b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
ENDS = [b"0\r\n\r\n", b"0\r\nx-trailer: 1\r\n\r\n", b"000\r\n\r\n", b"0;x=y\r\n\r\n"]


def asked() -> Reader:
    reader = Reader()
    reader.request("/v1/completions", {"content-type": "application/json"}, b"{}")
    return reader


def by_reader(pieces: Iterable[bytes]) -> tuple[Any, ...]:
    """(status, headers, body, whether it is whole or an error), with the end of the connection after the pieces."""
    reader, body, end = asked(), b"", "open"
    try:
        for piece in (*pieces, b""):
            body += reader.feed(piece)
            if reader.done:
                end = "whole"
                break
    except Malformed as error:
        body, end = body + error.body, "error"
    return reader.status, reader.headers, body, end


def by_h11(data: bytes) -> tuple[Any, ...]:
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
    connection.send(h11.Request(method="POST", target="/", headers=[("host", "engine"), ("content-length", "0")]))
    connection.send(h11.EndOfMessage())
    status, headers, body = 0, {}, b""
    try:
        for given_now in (data, b""):
            if given_now or connection.their_state is not h11.DONE:
                connection.receive_data(given_now)
            while (event := connection.next_event()) is not h11.NEED_DATA:
                if isinstance(event, h11.Response):
                    status = event.status_code
                    headers = {n.decode(): v.decode("latin-1") for n, v in event.headers}
                elif isinstance(event, h11.Data):
                    body += event.data
                elif isinstance(event, h11.EndOfMessage):
                    return status, headers, body, "whole"
                elif isinstance(event, h11.ConnectionClosed):
                    return status, headers, body, "error"
    except h11.RemoteProtocolError:
        pass
    return status, headers, body, "error"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


plain = st.binary(min_size=1, max_size=40).map(chunk)
odd = st.sampled_from(
    [b"A\r\n0123456789\r\n", b"00003\r\nabc\r\n", b"000000000003\r\nabc\r\n", b"3;ext=1\r\nabc\r\n", b"3 \r\nabc\r\n"]
)
WRONG = [
    *(b"3\r\nabcXX", b"3\r\nabc\rX", b"3\r\nabc\n\n", b"3\r\nabcX\n"),
    *(b"3\r\nabcd\r\n", b"3\r\nabc\n", b"3\r\nabc\rx", b"g\r\n", b"-1\r\nabc\r\n", b"0x3\r\nabc\r\n", b"3\nabc\r\n"),
    *(b"\r\n", b"f" * 21 + b"\r\n", b"1_0\r\n0123456789abcdef\r\n", b" 3\r\nabc\r\n", b"+3\r\nabc\r\n", b"3"),
]
wrong = st.sampled_from(WRONG)
bodies = st.tuples(st.lists(plain | plain | odd | wrong, max_size=6), st.sampled_from([*ENDS, b"", b"0\r\n"])).map(
    lambda parts: b"".join((*parts[0], parts[1]))
)
heads = st.sampled_from(
    [
        HEAD,
        b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD,
        HEAD.replace(b"\r\n", b"\n"),
        HEAD.replace(b"200 OK", b"422 Unprocessable Entity"),
        HEAD.replace(b"HTTP/1.1", b"HTTP/1.0"),
        HEAD.replace(b"transfer-encoding: chunked\r\n", b""),
        HEAD.replace(b"transfer-encoding: chunked", b"content-length: 7"),
        HEAD.replace(b"200 OK", b"204 No Content"),
        HEAD.replace(b"chunked", b"gzip, chunked"),
        HEAD.replace(b"HTTP/1.1", b"ICY"),
        HEAD.replace(b"uvicorn", "Grüße".encode()),
        b"\r\n" + HEAD,
    ]
)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(place % (len(data) + 1) for place in at)})
    return [data[a:b] for a, b in pairwise(places)]


@given(heads, bodies, st.lists(st.integers(0, 1000), max_size=8))
@example(HEAD, b"3\r\nabc\r\n0\r\n\r\n", list(range(200)))
@example(HEAD, b"3\r\nabcXX0\r\n\r\n", list(range(200)))
@example(HEAD, b"3\r\nabcXX0\r\n\r\n", [])
@example(HEAD, b"3\r\nabcXX0\r\n\r\n", [len(HEAD) + 5])
def test_as_h11_does(head: bytes, body: bytes, at: list[int]) -> None:
    assert by_reader(cut(head + body, at)) == by_h11(head + body)


@pytest.mark.parametrize("head", [HEAD, HEAD.replace(b"transfer-encoding: chunked", b"content-length: 7"), HEAD[:9]])
def test_a_connection_that_closes_is_called_that(head: bytes) -> None:
    reader = asked()
    reader.feed(head)
    with pytest.raises(Malformed, match=f"^{CLOSED}$"):
        reader.feed(b"")


@given(st.binary(max_size=200), st.lists(st.integers(0, 1000), max_size=8), st.booleans())
def test_any_bytes_as_h11_does(noise: bytes, at: list[int], headed: bool) -> None:
    data = HEAD * headed + noise
    assert by_reader(cut(data, at)) == by_h11(data)


@given(st.lists(st.binary(min_size=1, max_size=70_000), min_size=1, max_size=4), st.lists(st.integers(0), max_size=9))
def test_big_chunks_in_pieces(parts: list[bytes], at: list[int]) -> None:
    data = HEAD + b"".join(map(chunk, parts)) + b"0\r\n\r\n"
    status, _, body, end = by_reader(cut(data, at))
    assert (status, body, end) == (200, b"".join(parts), "whole")


def test_a_piece_is_given_as_soon_as_it_is_there() -> None:
    reader = asked()
    assert reader.feed(HEAD + b"5\r\nab") == b"ab"
    assert [reader.feed(piece) for piece in (b"c", b"de", b"\r", b"\n2", b"\r\n", b"fg\r\n")] == [
        b"c", b"de", b"", b"", b"", b"fg",
    ]  # fmt: skip
    assert not reader.done
    assert reader.feed(b"0\r\n\r\n") == b""
    assert reader.done


def refused_after(reader: Reader, piece: bytes) -> int:
    """How many bytes it takes until the reader has enough."""
    for fed in range(0, 10 * MAX_HEAD, len(piece)):
        try:
            reader.feed(piece)
        except Malformed:
            return fed
    raise AssertionError("never")


@pytest.mark.parametrize("endless", [b"a", b"x: y\r\n" * 100, b"\xff"])
def test_a_head_without_end_is_refused(endless: bytes) -> None:
    reader = asked()
    reader.feed(b"HTTP/1.1 200 OK\r\n")
    assert refused_after(reader, endless) <= MAX_HEAD


@pytest.mark.parametrize(("begin", "endless"), [(b"3;", b"x" * 100), (b"0\r\n", b"x: y\r\n" * 100), (b"f", b"f" * 100)])
def test_an_endless_chunk_head_or_trailer_is_refused(begin: bytes, endless: bytes) -> None:
    reader = asked()
    reader.feed(HEAD + begin)
    assert refused_after(reader, endless) <= MAX_HEAD


def test_headers_that_would_break_out_are_refused() -> None:
    for headers in ({"x": "a\r\nb: c"}, {"x y": "a"}, {"x": "a\0"}):
        with pytest.raises(Malformed):
            Reader().request("/v1/completions", headers, b"")


def test_the_request_is_as_asked() -> None:
    head = Reader().request("/v1/completions", {"accept": "text/event-stream", "x-slo-ms": "5"}, b"12345")
    line, *lines, last, _ = head.split(b"\r\n")
    assert line == b"POST /v1/completions HTTP/1.1"
    assert last == b""
    assert dict(x.lower().split(b": ", 1) for x in lines) == {
        b"host": b"engine", b"accept": b"text/event-stream", b"accept-encoding": b"identity",
        b"user-agent": b"xerotier-xim-agent", b"x-slo-ms": b"5", b"content-length": b"5",
    }  # fmt: skip


# Around every number of digits, and around what the reader takes for the number of digits.
LENGTHS = [1, 2, 9, 10, 14, 15, 16, 17, 200, 254, 255, 256, 257, 258, 4094, 4095, 4096, 4097, 70_000]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_chunk_that_comes_alone(length: int) -> None:
    data = (b"0123456789abcde\n" * 5000)[:length]
    pieces = [
        HEAD,
        chunk(data),
        chunk(data).upper(),
        chunk(data) + chunk(b"x"),
        b"%04x\r\n%b\r\n" % (length, data),
        ENDS[0],
    ]
    reader = asked()
    assert [reader.feed(piece) for piece in pieces] == [b"", data, data.upper(), data + b"x", data, b""]
    assert reader.done


@pytest.mark.parametrize("more", [-2, -1, 1, 2])
@pytest.mark.parametrize("length", LENGTHS[2:])
def test_a_chunk_that_comes_alone_with_a_wrong_size(length: int, more: int) -> None:
    pieces = [HEAD, b"%x\r\n%b\r\n" % (length + more, b"y" * length), ENDS[0]]
    assert by_reader(pieces) == by_h11(b"".join(pieces))


@pytest.mark.parametrize("footer", [b"XX", b"\rX", b"\n\n", b"X\n", b"X\r\n"])
@pytest.mark.parametrize("length", [16, 255, 256, 4095])
def test_a_chunk_that_comes_alone_with_a_wrong_footer(length: int, footer: bytes) -> None:
    pieces = [HEAD, b"%x\r\n%b%b" % (length, b"y" * length, footer), ENDS[0]]
    assert by_reader(pieces) == by_h11(b"".join(pieces))
