"""A final error and --on-final-error park: what stays, what it tells, and which errors are not final."""

import json
import logging
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import httpx
import pytest
import trio
import trio.testing
from fakes.stack import free_port

from xim_agent import log
from xim_agent.cli import park
from xim_agent.errors import AgentError, Exit

KEY = ("join_key_expired", "the join key expired", "create a new one")
PARK = {"on_final_error": "park"}


def named(code: int, name: str = KEY[0]) -> AgentError:
    return AgentError(name, KEY[1], hint=KEY[2], exit_code=code)


def raises(error: BaseException) -> Callable[[], None]:
    def serve() -> None:
        raise error

    return serve


@pytest.fixture
def stays(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The causes that something was parked with; the parking itself returns at once."""
    found: list[Any] = []

    async def parked(causes: Any, flags: Any) -> None:
        found.append(causes)

    monkeypatch.setattr(park, "parked", parked)
    monkeypatch.delenv("XEROTIER_AGENT_ON_FINAL_ERROR", raising=False)
    return found


FINAL = [10, 11, 12, 13, 14, 15, 77, 78]


@pytest.mark.parametrize("code", FINAL)
def test_a_final_error_parks(stays: list[Any], code: int) -> None:
    park.or_park(raises(BaseExceptionGroup("", [ExceptionGroup("", [named(code)])])), PARK)
    assert stays == [[KEY]]


@pytest.mark.parametrize(
    "error",
    [
        named(Exit.NO_ROUTER),
        named(Exit.BUG),
        BaseExceptionGroup("", [named(Exit.REMOVED), ValueError("a bug beside it")]),
        BaseExceptionGroup("", [named(Exit.NO_ROUTER), named(Exit.REMOVED)]),
        KeyboardInterrupt(),
        BaseExceptionGroup("", [KeyboardInterrupt()]),
    ],
)
def test_what_a_restart_may_cure_ends_the_process(stays: list[Any], error: BaseException) -> None:
    with pytest.raises(type(error)) as raised:
        park.or_park(raises(error), PARK)
    assert raised.value is error
    assert not stays


def test_a_bug_of_the_agents_own_ends_the_process(stays: list[Any]) -> None:
    with pytest.raises(ZeroDivisionError):
        park.or_park(raises(ZeroDivisionError()), PARK)
    assert not stays


@pytest.mark.parametrize(
    ("flags", "variable", "parks"),
    [({}, "", False), ({}, "park", True), ({}, "exit", False), ({}, "prak", False), (PARK, "exit", True),
     ({"on_final_error": "exit"}, "park", False)],
)  # fmt: skip
def test_flag_over_variable_over_exit(
    stays: list[Any], monkeypatch: pytest.MonkeyPatch, flags: Any, variable: str, parks: bool
) -> None:
    monkeypatch.setenv("XEROTIER_AGENT_ON_FINAL_ERROR", variable)
    with nullcontext() if parks else pytest.raises(AgentError):
        park.or_park(raises(named(Exit.CONFIG)), flags)
    assert bool(stays) == parks


def test_a_stop_without_an_error_returns(stays: list[Any]) -> None:
    park.or_park(lambda: None, PARK)
    assert not stays


async def test_it_tells_the_cause_until_sigterm(error_logs: list[logging.LogRecord]) -> None:
    log.hide("hunter2-hunter2")
    port = free_port()
    causes = [KEY, ("state_mode", "mode 644 hunter2-hunter2", "chmod")]
    async with trio.open_nursery() as nursery, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        nursery.start_soon(park.parked, causes, {"metrics_port": str(port)})
        with trio.fail_after(10):
            while True:
                try:
                    ready = await client.get("/readyz")
                    break
                except httpx.ConnectError:
                    await trio.sleep(0.01)
            alive, status, metrics = [await client.get(path) for path in ("/livez", "/status", "/metrics")]
            os.kill(os.getpid(), signal.SIGHUP)
            assert (await client.get("/livez")).status_code == 200
            os.kill(os.getpid(), signal.SIGTERM)
    assert (ready.status_code, ready.text.splitlines()) == (
        503,
        [
            "not ready: parked: nothing is tried before a restart",
            "not ready: join_key_expired: the join key expired; create a new one",
            "not ready: state_mode: mode 644 ***; chmod",
        ],
    )
    assert alive.status_code == 200
    found = json.loads(status.text)
    assert (found["parked"], found["agent"]["pid"]) == (True, os.getpid())
    assert [row["code"] for row in found["health"]] == [KEY[0], "state_mode"]
    assert len(found["not_ready"]) == 3
    assert 'xim_agent_condition{code="join_key_expired"} 1.0' in metrics.text
    (line,) = error_logs
    assert line.getMessage() == (
        "parked: nothing is tried before a restart; join_key_expired: the join key expired; create a new one; "
        "state_mode: mode 644 ***; chmod"
    )
    assert line.__dict__["codes"] == [KEY[0], "state_mode"]


async def test_one_line_every_ten_minutes(
    autojump_clock: trio.testing.MockClock, error_logs: list[logging.LogRecord]
) -> None:
    with trio.move_on_after(3600 + 1):
        await park.parked([KEY], {"disable_metrics_server": True})
    assert len(error_logs) == 7


@pytest.mark.parametrize(
    "flags",
    [
        {"disable_metrics_server": True, "metrics_host": "192.0.2.1"},
        {"metrics_host": "192.0.2.1"},
        {"metrics_host": "192.0.2.1", "metrics_port": "x"},
    ],
)
async def test_without_the_port_it_stays_all_the_same(
    flags: Any, error_logs: list[logging.LogRecord], caplog: pytest.LogCaptureFixture
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(park.parked, [KEY], flags))
        with trio.fail_after(10):
            while not error_logs:  # noqa: ASYNC110
                await trio.sleep(0.01)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert len(nursery.child_tasks) == 1
        nursery.cancel_scope.cancel()
    warned = [
        r for r in caplog.records if "parked without /readyz: cannot serve metrics on 192.0.2.1" in r.getMessage()
    ]
    assert bool(warned) == ("disable_metrics_server" not in flags)
