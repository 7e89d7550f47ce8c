"""The log level that a SIGHUP takes."""

import logging
from pathlib import Path

import pytest

from xim_agent.config.fields import Config
from xim_agent.config.level import FILE, reread


@pytest.fixture
def level(caplog: pytest.LogCaptureFixture) -> logging.Logger:
    caplog.set_level(logging.INFO, "xim_agent")  # put back afterwards
    return logging.getLogger("xim_agent")


def test_the_file_counts_and_without_it_the_configuration(tmp_path: Path, level: logging.Logger) -> None:
    config = Config(config_path=tmp_path, log_level="error")
    for words, number in (("debug\n", 10), (" TRACE ", 5), ("warning", 30)):
        (tmp_path / FILE).write_text(words)
        reread(config)
        assert level.level == number
    (tmp_path / FILE).unlink()
    reread(config)
    assert level.level == 40


@pytest.mark.parametrize("content", [b"loud", b"", b"\xff\xfe", b"debug\ninfo", b"x" * 10_000, None])
def test_what_is_no_level_changes_nothing_and_is_said(
    tmp_path: Path, level: logging.Logger, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    path = tmp_path / FILE
    path.mkdir() if content is None else path.write_bytes(content)
    reread(Config(config_path=tmp_path))
    assert level.level == logging.INFO
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert str(record.__dict__["path"]) == str(path)
    assert len(str(record.__dict__)) < 2000
