"""What the guard does: single-threaded, blocking, told what to do through its socket until that ends.

Everything it needs is imported before the fork: the files of a one-file bundle may be gone when it works.
"""

import array
import contextlib
import gc
import json
import os
import select
import shutil
import signal
import socket
import time
from collections.abc import Callable
from typing import Any, NoReturn

from xim_agent.engine.leftovers import Leftovers
from xim_agent.engine.tree import Proc, descendants, process, send

TERM_SECONDS = 5.0  # after the agent's death; with KILL_SECONDS under the 10 s in which everything must be gone
KILL_SECONDS = 4.0
LOOK_SECONDS = 0.5
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)  # a terminal's and a supervisor's
BACKGROUND_NICE = 5
AUTOGROUP_TRIES, AUTOGROUP_SECONDS = 3, 0.11


def give_way() -> None:
    """Lets whoever else wants a core have it at once, with all that is started from here on.

    vLLM on a CPU spins on two cores while it works, and whatever carries its answers then waits for one at each of its
    steps: measured by `tests/bench/data_plane.py --real`. A policy that somebody chose for us stays.
    """
    with contextlib.suppress(OSError):
        os.nice(BACKGROUND_NICE)
    with contextlib.suppress(OSError):
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def session_gives_way(pid: int) -> None:
    """The same for a session: where these share a machine out among themselves, niceness counts within each: sched(7).

    From outside, once the program has replaced us: before, its files in /proc are root's, since nobody may read its
    memory. The kernel takes one such change in 100 ms from who is not root.
    """
    for _ in range(AUTOGROUP_TRIES):
        try:
            with open(f"/proc/{pid}/autogroup", "w") as file:
                file.write(str(BACKGROUND_NICE))
        except BlockingIOError:
            select.select([], [], [], AUTOGROUP_SECONDS)
        except OSError:
            return
        else:
            return


