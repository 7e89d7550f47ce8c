"""One HTTP/1.1 exchange as the router's servers write it: a whole request in one piece, the head of a plain reply.

h11 writes the heads of requests, once each. Of replies only the plainest ones are read here; whatever else comes is for
httpcore, from its first byte on, so that what is an error, and which, is not said here.
"""

import re
from collections.abc import Mapping
from functools import lru_cache

import h11

_HEAD = re.compile(rb"HTTP/1\.1 200(?: [ -~]*)?\r\n((?:[A-Za-z0-9-]+: ?[ -~]*\r\n)+)\r\n")
_SIZE = re.compile(r"[0-9]{1,18}")
Headers = tuple[tuple[str, str], ...]


@lru_cache(64)
def _head(method: str, target: bytes, host: bytes, headers: Headers) -> bytes:
    pairs = [(b"host", host), *((name.encode("ascii"), value.encode("ascii")) for name, value in headers)]
    head = h11.Connection(h11.CLIENT).send(h11.Request(method=method, target=target, headers=pairs))
    assert head is not None
    return head.removesuffix(b"\r\n")


def request(method: str, target: bytes, host: bytes, headers: Mapping[str, str], body: bytes) -> bytes:
    """`headers` without the length. Raises h11.LocalProtocolError for what cannot be sent."""
    head = _head(method, target, host, tuple(headers.items()))
    return b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body)


def size_of(headers: Mapping[str, str]) -> int | None:
    """Of the body of a reply after which its connection can be used again, in bytes; `headers` with lower-case names.

    None: it has another end than its length, or the connection ends with it.
    """
    length = headers.get("content-length", "")
    if "transfer-encoding" in headers or headers.get("connection", "keep-alive").lower() != "keep-alive":
        return None
    return int(length) if _SIZE.fullmatch(length) else None


def plain(data: bytes) -> tuple[dict[str, str], int, int] | None:
    """(headers, where the body begins, where it ends) of a 200 whose head is whole and has nothing odd; else None."""
    found = _HEAD.match(data)
    if found is None:
        return None
    lines = found[1].decode("ascii").split("\r\n")[:-1]
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip(" ")
    size = size_of(headers)
    if size is None or len(headers) < len(lines):
        return None
    return headers, found.end(), found.end() + size
