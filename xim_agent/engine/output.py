"""What vLLM writes: its level, the phase of a start it tells of, and the end of it kept for the error. Pure."""

import logging
import re

_LEVEL = re.compile(r"^(?:\([^)]*\) )?(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b")
# The first that matches a line names what the start is at.
_PHASES = (
    (re.compile(r"non-default args|Initializing a V\d LLM engine"), "starting vLLM"),
    (re.compile(r"Starting to load model|Loading safetensors|Loading weights"), "loading weights"),
    (re.compile(r"torch\.compile|Dynamo bytecode|Compiling a graph|Inductor|Warming up model for the compilation"),
     "compiling"),
    (re.compile(r"Capturing (CUDA|cuda) ?graph|[Gg]raph capturing"), "capturing graphs"),
    (re.compile(r"KV cache size|profile, create kv cache"), "making the KV cache"),
    (re.compile(r"Starting vLLM (API )?server|Application startup complete"), "opening the socket"),
)  # fmt: skip
TAIL_BYTES = 64 * 1024
LINE_BYTES = 8 * 1024


def level_of(line: str) -> int:
    """vLLM's own level of a line; info for one without (progress bars, other libraries)."""
    found = _LEVEL.match(line)
    return logging.getLevelNamesMapping()[found[1]] if found else logging.INFO


def phase_of(line: str) -> str | None:
    return next((phase for pattern, phase in _PHASES if pattern.search(line)), None)


class Tail:
    """The last 64 KiB of a stream, from the beginning of a line or at least of a word."""

    def __init__(self) -> None:
        self._kept = bytearray()
        self._cut = False

    def add(self, data: bytes | bytearray) -> None:
        self._kept += data
        self._cut = self._cut or len(self._kept) > TAIL_BYTES
        del self._kept[:-TAIL_BYTES]

    def clear(self) -> None:
        self._kept.clear()
        self._cut = False

    def text(self) -> str:
        end = self._kept.find(b"\n") if b"\n" in self._kept else self._kept.find(b" ")
        return self._kept[end + 1 if self._cut else 0 :].decode(errors="replace")


class Lines:
    """Cuts a byte stream into lines of at most 8 KiB; a carriage return ends one too (progress bars)."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes | bytearray) -> list[str]:
        *whole, self._rest = re.split(rb"[\r\n]", self._rest + data)
        while len(self._rest) > LINE_BYTES:
            # Between two words: half of a secret would not be recognised as one.
            end = self._rest.rfind(b" ", 0, LINE_BYTES) + 1 or LINE_BYTES
            whole.append(self._rest[:end])
            self._rest = self._rest[end:]
        return [line.decode(errors="replace").rstrip() for line in whole if line.strip()]
