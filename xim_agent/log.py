"""Log lines on stderr, as text for a terminal or JSON for a collector. Secrets are cut out of every line."""

import json
import logging
import re
import sys
import time
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

SHORTEST = 6  # characters of what can be hidden: shorter words occur by chance
_planted: set[str] = set()


def hide(*secrets: str | None) -> None:
    """From now on each (of at least 6 characters) is shown as *** wherever it turns up in a line, as JSON or in a URL
    too. Of one with several lines (a PEM file) each line is hidden: lines are what is logged.
    """
    for whole in filter(None, secrets):
        for secret in {whole, *whole.splitlines()}:
            if len(secret) >= SHORTEST:
                as_json = (json.dumps(secret, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False))
                _planted.update({secret, quote(secret, safe=""), *as_json})


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


class ConsoleFormatter(logging.Formatter):
    def __init__(self, colour: bool) -> None:
        super().__init__()
        self.colour = colour

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower():<7}"
        if self.colour:
            level = f"\x1b[{_COLOUR.get(record.levelname, '0')}m{level}\x1b[0m"
        extra = "".join(f" {k}={v}" for k, v in _clean(_fields(record)).items())
        when = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{when} {level} {record.name.removeprefix('xim_agent.')}: {record.getMessage()}{extra}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return redact(line)


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
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    set_level(level)
