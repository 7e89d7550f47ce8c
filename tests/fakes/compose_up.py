"""A shipped Compose file, brought up on a Docker daemon of the tests' own (fakes/docker.py)."""

import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fakes.compose import BIN, PLACE
from fakes.docker import Docker
from fakes.stack import until

REGISTRY = "xim-test"


@dataclass
class Project:
    """A project of Compose on that daemon; `env`: variables of its files."""

    docker: Docker
    file: str
    override: Path
    env: dict[str, str]

    def run(self, *arguments: str, timeout: float = 900, **env: str) -> subprocess.CompletedProcess[str]:
        words = [str(BIN / "docker-compose"), "-f", str(PLACE / self.file), "-f", str(self.override), *arguments]
        given = self.docker.env | {"DOCKER_REGISTRY": REGISTRY} | self.env | env
        return subprocess.run(words, env=given, capture_output=True, text=True, timeout=timeout, check=False)

    def __call__(self, *arguments: str, timeout: float = 900, **env: str) -> str:
        """stdout of a command that has to succeed; what the services said, when it does not."""
        done = self.run(*arguments, timeout=timeout, **env)
        assert done.returncode == 0, f"{arguments}: {done.stderr[-3000:]}\n{self.run('logs').stdout[-6000:]}"
        return done.stdout

    def up(self, *services: str, **env: str) -> None:
        self("up", "-d", "--no-build", *services, **env)

    def logs(self, service: str) -> str:
        return self("logs", "--no-log-prefix", service)

    def container(self, service: str) -> dict[str, Any]:
        """What the daemon knows of it."""
        found: list[dict[str, Any]] = json.loads(self.docker("inspect", self("ps", "-aq", service).strip()))
        return found[0]

    def address(self, service: str) -> str:
        networks = self.container(service)["NetworkSettings"]["Networks"]
        return str(next(iter(networks.values()))["IPAddress"])

    def until_said(self, service: str, pattern: str, seconds: float = 60) -> re.Match[str]:
        found: re.Match[str] = until(
            f"{service} says {pattern}", lambda: re.search(pattern, self.logs(service)), seconds, 0.3
        )
        return found

    def until_healthy(self, service: str, seconds: float = 480) -> None:
        def healthy() -> bool:
            state = self.container(service)["State"]
            assert state["Running"], self.logs(service)[-4000:]
            return bool(state["Health"]["Status"] == "healthy")

        try:
            until(f"{service} is healthy", healthy, seconds, 0.5)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs(service)[-6000:]}") from None


def override(path: Path, services: dict[str, dict[str, Any]], reset: tuple[str, ...] = ()) -> Path:
    """What differs on a machine that cannot raise limits: JSON is YAML, but for the tag that takes a service out."""
    lines = [f"  {name}: {json.dumps(one)}" for name, one in services.items()]
    lines += [f"  {name}: !reset null" for name in reset]
    text = "services:\n" + "\n".join(lines) + "\n"
    path.write_text(text.replace('"RESET"', "!reset null"))
    return path


def plain() -> dict[str, Any]:
    """For an agent: no limits to raise, vLLM's settings for a small machine, and no 15 s between its checks."""
    return {
        "ulimits": "RESET",
        "healthcheck": {"interval": "3s"},
        "environment": {
            "XEROTIER_AGENT_VLLM_ARGS": "--enforce-eager --max-model-len 4096",
            "XEROTIER_AGENT_VLLM_ENV": "VLLM_CPU_KVCACHE_SPACE=1",
            "XEROTIER_AGENT_MODEL_CACHE_MAX_SIZE_GB": "2",
        },
    }


def owned(path: Path) -> Path:
    """As README has it: of uid 5152 alone."""
    path.mkdir(parents=True)
    os.chown(path, 5152, 5152)
    path.chmod(0o700)
    return path
