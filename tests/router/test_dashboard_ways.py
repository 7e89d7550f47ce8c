"""The ways to start an agent that *Add an agent* shows: the commands of the READMEs, and such as work."""

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
from fakes.compose import rendered

from xim_agent.cli.main import cli
from xim_agent.router.dashboard.ways import COMPOSE, INSECURE, insecure, only_here, ways

ROOT = Path(__file__).parents[2]
README, BARE = ROOT / "README.md", ROOT / "packaging" / "README.md"
KEY = "xjk_acme_eyJ2IjoxfQ"
TLS, PLAIN, LOCAL = ["https://router.example:8443"], ["http://10.0.0.5:8080"], ["http://127.0.0.1:8080"]


def shown(way: dict[str, Any]) -> list[str]:
    """Its command lines in their order."""
    return [line for step in way["steps"] for line in step.get("command", "").splitlines()]


def way(name: str, urls: list[str] = TLS) -> dict[str, Any]:
    return next(found for found in ways(KEY, urls) if found["id"] == name)


def test_every_command_is_one_of_a_readme() -> None:
    """The example there is for NVIDIA GPUs."""
    texts = {"nvidia": README.read_text(), "systemd": BARE.read_text(), "bare": BARE.read_text()}
    for name, text in texts.items():
        lines = shown(way(name))
        assert len(lines) >= 3
        assert [line for line in lines if not re.search(rf"(^|`){re.escape(line)}($|`)", text, re.MULTILINE)] == []


def test_there_is_a_way_for_every_compose_file_and_readme_names_the_same_machines() -> None:
    rows = dict(re.findall(r"^\| ([^|]+) \| `(compose\.agent-[^`]+)` \|", README.read_text(), re.MULTILINE))
    assert {file: machine for machine, file in rows.items()} == COMPOSE
    assert sorted(COMPOSE) == sorted(file.name for file in (ROOT / "compose").glob("compose.agent-*.yaml"))
    assert len(ways(KEY, TLS)) == len(COMPOSE) + 2


@pytest.mark.parametrize("urls", [TLS, PLAIN, LOCAL])
def test_the_key_is_pasted_and_in_no_command(urls: list[str]) -> None:
    for found in ways(KEY, urls):
        assert [step["paste"] for step in found["steps"] if "paste" in step] == [KEY]
        assert not any(KEY in line for line in shown(found))


@pytest.mark.parametrize(
    ("urls", "plain", "here"),
    [
        (TLS, False, False),
        (PLAIN, True, False),
        (LOCAL, False, True),
        (["http://localhost:1", "http://[::1]:1"], False, True),
        ([*PLAIN, *TLS], False, False),
        ([*LOCAL, *PLAIN], True, False),
    ],
)
def test_plain_http_is_allowed_only_where_it_is_the_only_way(urls: list[str], plain: bool, here: bool) -> None:
    assert (insecure(urls), only_here(urls)) == (plain, here)
    for found in ways(KEY, urls):
        text = "\n".join(shown(found))
        assert (INSECURE in text or "--insecure" in text) == plain, found["id"]
        assert (urls[0] in found["note"]) == here


@pytest.mark.parametrize("file", COMPOSE)
@pytest.mark.parametrize("urls", [TLS, PLAIN])
def test_compose_takes_what_the_commands_put_into_its_env_file(file: str, urls: list[str]) -> None:
    name = file.removeprefix("compose.agent-").removesuffix(".yaml")
    lines = shown(way(name, urls))
    settings = dict(re.findall(r"^echo (\w+)=(\S+) >> \.env$", "\n".join(lines), re.MULTILINE))
    agent = rendered(file, env=settings)["services"]["agent"]
    assert settings.items() <= agent["environment"].items()
    key = settings["XEROTIER_AGENT_JOIN_KEY_FILE"]
    (config,) = [v for v in agent["volumes"] if key.startswith(v["target"] + "/")]
    assert f"{config['source']}/join-key" in next(line for line in lines if "/dev/stdin" in line)
    assert f"docker compose -f {file} up -d" in lines


def test_the_unit_takes_the_key_from_where_the_commands_put_it() -> None:
    lines = shown(way("systemd", PLAIN))
    unit = (ROOT / "packaging" / "systemd" / "xerotier-xim-agent.service").read_text()
    credential = re.search(r"^LoadCredential=join-key:(\S+)$", unit, re.MULTILINE)
    settings = re.search(r"^EnvironmentFile=-?(\S+)$", unit, re.MULTILINE)
    assert credential is not None
    assert settings is not None
    assert lines[0].endswith(f" {credential[1]}")
    assert f"echo {INSECURE} | sudo tee -a {settings[1]}" in lines


@pytest.mark.parametrize("urls", [TLS, PLAIN])
def test_the_bare_line_has_only_what_the_program_knows(urls: list[str]) -> None:
    words = shlex.split(next(line for line in shown(way("bare", urls)) if "xerotier-xim-agent" in line))
    at = words.index("xerotier-xim-agent")
    run = cli.get_command(click.Context(cli), words[at + 1])
    assert run is not None
    run.make_context("run", words[at + 2 :])
    known = {name for option in run.params for name in option.opts}
    assert {word.split("=")[0] for word in words[:at]} == {"XEROTIER_AGENT_JOIN_KEY_FILE", "XEROTIER_AGENT_VLLM_PATH"}
    assert {"--join-key-file", "--vllm-path", "--insecure"} <= known
