import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from xim_agent import log
from xim_agent.cli.main import main
from xim_agent.cli.render import code_of, guarded
from xim_agent.errors import AgentError, Exit


def group(*errors: Exception) -> BaseException:
    return BaseExceptionGroup("x", [BaseExceptionGroup("y", list(errors))])


def named(code: int = Exit.STATE) -> AgentError:
    return AgentError("state_dir", "cannot write /x", hint="chown it", exit_code=code)


def test_named_error_in_nested_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(group(named())) == Exit.STATE
    assert capsys.readouterr().err == "error: cannot write /x [state_dir]\n\nhint: chown it\n"


def test_what_two_services_met_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(group(named(), AgentError("other", "other", exit_code=Exit.STATE), named())) == Exit.STATE
    assert [line for line in capsys.readouterr().err.splitlines() if "error" in line] == [
        "error: cannot write /x [state_dir]",
        "error: other [other]",
    ]


def test_a_bug_beside_a_named_error_is_a_bug(
    capsys: pytest.CaptureFixture[str], error_logs: list[logging.LogRecord]
) -> None:
    assert code_of(group(named(), ValueError("x"))) == Exit.BUG
    assert "ValueError" in capsys.readouterr().err
    assert [r.exc_info is not None for r in error_logs] == [True]


def test_usage_and_interrupt() -> None:
    def usage() -> None:
        raise click.UsageError("no")

    def interrupt() -> None:
        raise KeyboardInterrupt

    assert guarded(usage) == Exit.USAGE
    assert guarded(interrupt) == 130
    assert guarded(lambda: None) == Exit.OK


@pytest.mark.parametrize("args", [["nope"], ["run", "--nope"], ["router", "assign"]])
def test_bad_command_lines_exit_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == Exit.USAGE
    assert "Usage:" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["--help"], ["cache", "ls"]])
def test_a_reader_that_went_away_is_no_failure(args: list[str], tmp_path: Path) -> None:
    """`xerotier-xim-agent cache ls | head` under `set -o pipefail`."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        words = [sys.executable, "-m", "xim_agent", *args]
        env = {**os.environ, "HOME": str(tmp_path)}
        done = subprocess.run(words, env=env, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (Exit.OK, "")


def test_help_names_every_variable_of_run(capsys: pytest.CaptureFixture[str]) -> None:
    from xim_agent.config.fields import OPTIONS

    assert main(["--help"]) == Exit.OK
    text = "".join(capsys.readouterr().out.split())
    for option in OPTIONS:
        assert option.env in text
        assert option.flag.removeprefix("--") in text


@pytest.mark.parametrize("form", ["console", "json"])
def test_no_secret_reaches_a_line(form: str) -> None:
    out = io.StringIO()
    record = logging.makeLogRecord(
        {
            "name": "xim_agent.x",
            "levelname": "INFO",
            "msg": "key xjk_proj_eyJ2IjoxfQ and planted-secret and Bearer eyJhbGciOiJFZERTQSJ9.eyJzdWIi.sig-A",
            "token": "xrt_abcdef",
        }
    )
    log.hide("planted-secret")
    formatter = log.ConsoleFormatter(False) if form == "console" else log.JsonFormatter()
    out.write(formatter.format(record))
    for secret in ("eyJ2IjoxfQ", "planted-secret", "eyJzdWIi", "abcdef"):
        assert secret not in out.getvalue()


@pytest.mark.parametrize("form", ["console", "json"])
def test_no_secret_hides_behind_an_escape(form: str) -> None:
    log.hide('sec"ret\\\u00fc')
    values = {
        "a": ["x\nxrt_abcdef", {"k": 'sec"ret\\\u00fc'}],
        "b": '{"v": "sec\\"ret\\\\\\u00fc"}',
        "c": Path("/a\txrt_abcdef"),
    }
    record = logging.makeLogRecord({"name": "xim_agent.x", "msg": "line\nxrt_abcdef", "levelname": "INFO", **values})
    formatter = log.ConsoleFormatter(False) if form == "console" else log.JsonFormatter()
    line = formatter.format(record)
    assert "abcdef" not in line
    assert "ret" not in line.replace("xrt_", "")
