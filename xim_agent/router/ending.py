"""Whether an answer of server-sent events has said its last word. Pure; sees each byte once, keeps a few."""

import re

_BREAK = re.compile(rb"\r\n\r\n|\n\n|\r\r")  # between two events
_LAST = re.compile(rb"data: ?\[DONE\]\s*$|event: ?(?:response\.(?:completed|incomplete|failed)|error)\s*$", re.M)
_HEAD = 64  # bytes of an event, more than any last word or name of one has
_CUT = b"?"


class Ending:
    """`[DONE]`, or for `/v1/responses` an event whose name says that nothing follows (OpenAI, "Streaming events")."""

    def __init__(self) -> None:
        self._last = self._open = b""

    def feed(self, data: bytes) -> None:
        *whole, rest = _BREAK.split(self._open + data)
        for event in reversed(whole):
            if event.strip():
                self._last = event[:_HEAD]
                break
        self._open = rest if len(rest) <= 2 * _HEAD else rest[:_HEAD] + _CUT + rest[-3:]

    @property
    def between(self) -> bool:
        """Whether an event of our own can begin as it stands: the last one is complete."""
        return bool(self._last) and not self._open.strip()

    @property
    def said(self) -> bool:
        return self.between and _LAST.match(self._last) is not None
