"""Log lines on stderr, as text for a terminal or JSON for a collector. Secrets are cut out of every line.

Fields of lines: log_fields.py. The last lines are kept in memory, for a support bundle.
"""

import json
import logging
import re
import sys
import time
from collections import deque
from typing import IO, Any
from urllib.parse import quote

TRACE = 5
LEVELS = {"trace": TRACE, "debug": 10, "info": 20, "warning": 30, "error": 40}
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
# User and password in a URL: of proxies, databases, collectors.
_USERINFO = re.compile(r"(?<=://)[^\s/?#@\"'<>]+(?=@)")
# Join keys, refresh tokens and API keys by their prefix; JWTs by their shape. No word boundary before them: the escape
# sequence of a colour ends in a letter.
_SECRET = re.compile(r"(?:xjk_[A-Za-z0-9-]+_|xrt_|sk-xim-|eyJ[A-Za-z0-9_-]{8,}\.)[A-Za-z0-9_.\-]+")
_COLOUR = {"TRACE": "90", "DEBUG": "90", "INFO": "36", "WARNING": "33", "ERROR": "31", "CRITICAL": "31"}

_COLOURED = re.compile(r"\x1b\[[0-9;]*m")
# What needs no quotes behind an equals sign.
_PLAIN = re.compile(r"[^\s\"'=\\]+")
VLLM = "xim_agent.engine.vllm"  # the logger of what vLLM writes
KEPT_BYTES = 512 * 1024

SHORTEST = 6  # characters of what can be hidden: shorter words occur by chance
_planted: set[str] = set()
_kinds: dict[str, str] = {}


def hide(*secrets: str | None, kind: str = "secret") -> None:
    """From now on each (of at least 6 characters) is shown as *** wherever it turns up in a line, as JSON or in a URL
    too. Of one with several lines (a PEM file) each line is hidden: lines are what is logged. `kind`: what it is, said
    instead of it.
    """
    for whole in filter(None, secrets):
        for secret in {whole, *whole.splitlines()}:
            if len(secret) >= SHORTEST:
                as_json = (json.dumps(secret, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False))
                _planted.update({secret, quote(secret, safe=""), *as_json})
                _kinds.setdefault(secret, kind)


def hidden() -> dict[str, str]:
    """Every secret that this process knows → its kind. For what looks for them; never to be shown."""
    return dict(_kinds)


def redact(text: str) -> str:
    for secret in sorted(_planted, key=len, reverse=True):  # one may be a part of another
        if secret in text:
            text = text.replace(secret, "***")
    return _SECRET.sub("***", _USERINFO.sub("***", text) if "@" in text else text)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {k: v for k, v in record.__dict__.items() if k not in _STANDARD}


def _clean(value: Any) -> Any:
    """Redacted before it is encoded: an escape sequence may end in a letter that hides where a secret begins."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, dict):
        return {redact(str(k)): _clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(v) for v in value]
    return redact(str(value))


def _word(value: Any) -> str:
    """Of a field, so that its end is seen and it ends no line."""
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    text = str(value)
    return text if _PLAIN.fullmatch(text) and text.isprintable() else json.dumps(text, ensure_ascii=False)


def _lines(text: str) -> list[str]:
    """What others have written moves no cursor, and begins no line that could pass for one of ours."""
    lines = _COLOURED.sub("", text).expandtabs().split("\n")
    return ["".join(c if c.isprintable() else "?" for c in line.rstrip("\r")) for line in lines]


class ConsoleFormatter(logging.Formatter):
    def __init__(self, colour: bool) -> None:
        super().__init__()
        self.colour = colour

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower():<7}"
        if self.colour:
            level = f"\x1b[{_COLOUR.get(record.levelname, '0')}m{level}\x1b[0m"
        extra = "".join(f" {k}={_word(v)}" for k, v in _clean(_fields(record)).items() if v is not None)
        when = time.strftime("%H:%M:%S", time.localtime(record.created))
        text = record.getMessage() + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")
        first, *rest = _lines(redact(text))
        line = f"{when} {level} {record.name.removeprefix('xim_agent.')}: {first}{extra}"
        return redact("\n".join([line, *(f"    {one}" for one in rest)]))


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        row: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        row.update(_fields(record))
        if record.exc_info:
            row["traceback"] = self.formatException(record.exc_info)
        return json.dumps(_clean(row), ensure_ascii=False)


class Kept(logging.Handler):
    """The last lines in JSON form, at most 512 KiB: vLLM's by themselves, they may be many."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self._lines: dict[bool, deque[str]] = {True: deque(), False: deque()}
        self._sizes = {True: 0, False: 0}

    def emit(self, record: logging.LogRecord) -> None:
        vllm, line = record.name == VLLM, self.format(record)
        lines = self._lines[vllm]
        lines.append(line)
        self._sizes[vllm] += len(line)
        while self._sizes[vllm] > KEPT_BYTES and len(lines) > 1:
            self._sizes[vllm] -= len(lines.popleft())

    def agent(self) -> list[str]:
        """Oldest first; secrets that became known since a line was written are taken out too."""
        return [redact(line) for line in self._lines[False]]

    def engine(self) -> list[str]:
        """As `agent`, of what vLLM wrote."""
        return [redact(line) for line in self._lines[True]]


kept = Kept()


def set_level(level: str) -> None:
    logging.getLogger("xim_agent").setLevel(LEVELS[level])


def setup(level: str = "info", form: str = "auto", stream: IO[str] | None = None) -> None:
    """Replaces all handlers of the root logger; libraries log from warning up."""
    logging.addLevelName(TRACE, "TRACE")
    stream = stream or sys.stderr
    console = form == "console" or (form == "auto" and stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(ConsoleFormatter(stream.isatty()) if console else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler, kept]
    root.setLevel(logging.WARNING)
    set_level(level)
