"""Sees that an event stream which ended cleanly was cut: vLLM reports a lost engine as its last event."""

import re

import msgspec

TAIL_BYTES = 4096
PIECES = 32
_BREAK = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_LINE = re.compile(rb"\r\n|\n|\r")


class Tail:
    """The last 4 KiB of a body and a bit more; keeps pieces as they come, so that one costs next to nothing."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def add(self, piece: bytes) -> None:
        self._pieces.append(piece)
        if len(self._pieces) > PIECES or len(piece) > TAIL_BYTES // PIECES * 4:
            self._pieces = [b"".join(self._pieces)[-TAIL_BYTES:]]

    def error(self) -> str | None:
        """The message of the top-level `error` in the last event before `[DONE]`; None when there is none."""
        return stream_error(b"".join(self._pieces)[-TAIL_BYTES:])


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
