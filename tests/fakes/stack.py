"""The real thing in processes: frozen executable, local router, real vLLM. Synchronous, for the end-to-end tests."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil


def free_port() -> int:
    with closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def until(what: str, check: Callable[[], Any], seconds: float, every: float = 0.05) -> Any:
    """Polls an outside condition; the bound is a failure with a name, not a synchroniser."""
    end = time.monotonic() + seconds
    while True:
        if result := check():
            return result
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {what}")
        threading.Event().wait(every)


class Proxy:
    """A TCP relay on loopback that can be cut: open connections end and new ones are refused."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = free_port()
        self._pairs: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.restore()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def restore(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def cut(self) -> None:
        assert self._listener is not None
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for s in list(self._pairs):
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
            except ConnectionRefusedError:
                near.close()
                continue
            except OSError:
                return
            self._pairs |= {near, far}
            threading.Thread(target=self._both, args=(near, far), daemon=True).start()

    def _both(self, near: socket.socket, far: socket.socket) -> None:
        back = threading.Thread(target=self._relay, args=(far, near), daemon=True)
        back.start()
        self._relay(near, far)
        back.join()
        self._pairs -= {near, far}
        near.close()
        far.close()

    def _relay(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            for s in (source, sink):
                with contextlib.suppress(OSError):
                    s.shutdown(socket.SHUT_RDWR)


@dataclass
class Process:
    """A child whose output goes to a file; every descendant it ever had is remembered while it is watched."""

    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def family(self) -> list[psutil.Process]:
        me = psutil.Process(self.popen.pid)
        return [me, *me.children(recursive=True)]

    def named(self, *parts: str) -> psutil.Process:
        """The descendant whose command line has all of `parts`."""

        def find() -> psutil.Process | None:
            for process in self.family():
                try:
                    if all(part in " ".join(process.cmdline()) for part in parts):
                        return process
                except psutil.Error:
                    continue
            return None

        found: psutil.Process = until(f"a process with {parts}", find, 10)
        return found

    def wait(self, seconds: float) -> int:
        return self.popen.wait(seconds)


def alive(family: list[psutil.Process]) -> list[str]:
    left = []
    for process in family:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                left.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
        except psutil.NoSuchProcess:
            continue
    return left


def shared_memory(family: Iterable[psutil.Process]) -> set[Path]:
    """Files in /dev/shm that these processes have mapped."""
    found: set[Path] = set()
    for process in family:
        try:
            maps = Path(f"/proc/{process.pid}/maps").read_text(errors="replace")
        except OSError:
            continue
        found |= {Path(path) for path in re.findall(r"/dev/shm/\S+", maps)}
    return found


@dataclass
class Stack:
    """Router and agent as separate processes of the executable, on a model directory."""

    exe: str
    vllm: str
    model: Path
    root: Path
    served: str = "toy"
    port: int = field(default_factory=free_port)
    metrics_port: int = field(default_factory=free_port)
    router: Process | None = None
    agent: Process | None = None
    api_key: str = ""
    join_key: str = ""
    count: int = 0

    def __post_init__(self) -> None:
        self.proxy = Proxy(self.port)
        self.data = self.root / "router"
        self.config = self.root / "config"
        self.socket = self.root / "vllm.sock"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def env(self, **more: str) -> dict[str, str]:
        own = {
            "HOME": str(self.root / "home"),
            "XEROTIER_AGENT_CONFIG_PATH": str(self.config),
            "XEROTIER_AGENT_MODEL_CACHE_PATH": str(self.root / "cache"),
            "XEROTIER_AGENT_MODEL_CACHE_MAX_SIZE_GB": "5",
            "XEROTIER_AGENT_METRICS_PORT": str(self.metrics_port),
            "XEROTIER_AGENT_VLLM_PATH": self.vllm,
            "XEROTIER_AGENT_VLLM_SOCKET_PATH": str(self.socket),
            "XEROTIER_AGENT_VLLM_ARGS": "--enforce-eager --max-model-len 16384",
            "XEROTIER_AGENT_VLLM_ENV": "VLLM_CPU_KVCACHE_SPACE=1",
        }
        kept = {k: v for k, v in os.environ.items() if not k.startswith("XEROTIER_")}
        return kept | own | more

    def cli(self, *args: str, **env: str) -> str:
        done = subprocess.run(
            [self.exe, *args], env=self.env(**env), capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{args}: {done.returncode}\n{done.stderr}"
        return done.stdout.strip()

    def start(self, name: str, *args: str, **env: str) -> Process:
        self.count += 1
        log = self.root / f"{self.count:02}-{name}.log"
        with log.open("wb") as out:
            popen = subprocess.Popen(
                [self.exe, *args], env=self.env(**env), stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        return Process(popen, log)

    def start_router(self) -> None:
        self.router = self.start(
            "router", "router", "serve", "--listen", f"127.0.0.1:{self.port}", "--public-url", self.proxy.url,
            "--public-url", self.url, "--data", str(self.data),
        )  # fmt: skip
        until("the router answers", self._router_up, 15)

    def _router_up(self) -> bool:
        try:
            return httpx.get(f"{self.url}/v1/models").status_code in (200, 401)
        except httpx.HTTPError:
            return False

    def prepare(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self.start_router()
        data = ("--data", str(self.data))
        self.cli("router", "model", "publish", str(self.model), "--name", self.served, *data)
        self.cli("router", "assign", self.served, *data)
        self.join_key = self.cli("router", "join-key", "create", "--project", "test", *data)
        self.api_key = self.cli("router", "api-key", "create", "--project", "test", *data)

    def start_agent(self, **env: str) -> None:
        self.agent = self.start("agent", "run", **env)

    def wait_ready(self, seconds: float = 300) -> None:
        assert self.agent is not None

        def ready() -> bool:
            assert self.agent is not None
            if self.agent.popen.poll() is not None:
                raise AssertionError(f"agent ended with {self.agent.popen.returncode}:\n{self.agent.text[-4000:]}")
            try:
                return httpx.get(f"http://127.0.0.1:{self.metrics_port}/readyz").status_code == 200
            except httpx.HTTPError:
                return False

        try:
            until("the agent is ready", ready, seconds, 0.1)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.agent.text[-6000:]}") from None

    def client(self, **more: Any) -> openai.OpenAI:
        more = {"max_retries": 0, "timeout": 60} | more
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.api_key, **more)

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers={"Authorization": f"Bearer {self.api_key}"}, timeout=90)

    def direct(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """The same request to the engine itself, past router and agent."""
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.socket)), timeout=60) as client:
            return client.post(f"http://engine{path}", json=body)

    def metric(self, name: str) -> float:
        text = httpx.get(f"http://127.0.0.1:{self.metrics_port}/metrics").text
        values = re.findall(rf"^{name}(?:{{[^}}]*}})? ([0-9.e+-]+)$", text, re.M)
        return sum(map(float, values))

    def stop_agent(self, seconds: float = 60) -> int:
        assert self.agent is not None
        family = self.agent.family()
        shared = shared_memory(family)
        self.agent.popen.send_signal(signal.SIGTERM)
        code = self.agent.wait(seconds)
        until(f"no process left of {alive(family)}", lambda: not alive(family), 10)
        assert not [path for path in shared if path.exists()]
        self.agent = None
        return code

    def close(self) -> None:
        for process in (self.agent, self.router):
            if process is not None and process.popen.poll() is None:
                family = process.family()
                process.popen.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    for member in family:
                        with_kill(member)


def with_kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


def stream_lines(response: httpx.Response) -> Iterator[dict[str, Any] | str]:
    for line in response.iter_lines():
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


@contextmanager
def running(stack: Stack) -> Iterator[Stack]:
    try:
        stack.prepare()
        yield stack
    finally:
        stack.close()
