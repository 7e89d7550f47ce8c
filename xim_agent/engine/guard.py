"""The guard: a process forked before `trio.run`, vLLM's parent, which outlives the agent just long enough to end vLLM.

    agent ── socketpair ── guard (own session, subreaper) ── vllm serve ── EngineCore ── workers

Why: vLLM's EngineCore lives on when its API server is killed, and a parent-death signal on a child that trio started
fires when trio's worker thread idles out. The guard sees the agent's death, however it came, as the end of the socket.
This is the agent's side and the one place of `os.fork`; what the guard itself does is in guardian.py.
"""

import array
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from xim_agent.engine.guardian import IGNORED, Guardian
from xim_agent.engine.leftovers import Leftovers
from xim_agent.engine.tree import descendants, process, send
from xim_agent.errors import AgentError
from xim_agent.prctl import CHILD_SUBREAPER, PDEATHSIG, prctl


def bundle() -> str | None:
    """Directory that a one-file bootloader unpacked for us and removes when it sees us end; None when there is none."""
    path: str = getattr(sys, "_MEIPASS", "")
    return path if Path(path).name.startswith("_MEI") else None


def die_with_parent() -> None:
    """In the child of a one-file bootloader: SIGKILL for us when the bootloader dies. Elsewhere nothing happens.

    Call it first of all. A bootloader that died even before leaves us with a parent that runs another program.
    """
    if bundle() is None:
        return
    prctl(PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError):
        if not Path(f"/proc/{os.getppid()}/exe").samefile("/proc/self/exe"):
            os.kill(os.getpid(), signal.SIGKILL)


class GuardLost(AgentError):
    """The guard is gone, so nothing would end vLLM after us: the agent must end and be started again."""

    def __init__(self) -> None:
        super().__init__("guard_lost", "the process that guards vLLM has died")


@dataclass(frozen=True)
class Child:
    """A started program. Closing its streams is the caller's."""

    pid: int
    stdout: trio.lowlevel.FdStream
    stderr: trio.lowlevel.FdStream
    status: trio.lowlevel.FdStream

    async def wait(self) -> int:
        """Exit status, negative for a signal. Raises GuardLost. Once; a cancelled call may be repeated."""
        raw = await self.status.receive_some(4)
        if not raw:
            raise GuardLost
        return os.waitstatus_to_exitcode(int.from_bytes(raw, "little"))

    async def aclose(self) -> None:
        for stream in (self.stdout, self.stderr, self.status):
            await stream.aclose()


class Guard:
    """The agent's end. One a process; usable in one `trio.run`. Every call raises GuardLost when the guard has died."""

    def __init__(self, control: socket.socket, pid: int) -> None:
        self.pid = pid
        self._stdlib = control
        self._control: trio.socket.SocketType | None = None
        self._lock = trio.Lock()
        self._calls = 0

    @classmethod
    def start(cls) -> "Guard":
        """Forks. Call in the main thread, before `trio.run` and before any thread is started."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        unpacked = bundle()
        bootloader = process(os.getppid()) if unpacked else None
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)  # until the guard ignores them
        pid = os.fork()
        if pid == 0:
            try:
                prctl(CHILD_SUBREAPER, 1)
                # A parent-death signal is sound below the guard: it has one thread, which ends only with the guard.
                Guardian(theirs, os.fork, lambda: prctl(PDEATHSIG, signal.SIGKILL), unpacked, bootloader).main()
            finally:
                os._exit(70)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        prctl(CHILD_SUBREAPER, 1)  # should the guard be killed, its orphans come to us and not to init
        return cls(ours, pid)

    async def _call(self, op: str, fds: Sequence[int] = (), **values: Any) -> dict[str, Any]:
        async with self._lock:
            if self._control is None:
                self._control = trio.socket.from_stdlib_socket(self._stdlib)
            self._calls += 1
            message = json.dumps({"call": self._calls, "op": op, **values}).encode()
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                await self._control.sendmsg([message], rights)
                while True:
                    raw = await self._control.recv(65536)
                    if not raw:
                        raise GuardLost
                    reply: dict[str, Any] = json.loads(raw)
                    if reply["call"] == self._calls:  # an older one belongs to a call that was cancelled
                        return reply
            except OSError as error:
                raise GuardLost from error

    async def hold(self, fd: int) -> None:
        """Gives the guard a copy of a locked descriptor, which it keeps until it has cleaned up."""
        await self._call("hold", [fd])

    async def spawn(
        self, argv: Sequence[str], env: Mapping[str, str], cwd: str, leftovers: Leftovers, *, background: bool = False
    ) -> Child:
        """Starts a program in its own session, stdin /dev/null, both outputs as pipes; with `background` it gives way
        to whatever else wants a core.

        `leftovers` names what is swept, and where that is noted, when the tree is gone. Raises OSError as `execve`
        does. Cancelled: the program may run; `kill_all` ends it.
        """
        body = {"argv": list(argv), "env": dict(env), "cwd": cwd, "file": leftovers.file, "background": background}
        body |= {"sockets": leftovers.sockets, "scratch": leftovers.scratch}
        payload = os.memfd_create("spawn")  # argv and environment may be larger than a datagram
        pipes = [os.pipe2(os.O_CLOEXEC) for _ in range(3)]
        kept = [r for r, _ in pipes]
        try:
            _write_all(payload, json.dumps(body).encode())
            reply = await self._call("spawn", [payload, *(w for _, w in pipes)])
            if error := reply.get("errno"):
                raise OSError(error, os.strerror(error), argv[0])
            out, err, status = (trio.lowlevel.FdStream(fd) for fd in kept)
            kept = []
            return Child(reply["pid"], out, err, status)
        finally:
            for fd in [payload, *(w for _, w in pipes), *kept]:
                os.close(fd)

    async def signal(self, pid: int, signum: signal.Signals) -> None:
        """To a program that was spawned here and has not ended; else nothing happens."""
        await self._call("signal", pid=pid, signum=int(signum))

    async def kill_all(self) -> list[int]:
        """SIGKILL to everything below the guard until nothing is left, then the sweep; at most 4 s.

        Returns the processes that the kernel keeps alive nevertheless.
        """
        left: list[int] = (await self._call("kill_all"))["left"]
        return left

    async def end_orphans(self, notes: str) -> None:
        """After GuardLost: ends what the guard has left to us, and sweeps what `notes` says is theirs."""
        while orphans := descendants(os.getpid()):
            send((p.pid for p in orphans), signal.SIGKILL)
            await trio.sleep(0.02)
        Leftovers.load(notes).sweep()

    def close(self) -> None:
        """Ends the guard and waits for it, at most 10 s (it first ends whatever still runs). Call after `trio.run`."""
        self._stdlib.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
