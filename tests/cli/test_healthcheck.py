"""`healthcheck` as Docker runs it: in processes, beside what of an agent it meets."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from fakes.stack import free_port

from xim_agent.config import sources

ROOT = Path(__file__).parents[2]


@contextmanager
def agent(status: int, text: str) -> Iterator[int]:
    """A port that gives one answer to /readyz, and none to anything else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/readyz":
                self.close_connection = True
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def check(*flags: str, **settings: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "http_proxy": "http://127.0.0.1:1"}
    env |= {f"XEROTIER_AGENT_{name}": value for name, value in settings.items()}
    command = [sys.executable, "-m", "xim_agent", "healthcheck", *flags]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("status", "text", "code"), [(200, "ready\n", 0), (503, "not ready: link: x\nnot ready: y\n", 1)]
)
def test_the_exit_code_is_the_readiness_and_reasons_are_printed(status: int, text: str, code: int) -> None:
    with agent(status, text) as port:
        done = check(METRICS_PORT=str(port), METRICS_HOST="0.0.0.0")
    assert (done.returncode, done.stdout, done.stderr) == (code, text * code, "")


def test_a_flag_wins_over_a_variable() -> None:
    with agent(200, "ready\n") as port:
        assert check("--metrics-port", str(port), METRICS_PORT=str(free_port())).returncode == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"METRICS_PORT": "0"}, "METRICS_PORT is 0"),
        ({"DISABLE_METRICS_SERVER": "1"}, "DISABLE_METRICS_SERVER is set"),
        ({"METRICS_HOST": "127.0.0.1", "METRICS_PORT": "1"}, "no agent answers on 127.0.0.1 port 1: "),
    ],
)
def test_nobody_who_could_be_asked_is_not_ready(settings: dict[str, str], says: str) -> None:
    done = check(**settings)
    assert (done.returncode, done.stdout) == (1, "")
    assert says in done.stderr


def test_something_else_on_the_port_is_not_ready() -> None:
    with agent(404, "what?") as port:
        assert check(METRICS_PORT=str(port)).returncode == 1


def test_it_imports_nothing_of_the_stack() -> None:
    """It runs every few seconds, beside an engine that wants the CPU."""
    code = (
        "import sys; sys.argv[1:] = ['healthcheck']; from xim_agent.__main__ import main; main(); print(*sys.modules)"
    )
    env = {"XEROTIER_AGENT_METRICS_PORT": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "xim_agent" in loaded
    assert not loaded & {"trio", "httpx", "h11", "msgspec", "cryptography", "starlette", "hypercorn", "rich", "psutil"}


def test_one_setting_by_itself_whatever_is_wrong_with_the_others() -> None:
    environ = {"XEROTIER_AGENT_METRICS_PORT": "x", "XEROTIER_AGENT_METRICS_HOST": "::1", "XEROTIER_AGENT_NAME": ""}
    found = [sources.alone(attr, {}, environ) for attr in ("metrics_port", "metrics_host", "name", "on_final_error")]
    assert found == [9094, "::1", None, "exit"]
    assert sources.alone("metrics_port", {"metrics_port": "1"}, environ) == 1
