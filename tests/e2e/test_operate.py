"""`status`, `drain`, `resume`, SIGHUP and a stop of the executable; only the engine is scripted."""

import json
import signal
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes.scripted import Scripted, serving
from fakes.stack import until

pytestmark = pytest.mark.e2e

SECRET = "a prompt that nobody may read"


class Operated(Scripted):
    def begin(self, *words: str) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([self.exe, *words], env=self.env(), text=True, **pipes)

    def command(self, *words: str, code: int = 0) -> str:
        process = self.begin(*words)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        return out + err

    def status(self) -> Any:
        return json.loads(self.command("status", "--json"))


class Asked:
    """A stream of so many tokens, 20 a second, in a thread. `cut` is a client that goes away."""

    def __init__(self, stack: Operated, tokens: int) -> None:
        self.stack, self.begun, self.cut, self.whole = stack, threading.Event(), threading.Event(), b""
        self.body = {"model": "toy", "prompt": SECRET, "stream": True, "max_tokens": tokens, "fake": {"delay": 0.05}}
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
        assert self.begun.wait(20)

    def run(self) -> None:
        key = {"Authorization": f"Bearer {self.stack.api_key}"}
        with httpx.stream("POST", f"{self.stack.url}/v1/completions", json=self.body, headers=key, timeout=60) as reply:
            for data in reply.iter_raw():
                self.whole += data
                self.begun.set()
                if self.cut.is_set():
                    return


@pytest.fixture
def stack(agent_exe: Path, tmp_path: Path) -> Iterator[Operated]:
    with serving(Operated, agent_exe, tmp_path) as stack:
        yield stack


def test_an_operator_looks_drains_resumes_reloads_and_stops(stack: Operated) -> None:
    assert stack.agent is not None
    agent = stack.agent
    shown = until("why it is idle", lambda: (s := stack.command("status")).count("no request waits") and s, 60)
    assert "state     ready\n" in shown
    assert "model     toy " in shown
    assert f"router    {stack.proxy.url} answers" in shown
    (_, socket) = (stack.root / "cache" / "lock").read_text().split()
    assert stat.S_IMODE(Path(socket).stat().st_mode) == 0o600

    stream = Asked(stack, 100_000)
    found = stack.status()
    assert found["idle"] == []
    longest = found["work"]["sender"]["longest"]
    assert (longest["path"], longest["seconds"] > 0, longest["bytes"] > 0) == ("/v1/completions", True, True)
    assert longest["request"] in stack.command("status")
    assert stack.command("drain", "--no-wait").startswith("draining: 1 request runs, the longest for ")
    assert "state     draining, asked by an operator\n" in stack.command("status")
    reply = httpx.get(f"http://127.0.0.1:{stack.metrics_port}/readyz")
    assert (reply.status_code, "draining: an operator asked for it" in reply.text) == (503, True)
    waits = stack.begin("drain")
    size = len(stream.whole)
    until("the stream goes on", lambda: len(stream.whole) > size, 5)
    assert waits.poll() is None
    stream.cut.set()
    out, err = waits.communicate(timeout=30)
    assert (waits.returncode, out) == (0, "drained: no request runs; `resume` takes requests again\n"), err
    assert stack.command("resume") == "takes requests; no request runs\n"
    stack.wait_ready(20)

    (stack.config / "log-level").write_text("debug\n")
    agent.popen.send_signal(signal.SIGHUP)
    until("the level is another one", lambda: '"level_now": "debug"' in agent.text, 10)
    body = {"model": "toy", "prompt": SECRET, "max_tokens": 3}
    answered = until("it serves", lambda: (r := stack.post("/v1/completions", body)).status_code == 200 and r, 30)
    until("its line", lambda: '"acknowledged_ms": ' in agent.text, 10)
    line = next(json.loads(t) for t in agent.text.splitlines() if '"acknowledged_ms": ' in t)
    assert line["request"] == answered.headers["x-request-id"]
    times = [line[f"{hop}_ms"] for hop in ("asked", "replied", "first", "last", "ended", "acknowledged")]
    assert times == sorted(times)
    assert SECRET not in agent.text

    stream = Asked(stack, 60)
    agent.popen.send_signal(signal.SIGTERM)
    assert agent.wait(60) == 0
    stream.thread.join(10)
    assert stream.whole.endswith(b"data: [DONE]\n\n")
    phases = [json.loads(t) for t in agent.text.splitlines() if '"message": "drain ' in t]
    assert [(p["message"][:9], p["requests"], p["seconds_at_most"]) for p in phases] == [
        ("drain 1/4", 1, 5), ("drain 2/4", 1, 120), ("drain 3/4", 0, 5), ("drain 4/4", 0, 15),
    ]  # fmt: skip
    assert "[agent_absent]" in stack.command("status", code=1)
    assert "[agent_absent]" in stack.command("drain", code=1)
