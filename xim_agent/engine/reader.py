"""Reads one answer of vLLM from the bytes of its connection; no I/O.

h11 reads the head, and whatever is not plain. By far the most bytes are chunks as uvicorn writes them, `HEX CR LF data
CR LF`, and those h11 takes 20 us each for: they are read here, and at the first byte of anything else, from the
beginning of that chunk on, all goes to h11 again. So what is an error, and which, is h11's to say.
"""

import re
from typing import Any

import h11

# vLLM's heads have about 200 bytes; httpcore's limit.
MAX_HEAD = 100 * 1024
# More hexadecimal digits than these are no chunk of vLLM.
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,7})\r\n")
_PART_OF_SIZE = re.compile(rb"[0-9A-Fa-f]{1,7}\r?")
CLOSED = "the connection was closed before the answer was complete"
_BLANK_LINE = re.compile(rb"\n\r?\n")
_CLIENT_HEADERS = [(b"accept", b"*/*"), (b"accept-encoding", b"identity"), (b"user-agent", b"xerotier-xim-agent")]


class Malformed(ValueError):
    """This is not an answer, or not a whole one. `body`: what came of it with the last bytes, before the error."""

    def __init__(self, why: str, body: bytes = b"") -> None:
        super().__init__(why)
        self.body = body


class Reader:
    """`status` is 0 until the head is there; `done` with the last byte of the body, and nothing may be fed then.

    `headers` by lower-case name, latin-1: sent on as that, the client gets the bytes that came, whatever they mean.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.done = False
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
        self._plain = False
        self._rest = b""  # the begin of a chunk's size; before, the last bytes of the head so far
        self._left = 0  # of the chunk under way, its CR LF included

    def request(self, path: str, headers: dict[str, str], body: bytes) -> bytes:
        """The head of the request; `body` follows it as it is. Raises Malformed for headers that cannot be sent."""
        own = [(b"host", b"engine"), *(h for h in _CLIENT_HEADERS if h[0].decode() not in headers)]
        own += [(name.encode("utf-8"), value.encode("utf-8")) for name, value in headers.items()]
        try:
            asked = h11.Request(method="POST", target=path, headers=[*own, (b"content-length", b"%d" % len(body))])
            head = self._h11.send(asked)
            self._h11.send(h11.Data(body))
            self._h11.send(h11.EndOfMessage())
        except h11.LocalProtocolError as error:
            raise Malformed(str(error)) from None
        assert head is not None
        return head

    def feed(self, data: bytes) -> bytes:
        """Bytes of the body among `data`, which is empty at the end of the connection. Raises Malformed."""
        if not self._plain:
            return self._by_h11(data) if self.status else self._head(data)
        if not data:
            raise Malformed(CLOSED)
        if self._rest:
            data, self._rest = self._rest + data, b""
        if self._left:
            return self._continued(data)
        # One whole chunk with a size of two or three digits: what it is nearly always.
        length = len(data)
        size = length - (6 if length < 263 else 7)
        head = b"%x\r\n" % size if size > 0 else b""
        begin = len(head)
        if begin + size + 2 == length and data.startswith(head) and data.endswith(b"\r\n"):
            return data[begin:-2]
        return self._several(data, 0, [])

    def _several(self, data: bytes, at: int, parts: list[bytes]) -> bytes:
        """From the begin of a chunk at `at` on."""
        while at < len(data):
            found = _SIZE.match(data, at)
            if found is None:
                if _PART_OF_SIZE.fullmatch(data, at):
                    self._rest = data[at:]
                    break
                return self._handed_over(data[at:], parts)
            begin = found.end()
            end = begin + int(found[1], 16)
            if end == begin:
                return self._handed_over(data[at:], parts)
            if end + 2 > len(data):
                parts.append(data[begin:end])
                self._left = end + 2 - len(data)
                if end < len(data) and data[end:] != b"\r":
                    raise Malformed("malformed chunk footer", b"".join(parts))
                break
            if data[end : end + 2] != b"\r\n":
                parts.append(data[begin:end])
                raise Malformed("malformed chunk footer", b"".join(parts))
            parts.append(data[begin:end])
            at = end + 2
        return b"".join(parts)

    def _continued(self, data: bytes) -> bytes:
        left = self._left
        if len(data) < left - 2:
            self._left = left - len(data)
            return data
        body, footer = data[: max(0, left - 2)], data[max(0, left - 2) : left]
        self._left = left - len(body) - len(footer)
        if footer != b"\r\n"[2 - min(2, left) :][: len(footer)]:
            raise Malformed("malformed chunk footer", body)
        return self._several(data, left, [body])

    def _handed_over(self, data: bytes, parts: list[bytes]) -> bytes:
        """To h11, which is at the begin of a chunk too: it has seen none of the ones before."""
        self._plain = False
        try:
            parts.append(self._by_h11(data))
        except Malformed as error:
            raise Malformed(str(error), b"".join((*parts, error.body))) from None
        return b"".join(parts)

    def _head(self, data: bytes) -> bytes:
        """h11 gets the head and no more, so that it is at the begin of the body when the rest is read here."""
        while not self.status:
            before = len(self._rest)
            blank = _BLANK_LINE.search(self._rest + data)
            if blank is None:
                self._rest = (self._rest + data)[-2:]
                return self._by_h11(data)
            head, data, self._rest = data[: blank.end() - before], data[blank.end() - before :], b""
            self._by_h11(head)
            if self.done or not data:
                return b""
        return self._several(data, 0, []) if self._plain else self._by_h11(data)

    def _by_h11(self, data: bytes) -> bytes:
        parts: list[bytes] = []
        try:
            self._h11.receive_data(data)
            while True:
                event: Any = self._h11.next_event()
                if isinstance(event, h11.Data):
                    parts.append(bytes(event.data))
                elif isinstance(event, h11.Response):
                    self._begins(event)
                elif isinstance(event, h11.EndOfMessage):
                    self.done = True
                    return b"".join(parts)
                elif event is h11.NEED_DATA:
                    return b"".join(parts)
                elif not isinstance(event, h11.InformationalResponse):
                    raise Malformed("the connection was closed without an answer")
        except h11.RemoteProtocolError as error:
            raise Malformed(str(error) if data else CLOSED, b"".join(parts)) from None

    def _begins(self, head: h11.Response) -> None:
        self.status = head.status_code
        pairs: dict[str, list[str]] = {}
        for name, value in head.headers:
            pairs.setdefault(name.decode("ascii"), []).append(value.decode("latin-1"))
        self.headers = {name: ", ".join(values) for name, values in pairs.items()}
        self._plain = "transfer-encoding" in self.headers and self.status not in (204, 304)
