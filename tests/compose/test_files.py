"""What the compose files say, as the real Compose renders it: nothing is started here."""

import re
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fakes.compose import BIN, PLACE, ROOT, build_module, compose, rendered

from xim_agent.config.fields import OPTIONS, Config
from xim_agent.outside import longest_stop

AGENTS = {
    "compose.agent-nvidia.yaml": "xim-vllm-cuda",
    "compose.agent-amd-rocm.yaml": "xim-vllm-rocm",
    "compose.agent-amd-cpu-zendnn.yaml": "xim-vllm-zendnn",
    "compose.agent-cpu.yaml": "xim-vllm-cpu",
}
ALONE = sorted(path.name for path in PLACE.glob("*.yaml") if "podman" not in path.name)
STACKS = [*AGENTS, "compose.agents-nvidia.yaml", "compose.local.yaml"]
OURS = re.compile(r"/(xim-[a-z-]+):")


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    return build_module("compose_files")


DEFAULTS = {"XEROTIER_AGENT_VLLM_PATH": "/opt/vllm/bin/vllm", "XEROTIER_AGENT_ON_FINAL_ERROR": "park"}


def agent(file: str, **env: str) -> dict[str, Any]:
    found: dict[str, Any] = rendered(file, env=env)["services"]["agent"]
    return found


def services(file: str, **env: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = rendered(file, env=env)["services"]
    return found


def ours(file: str) -> dict[str, dict[str, Any]]:
    return {name: one for name, one in services(file).items() if "/xim-" in one["image"]}


@pytest.mark.parametrize("file", ALONE)
def test_it_follows_the_specification(file: str) -> None:
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", PLACE / file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", ALONE)
def test_compose_takes_it_without_a_word(file: str) -> None:
    done = compose("-f", str(PLACE / file), "config", "-q")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("file", AGENTS)
def test_it_is_what_the_table_of_options_gives(file: str, writer: ModuleType) -> None:
    stack = next(stack for stack in writer.STACKS if stack.file == file)
    assert (PLACE / file).read_text() == writer.text(stack), "run .venv/bin/python build/compose_files.py"


@pytest.mark.parametrize("file", AGENTS)
def test_the_header_has_every_variable_and_its_default(file: str) -> None:
    header = (PLACE / file).read_text().partition("\nservices:")[0]
    rows = re.sub(r"\n# {9,}", " ", header)
    for option in OPTIONS:
        row = re.search(rf"^#   {option.env} +(.*)\[(.*)\]$", rows, re.MULTILINE)
        assert row, option.env
        assert option.meta["help"] in row[1]
        if option.kind in (int, float) and option.default is not None:
            assert row[2] == str(option.default)
    assert "/var/lib/inference/.cache/xerotier/models]" in header, "as the page has it"
    assert "~" not in header


@pytest.mark.parametrize("file", AGENTS)
def test_every_variable_reaches_the_agent_and_an_unset_one_does_not(file: str) -> None:
    given = {option.env: f"/value/{number}" for number, option in enumerate(OPTIONS)}
    seen = agent(file, **given)["environment"]
    assert seen == given
    kept = {name: value for name, value in agent(file)["environment"].items() if value is not None}
    assert kept == DEFAULTS
    empty = agent(file, **dict.fromkeys(given, ""))["environment"]
    assert {name: value for name, value in empty.items() if value} == kept


def test_a_file_env_beside_it_does_the_same(tmp_path: Path) -> None:
    file = tmp_path / "compose.agent-nvidia.yaml"
    file.write_text((PLACE / file.name).read_text())
    (tmp_path / ".env").write_text("XEROTIER_AGENT_TENSOR_PARALLEL_SIZE=2\nSHM_SIZE=16g\nXEROTIER_AGENT_NAME='a $b'\n")
    found = agent(str(file))
    assert found["environment"]["XEROTIER_AGENT_TENSOR_PARALLEL_SIZE"] == "2"
    assert found["environment"]["XEROTIER_AGENT_NAME"] in ("a $b", "a $$b")  # `config` escapes what it prints
    assert found["shm_size"] == str(16 << 30)


@pytest.mark.parametrize("file", AGENTS)
def test_the_words_of_the_page(file: str) -> None:
    found = rendered(file)["services"]
    assert list(found) == ["agent"], "docker compose logs -f agent"
    one = found["agent"]
    assert one["image"] == f"ghcr.io/xerotier/container-agents/{AGENTS[file]}:latest"
    assert one["shm_size"] == str(90 << 30)
    assert mounts(one) == {
        "/var/lib/inference/.cache/xerotier/models": "/data/xerotier/models",
        "/var/lib/inference/.config/xerotier": "/data/xerotier/config",
    }


def mounts(one: dict[str, Any]) -> dict[str, str]:
    return {volume["target"]: volume["source"] for volume in one["volumes"]}


@pytest.mark.parametrize(("word", "size"), [("16g", 16 << 30), ("17179869184", 16 << 30), ("", 90 << 30)])
def test_shared_memory_as_a_word_or_in_bytes(word: str, size: int) -> None:
    assert agent("compose.agent-nvidia.yaml", SHM_SIZE=word)["shm_size"] == str(size)


