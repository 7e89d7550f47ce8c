"""What stands between a client and the engine, each as processes whose CPU and memory can be read.

Peers are installed here, into a directory of the benchmark: nginx from the distribution's package without installing
it, vllm-router from PyPI into an environment of its own.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

HERE = Path(__file__).parent
NGINX = """
daemon off; master_process off; error_log stderr error; pid {place}/nginx.pid;
events {{ worker_connections 16384; }}
http {{
  access_log off; client_body_temp_path {place}/b; proxy_temp_path {place}/p; fastcgi_temp_path {place}/f;
  uwsgi_temp_path {place}/u; scgi_temp_path {place}/s;
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://unix:{engine}:/; proxy_http_version 1.1; proxy_buffering off; }}
  }}
}}
"""


@dataclass(frozen=True)
class Place:
    """`scratch`: for this row alone. `peers`: where peers are installed, kept between runs."""

    scratch: Path
    peers: Path
    engine: Path
    engine_port: int


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as made:
        return int(made.getsockname()[1])


@contextmanager
def running(*argv: object, **more: object) -> Iterator[subprocess.Popen[str]]:
    """Ends with the block: SIGTERM, 5 s, SIGKILL. `more`: of the environment."""
    env = (
        os.environ
        | {name: str(value) for name, value in more.items()}
        | {"PYTHONPATH": f"{HERE.parent.parent}:{HERE.parent}:{HERE}:{os.environ.get('PYTHONPATH', '')}"}
    )
    process = subprocess.Popen(list(map(str, argv)), stdout=subprocess.PIPE, text=True, env=env)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def python(script: str, *argv: object) -> tuple[object, ...]:
    return sys.executable, HERE / script, *argv


def said(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    while (line := process.stdout.readline()) and word not in line:
        pass
    if not line:
        raise SystemExit(f"{process.args}: ended before it was ready")


def wait_port(port: int, path: str | None = None, seconds: float = 30.0) -> None:
    """Until something listens and, with a `path`, answers that with 200."""
    give_up = time.monotonic() + seconds
    while True:
        try:
            if path is None:
                socket.create_connection(("127.0.0.1", port), 1).close()
            else:
                urlopen(f"http://127.0.0.1:{port}{path}", timeout=1).close()
        except OSError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.05)
        else:
            return


@contextmanager
def direct(place: Place) -> Iterator[tuple[str, int | None]]:
    """Yields what a client connects to, and the process that is measured."""
    yield str(place.engine), None


@contextmanager
def nginx(place: Place) -> Iterator[tuple[str, int | None]]:
    program = place.peers / "nginx/usr/sbin/nginx"
    if not program.exists():
        subprocess.run(["apt-get", "download", "nginx"], cwd=place.peers, check=True, capture_output=True)
        package = next(place.peers.glob("nginx_*.deb"))
        subprocess.run(["dpkg", "-x", package, place.peers / "nginx"], check=True)
    port = free_port()
    conf = place.scratch / "nginx.conf"
    conf.write_text(NGINX.format(place=place.scratch, port=port, engine=place.engine))
    with running(program, "-c", conf, "-p", place.scratch) as process:
        wait_port(port)
        yield str(port), process.pid


@contextmanager
def vllm_router(place: Place) -> Iterator[tuple[str, int | None]]:
    """Quiet, one worker, no retries; its health checks go to the engine too."""
    made = place.peers / "router-venv"
    if not (made / "bin/vllm-router").exists():
        subprocess.run([sys.executable, "-m", "venv", made], check=True)
        subprocess.run([made / "bin/pip", "install", "-q", "vllm-router"], check=True, stderr=subprocess.DEVNULL)
    port = free_port()
    argv = (made / "bin/vllm-router", "--host", "127.0.0.1", "--port", port, "--policy", "round_robin")
    argv += ("--worker-urls", f"http://127.0.0.1:{place.engine_port}", "--log-level", "error")
    with running(*argv, "--prometheus-port", free_port(), "--max-concurrent-requests", 4096) as process:
        wait_port(port, "/readiness")  # it listens before it has seen its worker
        yield str(port), process.pid


PEERS = {"direct": direct, "nginx": nginx, "vllm-router": vllm_router}


@dataclass(frozen=True)
class Usage:
    """`cpu` in seconds, `peak` in bytes."""

    cpu: float
    peak: int


def usage(pid: int | None, *, alone: bool = False) -> Usage:
    """`alone`: without the children, which are none of its work."""
    if pid is None:
        return Usage(0.0, 0)
    cpu, peak = 0.0, 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        cpu += int((task / "schedstat").read_text().split()[0]) / 1e9
        for child in [] if alone else (task / "children").read_text().split():
            below = usage(int(child))
            cpu, peak = cpu + below.cpu, peak + below.peak
    status = Path(f"/proc/{pid}/status").read_text()
    high = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return Usage(cpu, peak + int(high.split()[1]) * 1024)
