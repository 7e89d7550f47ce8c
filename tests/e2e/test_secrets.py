"""Secrets of every kind are planted everywhere, and looked for in everything that others can see.

The executable and the router are real; the engine is scripted, because it has to tell all it should not.
"""

import json
import re
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from fakes.engine import FAKE, write_model
from fakes.stack import Process, Stack, running, until

pytestmark = pytest.mark.e2e

SALT = "salt-secret-0123456789"
OPERATORS = {  # of vLLM's own: the operator gives them to vLLM, so its process has them, but no line of ours
    "api key": "api-key-0123456789",
    "hub token": "hf_0123456789abcdef",
    "json member": "json-password-0123456789",
}
PROXY = "proxy-password-0123456789"
PATHS = ("/metrics", "/status", "/readyz")


class Planted(Stack):
    """The engine writes what is in `says`, again at every start; the first one fails."""

    @property
    def says(self) -> Path:
        return self.root / "says"

    def env(self, **more: str) -> dict[str, str]:
        engine = [f"FAKE_VLLM_SAYS={self.says}", f"FAKE_VLLM_COUNT={self.root / 'starts'}", "FAKE_VLLM_EXIT=1"]
        own = {
            "XEROTIER_AGENT_LOG_LEVEL": "trace",
            "XEROTIER_AGENT_VLLM_ARGS": "--seed 1",
            "XEROTIER_AGENT_VLLM_ENV": " ".join(
                [*engine, "FAKE_VLLM_EXIT_FIRST=1", f"HF_TOKEN={OPERATORS['hub token']}"]
            ),
            "HTTPS_PROXY": f"http://user:{PROXY}@127.0.0.1:9",
        }
        return super().env(**{**own, **more})

    def secrets(self) -> dict[str, str]:
        """By what they are, for the message."""
        payload = self.join_key.split("_")[2]
        found = {"join key": payload, "salt": SALT, "proxy password": PROXY}
        path = self.config / "enrollment.json"
        if path.exists():
            state = json.loads(path.read_bytes())
            found["private key"] = state["key"]
            names = ("token", "current", "previous", "assignment")
            found |= {name: value for name in names if (value := (state["enrollment"] or {}).get(name))}
        return found

    def get(self, path: str) -> str:
        try:
            return httpx.get(f"http://127.0.0.1:{self.metrics_port}{path}", trust_env=False).text
        except httpx.HTTPError:
            return ""

    def seen(self) -> tuple[dict[str, str], dict[str, str]]:
        """What others can see of the agent now, by where they see it; and of vLLM, to which the operator gives more."""
        assert self.agent is not None
        ours, engines = {"log": self.agent.text, **{path: self.get(path) for path in PATHS}}, {}
        for process in self.agent.family():
            try:
                arguments = " ".join(process.cmdline())
                environment = Path(f"/proc/{process.pid}/environ").read_text(errors="replace")
            except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                continue  # an engine that failed, or a helper that has done its work
            if not environment:
                continue  # it ended between the two
            to = engines if "\0VLLM_NO_USAGE_STATS=" in "\0" + environment else ours
            to[f"arguments of {process.pid}"] = arguments
            to[f"environment of {process.pid}"] = environment
        return ours, engines

    def tell(self, *operators: str) -> None:
        """What the engine is going to say: each secret in its own line, coloured, and all of them in one of JSON.

        `operators`: of OPERATORS, those that were given to the agent.
        """
        words = {**self.secrets(), **{name: OPERATORS[name] for name in ("hub token", *operators)}}
        lines = [*words.values(), *(f"\x1b[31m{word}\x1b[0m" for word in words.values()), json.dumps(words)]
        self.says.write_text("\n".join(lines))


def leaks(seen: dict[str, str], secrets: dict[str, str]) -> list[str]:
    pairs = ((name, value, place, text) for name, value in secrets.items() for place, text in seen.items())
    return sorted(f"{name}: {place}" for name, value, place, text in pairs if value in text)


@pytest.fixture
def stack(agent_exe: Path, tmp_path: Path) -> Iterator[Planted]:
    model = write_model(tmp_path / "model")
    with running(Planted(str(agent_exe), str(FAKE), model, tmp_path / "stack")) as stack:
        stack.tell()
        yield stack


GIVEN = ("api key", "json member")


