"""A Docker daemon of the tests' own, in namespaces of its own; it, its containers and its mounts end with the test.

    with data_root(directory) as data:                       # images and layers: gigabytes, removed afterwards
        with daemon(data, network=True) as docker:           # builds may fetch; no bridge, `run` needs --network host
            docker("build", "--network", "host", "-t", "name", "context")
        with daemon(data) as docker:                         # the same images, a network that leads nowhere
            subprocess.run(["docker-compose", ...], env=docker.env)
            docker.ask("http://172.17.0.2:8080/")            # from inside that network

Needs root and Debian's docker.io (build/test --full installs it).
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

DOCKER = "/usr/bin/docker"  # Debian's own: a newer client wants a plugin for `build`
TREES = (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))  # of version 2: beside the old ones, or alone

# $1 a cgroup of ours, $2 that tree, $3 words for unshare. The inner shell is the first process of a PID namespace: all
# that was started in there dies with it. It ends the daemon when its stdin does, so also when the tests are killed.
OUTER = """
mkdir "$1" && echo $$ >"$1/cgroup.procs" || exit 1
c=$1 tree=$2 words=$3; shift 3
unshare -m -C -p -f --kill-child --mount-proc $words bash -c "$INNER" bash "$@"; r=$?
echo $$ >"$tree/cgroup.procs"
find "$c" -depth -type d -exec rmdir {} \\;
exit $r
"""
INNER = """
umount -R /sys/fs/cgroup; mount -t cgroup2 c /sys/fs/cgroup || exit 1
mount -t tmpfs none /run || exit 1
ip link set lo up
dockerd "$@" </dev/null & d=$!
read -r _
kill $d; wait $d
"""
ASK = """
import sys, urllib.request, urllib.error
url, data, *headers = sys.argv[1:]
request = urllib.request.Request(url, data.encode() or None, dict(h.split(": ", 1) for h in headers))
try: answer = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60)
except urllib.error.HTTPError as e: answer = e
except OSError as e: print(0, e, sep="\\n", end=""); sys.exit()
print(answer.status); sys.stdout.flush(); sys.stdout.buffer.write(answer.read())
"""


@dataclass(frozen=True)
class Docker:
    """A running daemon. `env`: for any client of it; `pid`: of a process in its namespaces."""

    env: dict[str, str]
    pid: int
    log: Path

    def __call__(self, *arguments: str, timeout: float = 900, stdin: bytes | None = None) -> str:
        """stdout of `docker ARGUMENTS`, which has to succeed."""
        done = self.run(*arguments, timeout=timeout, stdin=stdin)
        assert done.returncode == 0, f"docker {' '.join(arguments)}: {done.stdout[-3000:]}{done.stderr[-6000:]}"
        return done.stdout.strip()

    def run(
        self, *arguments: str, timeout: float = 900, stdin: bytes | None = None
    ) -> subprocess.CompletedProcess[str]:
        raw = subprocess.run(
            [DOCKER, *arguments], env=self.env, input=stdin, capture_output=True, timeout=timeout, check=False
        )
        out, error = raw.stdout.decode(errors="replace"), raw.stderr.decode(errors="replace")
        return subprocess.CompletedProcess(raw.args, raw.returncode, out, error)

    def load(self, tar: Path, name: str) -> str:
        """An image `name` from a tar of a root, as fakes/debian.py makes them; 1-2 s."""
        self("import", str(tar), name)
        return name

    def ask(self, url: str, data: str = "", *headers: str) -> tuple[int, str]:
        """Status (0: no connection) and body of a GET, or a POST of `data`, from inside the daemon's network."""
        command = ["nsenter", "-n", "-t", str(self.pid), sys.executable, "-c", ASK, url, data, *headers]
        status, _, body = subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition("\n")
        return int(status), body

    def logs(self, container: str) -> str:
        done = self.run("logs", container)
        return done.stdout + done.stderr


@contextmanager
def data_root(directory: Path) -> Iterator[Path]:
    """A directory for images, containers and volumes; its gigabytes are gone when this returns."""
    data = directory / "docker"
    data.mkdir()
    try:
        yield data
    finally:
        shutil.rmtree(data)


@contextmanager
def daemon(data: Path, *, network: bool = False) -> Iterator[Docker]:
    """One daemon at a time on `data`. `network`: that of this machine, for builds; else an empty one with a bridge."""
    assert os.geteuid() == 0, "a Docker daemon needs root"
    assert shutil.which("dockerd"), "apt install docker.io; build/test --full does"
    place = Path(tempfile.mkdtemp(prefix="xim-docker-", dir="/tmp"))  # short: a socket's path has 107 bytes at most
    tree = next(t for t in TREES if (t / "cgroup.procs").exists())
    host, log = f"unix://{place}/docker.sock", place / "log"
    words = ["-H", host, "--data-root", str(data), "--exec-root", "/run/docker", "-p", "/run/docker.pid"]
    words += ["--exec-opt", "native.cgroupdriver=cgroupfs", "--config-file", str(place / "daemon.json")]
    words += ["--bridge=none", "--iptables=false", "--ip-forward=false"] if network else []
    (place / "daemon.json").write_text("{}")
    outer = ["sh", "-c", OUTER, "sh", str(tree / place.name), str(tree), "" if network else "-n", *words]
    with log.open("wb") as out:
        # Not in the group that a Ctrl-C is for: it has to clean up.
        process = subprocess.Popen(
            outer,
            env=os.environ | {"INNER": INNER},
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    env = {n: v for n, v in os.environ.items() if not n.startswith(("DOCKER_", "COMPOSE_", "XEROTIER_"))}
    env |= {"DOCKER_HOST": host, "DOCKER_CONFIG": str(place), "DOCKER_BUILDKIT": "1"}
    try:
        yield Docker(env, _ready(env, process, log), log)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)
        shutil.rmtree(place)


def _ready(env: dict[str, str], process: subprocess.Popen[bytes], log: Path) -> int:
    """Waits for the daemon; the pid of the first process in its namespaces."""
    give_up = time.monotonic() + 30
    while subprocess.run([DOCKER, "info"], env=env, capture_output=True, check=False).returncode != 0:
        lives = process.poll() is None and time.monotonic() < give_up
        assert lives, log.read_text(errors="replace")[-3000:]
        time.sleep(0.05)
    pid = process.pid
    for _ in range(2):  # sh → unshare → bash
        with suppress(ValueError):
            pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
    return pid
