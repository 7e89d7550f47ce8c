"""What the kernel grants a process, and who holds a lock. `root` is `/`, or a tree like it. Blocking; reads only."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from xim_agent.doctor.report import Finding, failure, ok, skipped, warning

ENDLESS = float("inf")
# vLLM raises its own soft limit to this, and warns of trouble to come when the hard limit is lower (set_ulimit).
VLLM_FILES = 65535
OWN_FILES = 512  # the agent's and vLLM's without requests: libraries, sockets, weights, logs
FILES_PER_REQUEST = 4  # agent: engine, spool; vLLM: connection, and one to spare
# The product asks for 4 MiB each way: what a round trip of 100 ms needs for 330 Mbit/s. TCP's own autotuning ends at
# these numbers (net.core.rmem_max is for programs that set a size, which this one does not).
BUFFER = 4 << 20
_RAISE = {
    "files": "systemd: LimitNOFILE=65536; docker: --ulimit nofile=65536; a shell: `ulimit -n 65536`",
    "memlock": "systemd: LimitMEMLOCK=infinity; docker: --ulimit memlock=-1",
}
_ROW = re.compile(r"^Max (open files|locked memory) +(\S+) +(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Limit:
    soft: float
    hard: float


def limits(root: Path, pid: str) -> dict[str, Limit]:
    """Of a process: `files`, and `memlock` in bytes. `pid` may be "self". Raises OSError."""
    names = {"open files": "files", "locked memory": "memlock"}
    text = (root / "proc" / pid / "limits").read_text()
    return {names[what]: Limit(_number(soft), _number(hard)) for what, soft, hard in _ROW.findall(text)}


def _number(word: str) -> float:
    return ENDLESS if word == "unlimited" else float(word)


def files(limit: Limit, requests: int, whose: str) -> Finding:
    """`requests`: most at once; `whose`: the process that has the limit."""
    needed = OWN_FILES + FILES_PER_REQUEST * requests
    text = f"{limit.soft:.0f} open files, at most {limit.hard:.0f} ({whose})"
    if limit.hard < needed:
        return failure("files", f"{text}; {needed} are needed for {requests} requests at once", _RAISE["files"])
    if limit.soft < needed:
        return failure("files", f"{text}; {needed} are needed, and only vLLM raises its own", _RAISE["files"])
    if limit.hard < VLLM_FILES:
        return warning("files", f"{text}; vLLM wants {VLLM_FILES}", _RAISE["files"])
    return ok("files", text)


def memlock(limit: Limit, ranks: int, infiniband: bool) -> Finding:
    """NCCL over InfiniBand or RoCE locks what it sends."""
    if limit.hard == ENDLESS:
        return ok("memlock", "no limit on locked memory")
    if ranks < 2 or not infiniband:
        return skipped("memlock", "matters for several GPUs with InfiniBand or RoCE only")
    return warning(
        "memlock", f"only {limit.hard / 2**20:.0f} MiB may be locked: NCCL fails over RDMA", _RAISE["memlock"]
    )


def has_infiniband(root: Path) -> bool:
    try:
        return any((root / "sys/class/infiniband").iterdir())
    except OSError:
        return False


def buffers(root: Path) -> Finding:
    small = {}
    for name in ("tcp_rmem", "tcp_wmem"):
        try:
            words = (root / "proc/sys/net/ipv4" / name).read_text().split()
            least, usual, most = map(int, words)
        except (OSError, ValueError) as error:
            return skipped("buffers", f"the kernel does not tell its socket buffers: {error}")
        if most < BUFFER:
            small[name] = f"`sysctl -w net.ipv4.{name}='{least} {usual} {BUFFER}'`", most
    if small:
        told = ", ".join(f"net.ipv4.{name} ends at {most} bytes" for name, (_, most) in small.items())
        cure = " and ".join(command for command, _ in small.values()) + " (to keep it: a file in /etc/sysctl.d)"
        return warning("buffers", f"{told}: far routers are slower to reach than the line allows", cure)
    return ok("buffers", f"TCP may grow to {BUFFER >> 20} MiB and more each way")


def holder(root: Path, lock: Path) -> str | None:
    """Pid of the process that took the flock of this file; None: nobody, or one in another container.

    By the kernel's list: to try the lock would, for that moment, take it from an agent that starts.
    """
    try:
        inode = lock.lstat()
        written = lock.read_text(errors="replace").partition("\n")[0].strip()
        rows = (root / "proc/locks").read_text().splitlines()
    except OSError:
        return None
    device = f"{os.major(inode.st_dev):02x}:{os.minor(inode.st_dev):02x}"
    for row in rows:
        words = row.split()
        if len(words) < 6 or words[1] != "FLOCK":
            continue
        where, _, number = words[5].rpartition(":")
        # Where a file system gives its parts devices of their own (btrfs), the pid in the file tells.
        if number == str(inode.st_ino) and (where == device or words[4] == written):
            return words[4]
    return None


def agent(pid: str | None, directory: Path) -> Finding:
    """A running one is as it should be, and told because the other checks look at what it uses."""
    if pid is None:
        return ok("agent", f"none runs on {directory}")
    return ok("agent", f"one runs on {directory} with pid {pid}; a second one would end with exit code 14")