class Guardian:
    """Owns every process below it. `fork` and `die_with_me` are handed in by guard.py.

    `bundle`: directory to remove at the end, unless `bootloader`, whose task that is, still runs.
    """

    def __init__(
        self,
        control: socket.socket,
        fork: Callable[[], int],
        die_with_me: Callable[[], None],
        bundle: str | None,
        bootloader: Proc | None,
    ) -> None:
        self.fork = fork
        self.die_with_me = die_with_me
        self.bundle = bundle
        self.bootloader = bootloader
        self.children: dict[int, int] = {}  # pid → descriptor for its status
        self.held: list[int] = []
        self.leftovers: Leftovers | None = None
        gc.disable()  # no inherited object may be collected: its descriptor's number is soon another's
        gc.freeze()
        os.setsid()
        for signum in (*IGNORED, signal.SIGPIPE):
            signal.signal(signum, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        self.control = socket.socket(fileno=self._only_keep(control.detach()))
        os.chdir("/")
        with contextlib.suppress(OSError), open("/proc/self/comm", "w") as file:
            file.write("xim-guard")
        self.wake, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    @staticmethod
    def _only_keep(fd: int) -> int:
        """Closes every other descriptor (the state file's lock among them); 0, 1 and 2 become /dev/null."""
        null = os.open(os.devnull, os.O_RDWR)
        moved = os.dup(fd)
        for number in (0, 1, 2):
            os.dup2(null, number)
        with os.scandir("/proc/self/fd") as entries:
            inherited = [int(entry.name) for entry in entries]  # a range up to SC_OPEN_MAX may be 10^9 long
        for number in inherited:
            if number > 2 and number != moved:
                with contextlib.suppress(OSError):
                    os.close(number)
        return moved

    def main(self) -> NoReturn:
        try:
            with contextlib.suppress(EOFError):
                self.serve()
        finally:  # whatever went wrong
            self.end_everything()
            os._exit(0)

    def serve(self) -> None:
        """Until the agent is gone: EOFError or OSError."""
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        poll.register(self.wake, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(LOOK_SECONDS * 1000 if self.children else None)}
            if self.wake in ready:
                os.read(self.wake, 4096)
            self.reap()
            if self.leftovers and self.children:
                self.leftovers.look(os.getpid())
            if self.control.fileno() in ready:
                self.obey()

    def obey(self) -> None:
        raw, rights, _, _ = self.control.recvmsg(65536, socket.CMSG_SPACE(32), socket.MSG_CMSG_CLOEXEC)
        if not raw:
            raise EOFError
        fds = array.array("i")
        for _, _, data in rights:
            fds.frombytes(data)
        message = json.loads(raw)
        answer: dict[str, Any] = {}
        match message["op"]:
            case "spawn":
                answer = self.spawn(*fds)
            case "hold":
                self.held += fds
            case "signal" if message["pid"] in self.children:
                send([message["pid"]], message["signum"])
            case "kill_all":
                answer = {"left": self.kill_all(KILL_SECONDS)}
        self.control.send(json.dumps({"call": message["call"], **answer}).encode())

    def spawn(self, payload: int, out: int, err: int, status: int) -> dict[str, Any]:
        with open(payload, "rb") as file:
            file.seek(0)
            body = json.load(file)
        self.leftovers = Leftovers(body["file"], body["sockets"], body["scratch"])
        self.leftovers.begin()
        failed, failing = os.pipe2(os.O_CLOEXEC)
        try:
            pid = self.fork()
            if pid == 0:
                self.become(body, out, err, failing)
        except OSError as error:
            os.write(failing, (error.errno or 1).to_bytes(4, "little"))
            pid = 0
        for fd in (out, err, failing):
            os.close(fd)
        errno = int.from_bytes(os.read(failed, 4), "little")  # ends without a byte when the program has replaced us
        os.close(failed)
        if errno:
            os.close(status)
            return {"errno": errno}
        self.children[pid] = status
        if body["background"]:
            session_gives_way(pid)
        return {"pid": pid}

    def become(self, body: dict[str, Any], out: int, err: int, failing: int) -> NoReturn:
        try:
            os.setsid()
            self.die_with_me()
            os.dup2(out, 1)
            os.dup2(err, 2)
            signal.set_wakeup_fd(-1)
            for signum in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
                signal.signal(signum, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            if body["background"]:
                give_way()
            os.chdir(body["cwd"])
            os.execve(body["argv"][0], body["argv"], body["env"])  # noqa: S606 - a shell is what we do not want
        except OSError as error:
            os.write(failing, (error.errno or 1).to_bytes(4, "little"))
        finally:
            os._exit(127)

    def reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if (fd := self.children.pop(ended[0], None)) is not None:
                    with contextlib.suppress(OSError):
                        os.write(fd, ended[1].to_bytes(4, "little"))
                    os.close(fd)

    def gone_within(self, seconds: float, signum: signal.Signals | None) -> list[int]:
        """Waits until no descendant lives, with `signum` to each at every look; returns those that still do."""
        until = time.monotonic() + seconds
        while alive := [p.pid for p in descendants(os.getpid())]:
            if time.monotonic() > until:
                return alive
            if signum:
                send(alive, signum)
            self.reap()
            select.select([], [], [], 0.02)
        self.reap()
        return []

    def kill_all(self, seconds: float) -> list[int]:
        if self.leftovers:
            self.leftovers.look(os.getpid())
        left = self.gone_within(seconds, signal.SIGKILL)
        if self.leftovers and not left:
            self.leftovers.sweep()
        return left

    def end_everything(self) -> None:
        """The agent is gone: nothing of ours may stay."""
        if self.leftovers:
            self.leftovers.look(os.getpid())
        send((p.pid for p in descendants(os.getpid())), signal.SIGTERM)
        self.gone_within(TERM_SECONDS, None)
        self.kill_all(KILL_SECONDS)
        if self.bundle and not self._bootloader_runs():
            shutil.rmtree(self.bundle, ignore_errors=True)

    def _bootloader_runs(self) -> bool:
        then = self.bootloader
        now = process(then.pid) if then else None
        return then is not None and now is not None and now.started == then.started and now.state not in "ZX"