def test_directories_images_and_grace_can_be_chosen() -> None:
    words = {"DOCKER_REGISTRY": "registry.example/x", "VERSION": "7", "MODELS_DIR": "/m", "CONFIG_DIR": "/c"}
    inside = {"XEROTIER_AGENT_MODEL_CACHE_PATH": "/in/m", "XEROTIER_AGENT_CONFIG_PATH": "/in/c"}
    one = agent("compose.agent-cpu.yaml", **words, **inside, XEROTIER_AGENT_STOP_GRACE="10m")
    assert one["image"] == "registry.example/x/xim-vllm-cpu:7"
    assert mounts(one) == {"/in/m": "/m", "/in/c": "/c"}
    assert one["stop_grace_period"] == "10m0s"


@pytest.mark.parametrize("file", STACKS)
def test_no_agent_is_killed_before_its_stop_can_end(file: str) -> None:
    needed = longest_stop(Config().drain_timeout_seconds)
    for name, one in services(file).items():
        if "agent" in name:
            parts = re.fullmatch(r"(?:(\d+)m)?(\d+)s", one["stop_grace_period"])
            assert parts
            assert int(parts[1] or 0) * 60 + int(parts[2]) >= needed


@pytest.mark.parametrize("file", STACKS)
def test_images_of_ours_are_built_and_never_pulled(file: str) -> None:
    """Of that name, the vendor has published another program."""
    assert ours(file)
    assert len(ours(file)) + 2 * (file == "compose.local.yaml") == len(services(file))
    for one in ours(file).values():
        assert one["pull_policy"] == "never"
        built = one["build"]
        assert built["context"] == str(ROOT)
        dockerfile = (ROOT / built["dockerfile"]).read_text()
        name = OURS.search(one["image"])
        assert name
        assert built["dockerfile"] == f"build/images/{name[1]}.Dockerfile"
        if name[1] != "xim-router":
            for word, value in DEFAULTS.items():
                assert f"{word}={value}" in dockerfile
            assert all(place in dockerfile for place in mounts(agent("compose.agent-cpu.yaml")))


@pytest.mark.parametrize("file", STACKS)
def test_no_more_rights_than_the_work_needs(file: str) -> None:
    for name, one in services(file).items():
        assert one["cap_drop"] == ["ALL"], name
        assert one["security_opt"] == ["no-new-privileges:true"], name
        assert one["read_only"], name
        assert not {"privileged", "network_mode", "ipc", "pid", "userns_mode", "cap_add", "user"} & one.keys(), name
        places = [volume["source"] for volume in one.get("volumes", [])]
        assert not [place for place in places if place in ("/", "/dev", "/dev/mem") or place.endswith("docker.sock")]
        for port in one.get("ports", []):
            assert port["host_ip"] == "127.0.0.1", name
        assert one.get("devices", []) == [] or "rocm" in file


@pytest.mark.parametrize("file", STACKS)
def test_agents_have_what_a_container_is_not_given_by_itself(file: str) -> None:
    for name, one in ours(file).items():
        if "agent" not in name:
            continue
        assert one["init"]
        assert one["pids_limit"] == -1, "podman's 2048 are too few"
        assert one["ulimits"]["memlock"] == {"soft": -1, "hard": -1}
        assert one["ulimits"]["nofile"]["hard"] >= 65535, "doctor warns below"
        assert one["restart"] == "unless-stopped"
        assert {"max-size", "max-file"} <= one["logging"]["options"].keys(), "logs fill no disk"
        assert [word.split(":")[0] for word in one["tmpfs"]] == ["/tmp"]


def test_gpus() -> None:
    (asked,) = agent("compose.agent-nvidia.yaml")["deploy"]["resources"]["reservations"]["devices"]
    assert asked == {"driver": "nvidia", "count": -1, "capabilities": ["gpu"]}
    rocm = agent("compose.agent-amd-rocm.yaml", RENDER_GID="105")
    assert {device["source"] for device in rocm["devices"]} == {"/dev/kfd", "/dev/dri"}
    assert rocm["group_add"] == ["44", "105"]
    for file in ("compose.agent-cpu.yaml", "compose.agent-amd-cpu-zendnn.yaml"):
        assert not {"devices", "deploy", "group_add"} & agent(file).keys()


def test_stacks_on_one_machine_are_not_taken_for_each_other() -> None:
    names = [rendered(file)["name"] for file in STACKS]
    assert len(set(names)) == len(names)


def test_several_agents_share_no_directory_and_no_gpu() -> None:
    found = services("compose.agents-nvidia.yaml", JOIN_KEY_1="xjk_1", XEROTIER_AGENT_LOG_LEVEL="debug")
    assert len(found) == 2
    places = [source for one in found.values() for source in mounts(one).values()]
    assert len(set(places)) == 4
    environments = [one["environment"] for one in found.values()]
    for word in ("XEROTIER_AGENT_CUDA_VISIBLE_DEVICES", "XEROTIER_AGENT_NAME", "XEROTIER_AGENT_JOIN_KEY"):
        assert len({environment[word] for environment in environments}) == 2
    assert {environment["XEROTIER_AGENT_LOG_LEVEL"] for environment in environments} == {"debug"}


@pytest.mark.parametrize("file", AGENTS)
def test_rootless_podman_is_asked_for_nothing_that_it_refuses(file: str) -> None:
    one = rendered(file, "compose.podman.yaml")["services"]["agent"]
    assert one["userns_mode"] == "keep-id:uid=5152,gid=5152"
    assert not {"ulimits", "logging"} & one.keys(), "it cannot raise limits, and knows other options of logs"
    alone = agent(file)
    assert {name: one.get(name) for name in alone if name not in ("ulimits", "logging")} == {
        name: value for name, value in alone.items() if name not in ("ulimits", "logging")
    }
