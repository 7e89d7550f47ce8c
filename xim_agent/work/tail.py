"""Sees that an event stream which ended cleanly was cut: vLLM reports a lost engine as its last event."""

import re
from collections import deque

import msgspec

TAIL_BYTES = 4096
_BREAK = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_LINE = re.compile(rb"\r\n|\n|\r")


class Tail:
    """The last 4 KiB of a body; keeps whole chunks, so that a chunk costs no copy."""

    def __init__(self) -> None:
        self._chunks: deque[bytes] = deque()
        self._size = 0

    def add(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self._size += len(chunk)
        while self._size - len(self._chunks[0]) >= TAIL_BYTES:
            self._size -= len(self._chunks.popleft())

    def error(self) -> str | None:
        """The message of the top-level `error` in the last event before `[DONE]`; None when there is none."""
        return stream_error(b"".join(self._chunks)[-TAIL_BYTES:])


def stream_error(tail: bytes) -> str | None:
    for event in reversed(_BREAK.split(tail)):
        data = b"\n".join(
            line[5:].removeprefix(b" ") for line in _LINE.split(event) if line.startswith(b"data:")
        ).strip()
        if not data or data == b"[DONE]":
            continue
        try:
            value = msgspec.json.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        error = value.get("error") if isinstance(value, dict) else None
        if not error:
            return None
        message = error.get("message") if isinstance(error, dict) else error
        return str(message)[:500]
    return None
