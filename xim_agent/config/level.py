"""The log level of a running agent: `log-level` in the config directory, read again at SIGHUP."""

import logging

from xim_agent.config.fields import Config
from xim_agent.log import LEVELS, set_level

log = logging.getLogger("xim_agent.config")

FILE = "log-level"


def reread(config: Config) -> None:
    """The level of the file; where there is none, the configured one. An unreadable or odd one changes nothing."""
    path = config.config_path / FILE
    try:
        with path.open(encoding="utf-8") as file:
            level = file.read(100).strip().lower()
    except FileNotFoundError:
        level = config.log_level
    except (OSError, UnicodeDecodeError) as error:
        log.warning("the log level stays as it is: its file cannot be read", extra={"path": path, "reason": str(error)})
        return
    if level not in LEVELS:
        known = {"path": path, "found": level, "known": ", ".join(LEVELS)}
        log.warning("the log level stays as it is: its file holds another word", extra=known)
        return
    set_level(level)
    log.info("log level", extra={"level_now": level})
