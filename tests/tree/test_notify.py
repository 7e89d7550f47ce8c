"""What systemd hears: over a real datagram socket, with the kernel's word for who speaks."""

import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from xim_agent import notify
from xim_agent.notify import Life, Notifier

VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Systemd:
    """The receiving end."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.setblocking(False)

    async def hear(self) -> tuple[str, int]:
        """The next message, and the process that sent it."""
        with trio.fail_after(10):
            await trio.lowlevel.wait_readable(self.socket)
        data, ancillary, _, _ = self.socket.recvmsg(4096, socket.CMSG_SPACE(struct.calcsize("3i")))
        [(_, kind, credentials)] = ancillary
        assert kind == socket.SCM_CREDENTIALS
        return data.decode(), struct.unpack("3i", credentials)[0]

    async def text(self) -> str:
        return (await self.hear())[0]

    def waiting(self) -> list[str]:
        """All that has come, without waiting."""
        found = []
        while True:
            try:
                found.append(self.socket.recv(4096).decode())
            except BlockingIOError:
                return found


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Systemd]:
    address = f"{tmp_path}/notify" if request.param == "path" else f"@xim-test-{os.getpid()}-{tmp_path.name}"
    made = Systemd(address)
    yield made
    made.socket.close()


def taken(systemd: Systemd, **more: str) -> tuple[Notifier, dict[str, str]]:
    environ = {"NOTIFY_SOCKET": systemd.address, "HOME": "/root", **more}
    found = notify.take(environ)
    assert found is not None
    return found, environ


async def nothing() -> None:
    await trio.lowlevel.checkpoint()


async def test_ready_is_said_by_this_process_when_a_credential_exists(systemd: Systemd, nursery: trio.Nursery) -> None:
    notifier, environ = taken(systemd, WATCHDOG_USEC="60000000", WATCHDOG_PID=str(os.getpid()))
    assert environ == {"HOME": "/root"}, "no child speaks to systemd"
    enrolled = trio.Event()
    await nursery.start(notifier.deliver)
    await nursery.start(notifier.ready, enrolled.wait)
    await trio.testing.wait_all_tasks_blocked()
    assert systemd.waiting() == []
    enrolled.set()
    assert await systemd.hear() == ("READY=1", os.getpid())


async def test_a_reload_is_told_with_the_time_of_its_begin(systemd: Systemd, nursery: trio.Nursery) -> None:
    notifier, _ = taken(systemd)
    await nursery.start(notifier.deliver)
    reread: list[str] = []
    notifier.reload(lambda: reread.append("early"))
    await nursery.start(notifier.ready, nothing)
    assert await systemd.text() == "READY=1", "before it, a reload is nothing to systemd"
    before = time.monotonic_ns() // 1000
    notifier.reload(lambda: reread.append("now"))
    first, at = (await systemd.text()).split("\nMONOTONIC_USEC=")
    assert (first, await systemd.text()) == ("RELOADING=1", "READY=1")
    assert before <= int(at) <= time.monotonic_ns() // 1000
    assert reread == ["early", "now"]


async def test_a_stop_is_told_with_its_longest_time(systemd: Systemd, nursery: trio.Nursery) -> None:
    notifier, _ = taken(systemd)
    stop = trio.Event()
    await nursery.start(notifier.deliver)
    await nursery.start(notifier.ready, nothing)
    await nursery.start(notifier.stopping, stop, 1825.5)
    assert await systemd.text() == "READY=1"
    stop.set()
    assert await systemd.text() == "STOPPING=1\nEXTEND_TIMEOUT_USEC=1825500000"
    notifier.reload(lambda: None)
    await trio.testing.wait_all_tasks_blocked()
    assert systemd.waiting() == []


async def test_a_systemd_that_is_gone_hinders_nobody(
    tmp_path: Path, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = notify.take({"NOTIFY_SOCKET": f"{tmp_path}/gone"})
    assert notifier is not None
    await nursery.start(notifier.deliver)
    for _ in range(3):
        notifier.say("STATUS=lost")
    await trio.testing.wait_all_tasks_blocked()
    assert [r.getMessage() for r in caplog.records] == ["systemd does not take what it is told"]
    back = Systemd(f"{tmp_path}/gone")
    notifier.say("STATUS=heard")
    assert await back.text() == "STATUS=heard"
    back.socket.close()


@pytest.mark.parametrize("address", ["", "vsock:2:1234", "relative/socket"])
def test_nobody_to_tell(address: str) -> None:
    environ = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}
    assert notify.take(environ) is None
    assert environ == {}


# the watchdog


@pytest.mark.parametrize(
    ("variables", "fed"),
    [
        ({}, False),
        ({"WATCHDOG_USEC": "30000000"}, True),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, True),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, False),  # of the bootloader, or whoever has started us
        ({"WATCHDOG_USEC": "0"}, False),
        ({"WATCHDOG_USEC": "soon"}, False),
    ],
)
async def test_who_is_to_feed_the_watchdog(
    systemd: Systemd, nursery: trio.Nursery, variables: dict[str, str], fed: bool
) -> None:
    notifier, _ = taken(systemd, **variables)
    await nursery.start(notifier.deliver)
    await nursery.start(notifier.watch, lambda: 1, lambda: False, lambda: "ready")
    heard = [await systemd.text() for _ in range(1 + fed)]
    assert heard == (["WATCHDOG=1"] if fed else []) + ["STATUS=ready"]


class Loop:
    """A poll loop in virtual time, and the seconds at which the watchdog was fed."""

    def __init__(self, notifier: Notifier, monkeypatch: pytest.MonkeyPatch) -> None:
        self.beats, self.excused, self.status = 0, False, "ready"
        self.fed: list[float] = []
        self.told: list[str] = []
        self.notifier = notifier
        monkeypatch.setattr(notifier, "say", self._say)

    def _say(self, text: str) -> None:
        if text == "WATCHDOG=1":
            self.fed.append(trio.current_time())
        else:
            self.told.append(text)

    @property
    def watch(self) -> Callable[..., Awaitable[None]]:
        return partial(self.notifier.watch, lambda: self.beats, lambda: self.excused, lambda: self.status)

    def feedings(self, begin: float, end: float) -> int:
        return sum(begin <= at < end for at in self.fed)


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    return Loop(Notifier("/nobody", 60.0), monkeypatch)


async def test_fed_while_polls_end(loop: Loop, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    began = trio.current_time()
    await nursery.start(loop.watch)
    for _ in range(20):
        await trio.sleep(55)
        loop.beats += 1
    assert loop.feedings(began, trio.current_time()) == 20 * 55 / notify.STATUS_SECONDS
    assert loop.told == ["STATUS=ready"]


async def test_a_poll_that_never_ends_is_not_fed(
    loop: Loop, nursery: trio.Nursery, error_logs: list[Any], autojump_clock: trio.testing.MockClock
) -> None:
    began = trio.current_time()
    await nursery.start(loop.watch)
    await trio.sleep(299)
    assert loop.feedings(began, began + notify.POLL_SECONDS) == notify.POLL_SECONDS / notify.STATUS_SECONDS
    assert loop.feedings(began + notify.POLL_SECONDS, began + 300) == 0
    sentence = "no poll has ended for 60 s: the watchdog is not fed"
    assert loop.told == ["STATUS=ready", f"STATUS={sentence}"]
    assert [r.getMessage() for r in error_logs] == [sentence]
    loop.beats += 1
    await trio.sleep(notify.STATUS_SECONDS + 2)
    assert loop.feedings(began + 300, trio.current_time()) == 2
    assert loop.told[-1] == "STATUS=ready"


async def test_how_it_is_when_it_gets_ready_is_told_at_once(
    loop: Loop, nursery: trio.Nursery, error_logs: list[Any], autojump_clock: trio.testing.MockClock
) -> None:
    loop.status = "not enrolled"
    await nursery.start(loop.watch)
    await trio.sleep(1)
    loop.status = "starting"
    await nursery.start(loop.notifier.ready, nothing)
    await trio.testing.wait_all_tasks_blocked()
    assert loop.told == ["STATUS=not enrolled", "READY=1", "STATUS=starting"]
    await trio.sleep(298)
    assert len(loop.fed) == notify.POLL_SECONDS / notify.STATUS_SECONDS + 1, "an early look is no time that has passed"
    assert len(error_logs) == 1


async def test_fed_for_hours_when_there_is_nothing_to_poll_for(
    loop: Loop, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    loop.excused = True
    began = trio.current_time()
    await nursery.start(loop.watch)
    await trio.sleep(7200)
    assert loop.feedings(began, began + 7200) == 7200 / notify.STATUS_SECONDS
    loop.excused = False  # from now on it has its 60 s
    await trio.sleep(50)
    assert loop.feedings(began + 7200, began + 7250) == 10


async def test_a_short_watchdog_is_fed_three_times_in_its_time(
    monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    loop = Loop(Notifier("/nobody", 3.0), monkeypatch)
    loop.excused = True
    await nursery.start(loop.watch)
    await trio.sleep(29.5)
    assert len(loop.fed) == 30


def test_a_machine_that_slept_is_not_one_that_hangs() -> None:
    life = Life()
    assert life.alive(1, False, 5)
    assert all(life.alive(1, False, 5) for _ in range(11))  # however long each look took
    assert not life.alive(1, False, 5)


async def test_status_is_one_short_line(
    systemd: Systemd, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    notifier, _ = taken(systemd)
    texts = iter(["a\nREADY=1", "a\nREADY=1", "b" * 4000])
    said: list[str] = []
    notifier.say = lambda *lines: said.extend(lines)  # type: ignore[method-assign]
    await nursery.start(notifier.watch, lambda: 1, lambda: True, lambda: next(texts))
    await trio.sleep(2 * notify.STATUS_SECONDS + 1)
    assert said == ["STATUS=a READY=1", "STATUS=" + "b" * notify.STATUS_LENGTH]
