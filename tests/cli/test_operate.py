"""`status`, `drain` and `resume` as processes beside what of an agent they meet, and without one."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from xim_agent.cache import claim
from xim_agent.cli import agent_reach, cache_reach
from xim_agent.cli.status_show import lines, one_line
from xim_agent.config.fields import Config
from xim_agent.control import client
from xim_agent.control.server import ControlServer, listen
from xim_agent.errors import AgentError

NOW = 1_000_000.0
SENDER = {"running": 0, "accepted": 7, "refused": 1, "ended": {"complete": 6, "cancelled": 1}, "longest": None}
WORK = {"phase": "ready", "drained_by": [], "link_up": True, "last_poll": NOW - 3, "suspended": False, "sender": SENDER}
STATUS: dict[str, Any] = {
    "agent": {"version": "1.2", "protocol": 1, "pid": 4711, "started": NOW - 7300},
    "work": WORK,
    "identity": {"router": "https://r:8443", "enrolled": True, "agent_id": "a-1", "project": "p",
                 "token_expires": NOW + 1800},
    "assignment": {"model": {"name": "toy", "revision": "r1"}, "generation": 3, "wanted": 3, "progress": None},
    "engine": {"state": "ready", "active": 0, "ceiling": 64, "starts": 1, "failures": 0, "failure": None},
    "cache": {"bytes_used": 12_000_000_000, "bound": 100_000_000_000},
    "idle": ["router: no request waits for toy"],
    "history": [{"at": NOW - 30, "what": "engine", "before": "starting", "after": "ready"}],
    "health": [{"code": "disk_full", "text": "no room", "hint": "make some", "since": NOW - 60}],
}  # fmt: skip


def shown(**changed: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, text in lines(STATUS | changed, NOW):
        found.setdefault(name, []).append(text)
    return found


def test_every_line_of_status() -> None:
    assert shown() == {
        "agent": ["1.2, process 4711, started 2 h ago"],
        "state": ["ready"],
        "router": ["https://r:8443 answers, last answer 3 s ago"],
        "identity": ["a-1 of p, token for 30 min more"],
        "model": ["toy r1, generation 3"],
        "engine": ["ready, 0 of 64 requests, 1 starts"],
        "cache": ["12.0 GB of 100.0 GB"],
        "requests": ["0 running, 7 taken, 1 refused; ended: 1 cancelled, 6 complete"],
        "changed": ["engine: starting -> ready, 30 s ago"],
        "idle": ["router: no request waits for toy"],
        "trouble": ["disk_full: no room (since 60 s ago); make some"],
    }


def test_status_in_one_line() -> None:
    trouble = "disk_full: no room"
    assert one_line(STATUS) == f"ready; model toy r1, generation 3; engine ready, 0 of 64 requests, 1 starts; {trouble}"
    found = one_line(STATUS | {"identity": {"enrolled": False}, "health": []})
    assert found.startswith("not enrolled; model toy")


def test_status_of_an_agent_that_is_not_well() -> None:
    longest = {"request": "req-9", "path": "/v1/completions", "seconds": 125.4, "bytes": 4321}
    sender = SENDER | {"running": 2, "longest": longest, "ended": {}}
    work = WORK | {"phase": "draining", "drained_by": ["a stop", "an operator"], "link_up": False, "last_poll": None}
    found = shown(
        work=work | {"suspended": True, "sender": sender}, idle=[],
        identity={"router": "", "enrolled": False},
        assignment={"model": None, "generation": 0, "wanted": 4,
                    "progress": {"stage": "fetch", "done": 5e8, "total": 1e9, "rate": 1e8}},
        engine={"state": "failed", "active": 0, "ceiling": 0, "starts": 3, "failures": 3, "failure": "oom"},
    )  # fmt: skip
    assert found["state"] == ["draining, asked by a stop, an operator"]
    assert found["router"] == ["none yet does not answer, last answer never, suspended"]
    assert found["identity"] == ["not enrolled"]
    assert found["model"] == ["none, generation 4 is wanted, fetch 500.0 MB of 1.0 GB, 100.0 MB/s, 5 s left"]
    assert found["engine"] == ["failed, 0 of 0 requests, 3 starts, 3 failed (oom)"]
    assert found["longest"] == ["req-9 /v1/completions, 125 s, 4 kB so far"]
    assert "idle" not in found


class Place:
    def __init__(self, root: Path) -> None:
        self.cache, self.socket = root / "cache", root / "c.sock"
        self.config = Config(model_cache_path=self.cache)

    def leave_behind(self, says: str) -> None:
        """What is there when the agent's process is not, whoever ended it."""
        self.cache.mkdir(exist_ok=True)
        (self.cache / claim.LOCK).write_text(f"4711\n{says}\n")

    @asynccontextmanager
    async def agent(self, **calls: Any) -> AsyncIterator[None]:
        self.cache.mkdir()
        async with trio.open_nursery() as nursery:
            await nursery.start(ControlServer(self.socket, calls, self.leave_behind).run)
            yield
            nursery.cancel_scope.cancel()

    def start(self, *words: str) -> Any:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("XEROTIER_")}
        return {"command": [sys.executable, "-m", "xim_agent", *words],
                "env": kept | {"XEROTIER_AGENT_MODEL_CACHE_PATH": str(self.cache)}}  # fmt: skip

    async def run(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        with trio.fail_after(60):
            return await trio.run_process(**self.start(*words), capture_stdout=True, capture_stderr=True, check=False)

    async def refused(self) -> AgentError:
        with pytest.raises(AgentError) as e:
            await agent_reach.reach(self.config, "status", {}, lambda progress: None)
        return e.value


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(cache_reach, "PATIENCE", 0.3)
    return Place(tmp_path)


def answers(*results: Any) -> Any:
    left = list(results)

    async def call(arguments: Any, report: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return left.pop(0) | ({"asked": dict(arguments)} if arguments else {})

    return call


async def test_status_for_people_and_for_programs(place: Place) -> None:
    async with place.agent(status=answers(STATUS, STATUS)):
        people, programs = await place.run("status"), await place.run("status", "--json")
    assert (people.returncode, people.stderr) == (0, b"")
    assert b"idle      router: no request waits for toy\n" in people.stdout
    assert json.loads(programs.stdout) == STATUS


async def test_names_of_others_move_no_cursor(place: Place) -> None:
    async with place.agent(status=answers(STATUS | {"idle": ["router: \x1b[2J"]})):
        assert b"\x1b" not in (await place.run("status")).stdout


def now(running: int, *drained_by: str) -> dict[str, Any]:
    return {"running": running, "drained_by": list(drained_by), "longest": {"seconds": 12.3} if running else None}


async def test_drain_and_resume_say_what_is_so(place: Place) -> None:
    drain = answers(now(0, "an operator"), now(2), now(2, "an operator"))
    async with place.agent(drain=drain, resume=answers(now(1), now(0, "a stop", "the router"))):
        done, ended, at_once = await place.run("drain"), await place.run("drain"), await place.run("drain", "--no-wait")
        assert (done.returncode, done.stdout.split(b";")[0]) == (0, b"drained: no request runs")
        assert (ended.returncode, b"drain_ended" in ended.stderr, ended.stdout) == (4, True, b"")
        assert at_once.stdout == b"draining: 2 requests run, the longest for 12 s\n"
        assert (await place.run("resume")).stdout == b"takes requests; 1 request runs, the longest for 12 s\n"
        assert b"because a stop and the router asked for it" in (await place.run("resume")).stdout


async def test_ctrl_c_ends_the_wait_for_a_drain(place: Place) -> None:
    begun, ended = trio.Event(), trio.Event()

    async def drain(arguments: Any, report: Any) -> Any:
        assert arguments == {"wait": True}
        report(now(3, "an operator"))
        begun.set()
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with place.agent(drain=drain):
        process = await trio.lowlevel.open_process(**place.start("drain"), stderr=subprocess.DEVNULL)
        with trio.fail_after(30):
            await begun.wait()
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 130
            await ended.wait()


async def test_no_agent(place: Place) -> None:
    error = await place.refused()
    assert (error.code, error.exit_code) == ("agent_absent", 1)
    assert "no agent has ever used" in error.message
    assert "--model-cache-path" in error.hint
    assert not place.cache.exists(), "nothing is made"
    for says in ("", claim.COMMAND):
        place.leave_behind(says)
        error = await place.refused()
        assert (error.code, error.exit_code) == ("agent_absent", 1), says
    place.leave_behind(str(place.socket))
    error = await place.refused()
    assert (error.code, error.exit_code) == ("agent_absent", 1)
    assert "process 4711, has ended" in error.message
    done = await place.run("status")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"[agent_absent]" in done.stderr


async def test_a_socket_of_a_killed_agent_is_told(place: Place) -> None:
    place.leave_behind(str(place.socket))
    os.close(listen(place.socket))
    error = await place.refused()
    assert (error.code, error.exit_code) == ("agent_absent", 1)
    assert f"process 4711 was killed and left its control socket {place.socket}" in error.message


@pytest.mark.parametrize("closed", ["cache", "socket"])
async def test_no_permission_is_told(place: Place, monkeypatch: pytest.MonkeyPatch, closed: str) -> None:
    """For root, to whom nothing is denied, the kernel's answer is played."""

    def denied(*_: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    async def unreachable(socket: Path, pid: str, *_: Any) -> Any:
        await trio.lowlevel.checkpoint()
        try:
            denied()
        except OSError as e:
            raise client._unreachable(socket, pid, e) from e

    place.leave_behind(str(place.socket))
    if closed == "cache":
        monkeypatch.setattr(claim, "holder", denied)
    else:
        monkeypatch.setattr(client, "call", unreachable)
    error = await place.refused()
    assert (error.code, error.exit_code) == ("agent_denied", 77)
    assert str(place.cache if closed == "cache" else place.socket) in error.message
    assert f"uid {os.geteuid()}" in error.message


async def test_an_agent_that_just_begins_is_waited_for(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_reach, "PATIENCE", 20.0)
    place.leave_behind("")
    looked, holder = trio.Event(), claim.holder

    def look(path: Path) -> claim.Holder:
        looked.set()
        return holder(path)

    monkeypatch.setattr(claim, "holder", look)
    async with trio.open_nursery() as nursery:

        async def begin() -> None:
            await looked.wait()
            await nursery.start(ControlServer(place.socket, {"status": answers({"a": 1})}, place.leave_behind).run)

        nursery.start_soon(begin)
        with trio.fail_after(20):
            assert await agent_reach.reach(place.config, "status", {}, lambda progress: None) == {"a": 1}
        nursery.cancel_scope.cancel()


async def test_an_agent_that_hangs_or_is_older(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async with place.agent():
        error = await place.refused()
        assert (error.code, error.exit_code) == ("agent_older", 14)

    async def never(*_: Any) -> Any:
        await trio.to_thread.run_sync(lambda: None)
        raise AgentError("agent_silent", "it says nothing", exit_code=14)

    monkeypatch.setattr(client, "call", never)
    assert (await place.refused()).code == "agent_silent"


async def test_requests_for_people_and_for_programs(place: Place) -> None:
    row = {"request": "r-1\x1b", "lease": 7, "path": "/v1/completions", "seconds": 12.34, "phase": "streaming",
           "bytes": 4321, "chunks": 31}  # fmt: skip
    found = {"schema": 1, "requests": [row]}
    async with place.agent(requests=answers(found, found, {"schema": 1, "requests": []})):
        people, programs, none = (
            await place.run("requests"),
            await place.run("requests", "--json"),
            await place.run("requests"),
        )
    head, line = people.stdout.decode().splitlines()
    assert head.split() == ["REQUEST", "LEASE", "AGE", "PHASE", "CHUNKS", "SIZE", "PATH"]
    assert line.split() == ["r-1?", "7", "12.3", "s", "streaming", "31", "4", "kB", "/v1/completions"]
    assert json.loads(programs.stdout) == found
    assert none.stdout == b"no request runs\n"


async def test_watch_says_what_is_new_waits_for_the_next_agent_and_ends_well(place: Place) -> None:
    """A look that changes only its clocks and counters is no news; Ctrl-C is how it is ended."""
    said = bytearray()
    other = STATUS | {
        "history": [*STATUS["history"], {"at": NOW, "what": "drain", "before": "", "after": "an operator"}]
    }
    looks = [STATUS, STATUS | {"cache": {"bytes_used": 1, "bound": 2}}, other]
    last = trio.Event()

    async def status(arguments: Any, report: Any) -> Any:
        await trio.lowlevel.checkpoint()
        if len(looks) == 1:
            last.set()
        return looks.pop(0) if len(looks) > 1 else looks[0]

    async def read(stream: trio.abc.ReceiveStream) -> None:
        async for data in stream:
            said.extend(data)

    async def seen(words: bytes) -> None:
        while words not in said:  # noqa: ASYNC110  another process writes it
            await trio.sleep(0.05)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            async with place.agent(status=status):
                process = await trio.lowlevel.open_process(**place.start("status", "--watch"), stdout=subprocess.PIPE)
                assert process.stdout is not None
                nursery.start_soon(read, process.stdout)
                await last.wait()
                await seen(b"drain: - -> an operator")
            await seen(b"no agent runs here: the last one, process 4711, has ended")
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 0
    assert said.count(b"--- ") == 3, said.decode()


async def test_watch_without_an_agent_ends_at_once_as_without_watch(place: Place) -> None:
    for command in ("status", "requests"):
        done = await place.run(command, "--watch")
        assert (done.returncode, done.stdout) == (1, b""), command
