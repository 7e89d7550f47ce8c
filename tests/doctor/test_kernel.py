"""Limits of real processes and made-up ones, sysctls of made-up machines, real locks."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from xim_agent import files
from xim_agent.doctor import kernel
from xim_agent.doctor.kernel import ENDLESS, Limit

ROOT = Path("/")


def test_the_limits_of_this_process_and_of_another() -> None:
    names = {"files": resource.RLIMIT_NOFILE, "memlock": resource.RLIMIT_MEMLOCK}
    mine = {name: resource.getrlimit(number) for name, number in names.items()}
    endless = {-1: ENDLESS}
    expected = {name: Limit(*(endless.get(n, n) for n in pair)) for name, pair in mine.items()}
    assert kernel.limits(ROOT, "self") == expected
    command = [sys.executable, "-c", "print(flush=True); input()"]

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (99, mine["files"][1]))

    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=lower)
    assert other.stdout
    other.stdout.readline()
    assert kernel.limits(ROOT, str(other.pid))["files"].soft == 99
    other.communicate(b"\n")


@pytest.mark.parametrize(
    ("soft", "hard", "requests", "status", "said"),
    [
        (65536, 65536, 64, "ok", "65536 open files, at most 65536 (mine)"),
        (1024, ENDLESS, 64, "ok", "1024 open files, at most inf"),
        (1024, 20000, 64, "warning", "vLLM wants 65535"),
        (1024, 65536, 4096, "failure", "only vLLM raises its own"),
        (512, 512, 64, "failure", "768 are needed for 64 requests at once"),
    ],
)
def test_open_files(soft: float, hard: float, requests: int, status: str, said: str) -> None:
    found = kernel.files(Limit(soft, hard), requests, "mine")
    assert (found.status, said in found.text) == (status, True), found
    assert found.exit_code == (78 if status == "failure" else 0)
    assert ("LimitNOFILE=65536" in found.cure) == (status != "ok")


@pytest.mark.parametrize(
    ("hard", "ranks", "infiniband", "status"),
    [
        (8 << 20, 2, True, "warning"),
        (8 << 20, 1, True, "skipped"),
        (8 << 20, 2, False, "skipped"),
        (ENDLESS, 2, True, "ok"),
    ],
)
def test_locked_memory(hard: float, ranks: int, infiniband: bool, status: str) -> None:
    found = kernel.memlock(Limit(hard, hard), ranks, infiniband)
    assert found.status == status
    assert ("LimitMEMLOCK=infinity" in found.cure) == (status == "warning")


def test_infiniband(tmp_path: Path) -> None:
    assert not kernel.has_infiniband(tmp_path)
    (tmp_path / "sys/class/infiniband").mkdir(parents=True)
    assert not kernel.has_infiniband(tmp_path)
    (tmp_path / "sys/class/infiniband/mlx5_0").mkdir()
    assert kernel.has_infiniband(tmp_path)


def test_socket_buffers(tmp_path: Path) -> None:
    assert kernel.buffers(tmp_path).status == "skipped"
    directory = tmp_path / "proc/sys/net/ipv4"
    directory.mkdir(parents=True)
    (directory / "tcp_rmem").write_text("4096\t131072\t6291456\n")
    (directory / "tcp_wmem").write_text("4096\t16384\t4194304\n")
    assert kernel.buffers(tmp_path).status == "ok"
    (directory / "tcp_wmem").write_text("4096\t16384\t212992\n")
    found = kernel.buffers(tmp_path)
    assert (found.status, found.exit_code) == ("warning", 0)
    assert found.text.startswith("net.ipv4.tcp_wmem ends at 212992 bytes")
    assert found.cure.startswith("`sysctl -w net.ipv4.tcp_wmem='4096 16384 4194304'` (to keep it")
    (directory / "tcp_rmem").write_text("nonsense")
    assert kernel.buffers(tmp_path).status == "skipped"


def test_who_holds_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "enrollment.lock"
    assert kernel.holder(ROOT, path) is None
    fd = files.lock(path, 0o600)
    assert kernel.holder(ROOT, path) == str(os.getpid())
    found = kernel.agent(kernel.holder(ROOT, path), tmp_path)
    assert (found.status, f"with pid {os.getpid()}" in found.text) == ("ok", True)
    os.close(fd)
    assert kernel.holder(ROOT, path) is None, "the pid in the file is of no matter then"
    assert kernel.agent(None, tmp_path).text == f"none runs on {tmp_path}"


def test_locks_of_other_files_and_kinds_are_no_matter(tmp_path: Path) -> None:
    path = tmp_path / "enrollment.lock"
    path.write_text("77\n")
    info = path.stat()
    here = f"{os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x}"
    (tmp_path / "proc").mkdir()

    def held_by(row: str) -> str | None:
        (tmp_path / "proc/locks").write_text(f"1: {row} 0 EOF\n2: -> FLOCK  ADVISORY  WRITE 5 x 0 EOF\nrubbish\n")
        return kernel.holder(tmp_path, path)

    assert held_by(f"FLOCK  ADVISORY  WRITE 5 {here}:{info.st_ino}") == "5"
    assert held_by(f"FLOCK  ADVISORY  WRITE 77 00:ff:{info.st_ino}") == "77", "devices differ on btrfs"
    assert held_by(f"FLOCK  ADVISORY  WRITE 5 00:ff:{info.st_ino}") is None
    assert held_by(f"FLOCK  ADVISORY  WRITE 5 {here}:{info.st_ino + 1}") is None
    assert held_by(f"POSIX  ADVISORY  WRITE 5 {here}:{info.st_ino}") is None