def check(stack: Planted, ours: dict[str, str], engines: dict[str, str], told: bool = True) -> None:
    """`told`: whether an engine that is there has said what it was given."""
    secrets = stack.secrets()
    assert leaks(ours, {**secrets, **OPERATORS}) == []
    assert leaks(engines, secrets) == []
    assert "***" in ours["log"] or not engines or not told, "it was said, and hidden"


def test_nothing_that_was_planted_is_seen(stack: Planted) -> None:
    """Before and after enrollment brought more secrets, with an engine that fails and tells all, at level trace."""
    stack.tell(*GIVEN)
    password = json.dumps({"password": OPERATORS["json member"]})
    stack.start_agent(
        XEROTIER_AGENT_JOIN_KEY=stack.join_key,
        XEROTIER_AGENT_VLLM_SALT_SECRET=SALT,
        XEROTIER_AGENT_VLLM_ARGS=f"--api-key {OPERATORS['api key']} --kv-transfer-config '{password}'",
    )
    until("the engine has failed once", lambda: "engine_failed" in stack.get("/readyz"), 30)
    check(stack, *stack.seen())
    stack.tell(*GIVEN)
    stack.wait_ready(60)
    ours, engines = stack.seen()
    check(stack, ours, engines)
    assert engines
    assert len(ours) >= 4 + 2 * 3, "log, three pages, and bootloader, agent and guard"
    assert stack.agent is not None
    assert OPERATORS["hub token"] not in stack.agent.text
    assert stack.router is not None
    assert leaks({"router": stack.router.text}, {**stack.secrets(), "api key": stack.api_key}) == []


def test_given_by_flags_they_are_gone_from_the_process_list(stack: Planted) -> None:
    command = ["run", "--join-key", stack.join_key, f"--vllm-salt-secret={SALT}", "--vllm-arg=--api-key"]
    command.append(f"--vllm-arg={OPERATORS['api key']}")
    stack.agent = stack.start("agent", *command, "--vllm-env", f"HF_TOKEN={OPERATORS['hub token']}")
    until("the agent has enrolled", lambda: stack.agent and "enrollment successful" in stack.agent.text, 30)
    check(stack, *stack.seen(), told=False)
    until("there is an engine", lambda: stack.seen()[1], 60)
    ours, engines = stack.seen()
    check(stack, ours, engines, told=False)
    assert "_FILE" in ours["log"], "the warning that names what is better"


@pytest.mark.parametrize("how", ["file", "systemd"])
def test_files_and_credentials_work_and_reach_no_environment(stack: Planted, tmp_path: Path, how: str) -> None:
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "join-key").write_text(stack.join_key + "\n")
    (credentials / "vllm-salt-secret").write_text(SALT + "\n")
    files = {
        "XEROTIER_AGENT_JOIN_KEY_FILE": str(credentials / "join-key"),
        "XEROTIER_AGENT_VLLM_SALT_SECRET_FILE": str(credentials / "vllm-salt-secret"),
    }
    stack.start_agent(**(files if how == "file" else {"CREDENTIALS_DIRECTORY": str(credentials)}))
    stack.wait_ready(60)
    ours, engines = stack.seen()
    check(stack, ours, engines)
    assert engines
    assert leaks(engines, {"the directory": str(credentials)}) == []
    assert '"vllm_salt_secret":"***"' in ours["/status"]


def test_no_core_is_dumped(stack: Planted, tmp_path: Path) -> None:
    """Not even where the operator's limits allow one. The core would be in the working directory of the process."""
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    try:
        for command in (["run"], ["router", "serve", "--listen", "127.0.0.1:0", "--data", str(tmp_path / "r")]):
            place = tmp_path / command[0]
            place.mkdir()
            env = stack.env(XEROTIER_AGENT_JOIN_KEY=stack.join_key)
            with (place / "log").open("wb") as log:
                popen = subprocess.Popen([stack.exe, *command], env=env, cwd=place, stdout=log, stderr=log)
            process = Process(popen, place / "log")
            until("it runs", lambda p=process: re.search("enrollment successful|listening", p.text), 30)
            family = process.family()
            family[1].send_signal(signal.SIGSEGV)  # the program; the first one is its bootloader
            popen.wait(30)
            psutil.wait_procs(family, 15)
            assert [path.name for path in place.iterdir()] == ["log"]
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
    probe = tmp_path / "probe"
    probe.mkdir()
    subprocess.run(["sh", "-c", "ulimit -c unlimited; kill -SEGV $$"], cwd=probe, check=False)
    if pattern == "core" and hard == resource.RLIM_INFINITY:
        assert list(probe.iterdir()), "this machine does write cores, or the test would show nothing"
