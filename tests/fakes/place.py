"""The executable as router and as any number of agents that never get as far as an engine. Synchronous."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from fakes.crash import library
from fakes.stack import free_port, until

from xim_agent.router.store import Store


@dataclass
class Place:
    """Executable, a running router, and a directory for each agent."""

    exe: str
    root: Path
    port: int = field(default_factory=free_port)
    made: int = 0

    def __post_init__(self) -> None:
        self.data = self.root / "router"
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def library(self) -> Path:
        """Of failpoints.c."""
        return library(self.root)

    def directory(self) -> Path:
        self.made += 1
        return self.root / f"agent{self.made}"

    def env(self, state: Path, environ: dict[str, str], settings: dict[str, str]) -> dict[str, str]:
        kept = {n: v for n, v in os.environ.items() if not n.startswith("XEROTIER") and "proxy" not in n.lower()}
        own = {"CONFIG_PATH": str(state), "MODEL_CACHE_PATH": f"{state}-cache", "LOG_FORMAT": "console", **settings}
        return kept | {"HOME": str(self.root)} | environ | {f"XEROTIER_AGENT_{n}": v for n, v in own.items()}

    def router(self, *args: str) -> subprocess.CompletedProcess[str]:
        command = [self.exe, "router", *args, "--data", str(self.data)]
        return subprocess.run(command, capture_output=True, text=True, check=True)

    def new_key(self) -> tuple[str, str]:
        """Number and text of a join key."""
        now = time.time()
        with Store.open(self.data) as store:
            number, text = store.create_join_key(project="p", region="local", uses=1, expires_at=now + 3600, now=now)
        return str(number), text

    def join_key(self) -> str:
        return self.new_key()[1]

    def enroll(
        self, state: Path | None = None, environ: dict[str, str] | None = None, **settings: str
    ) -> subprocess.CompletedProcess[str]:
        env = self.env(state or self.directory(), environ or {}, settings)
        return subprocess.run([self.exe, "enroll"], env=env, capture_output=True, text=True, check=False, timeout=60)

    def enrolled(self) -> tuple[Path, str]:
        """State directory and id of a new agent."""
        state = self.directory()
        done = self.enroll(state, JOIN_KEY=self.join_key())
        assert done.returncode == 0, done.stderr
        return state, json.loads((state / "enrollment.json").read_bytes())["enrollment"]["agent_id"]

    @contextmanager
    def run(
        self, state: Path, environ: dict[str, str] | None = None, user: int | None = None, **settings: str
    ) -> Iterator["Running"]:
        port = free_port()
        log = state.with_name(state.name + f"-{port}.log")
        env = self.env(state, environ or {}, {"METRICS_PORT": str(port), **settings})
        with log.open("wb") as out:
            popen = subprocess.Popen([self.exe, "run"], env=env, stdout=out, stderr=out, user=user)
        try:
            yield Running(popen, log, port)
        finally:
            popen.terminate()
            popen.wait(30)


@dataclass
class Running:
    popen: subprocess.Popen[bytes]
    log: Path
    port: int

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def metrics(self) -> str:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/metrics", trust_env=False).text
        except httpx.HTTPError:
            return ""

    def label(self, metric: str, code: str) -> bool:
        return f'{metric}{{code="{code}"}} ' in self.metrics()


@contextmanager
def serving_router(exe: str, root: Path) -> Iterator[Place]:
    place = Place(exe, root)
    log = root / "router.log"
    with log.open("wb") as out:
        command = [exe, "router", "serve", "--listen", f"127.0.0.1:{place.port}", "--data", str(place.data)]
        popen = subprocess.Popen(command, stderr=out)
    try:
        until("the router listens", lambda: "listening" in log.read_text(), 15)
        yield place
    finally:
        popen.terminate()
        popen.wait(15)
