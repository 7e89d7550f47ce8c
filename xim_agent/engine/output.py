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


def level_of(line: str) -> int:
    """vLLM's own level of a line; info for one without (progress bars, other libraries)."""
    found = _LEVEL.match(line)
    return logging.getLevelNamesMapping()[found[1]] if found else logging.INFO


def phase_of(line: str) -> str | None:
    return next((phase for pattern, phase in _PHASES if pattern.search(line)), None)


class Tail:
    """The last 64 KiB of a stream."""

    def __init__(self) -> None:
        self._kept = bytearray()

    def add(self, data: bytes | bytearray) -> None:
        self._kept += data
        del self._kept[:-TAIL_BYTES]

    def clear(self) -> None:
        self._kept.clear()

    def text(self) -> str:
        return self._kept.decode(errors="replace")


class Lines:
    """Cuts a byte stream into lines of at most 8 KiB; a carriage return ends one too (progress bars)."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes | bytearray) -> list[str]:
        *whole, self._rest = re.split(rb"[\r\n]", self._rest + data)
        if len(self._rest) > 8192:
            whole.append(self._rest)
            self._rest = b""
        return [line.decode(errors="replace").rstrip() for line in whole if line.strip()]
