"""build/images as files; what they build is tested in test_built.py."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from xim_agent import __version__
from xim_agent.config import sources
from xim_agent.engine.environment import PRIVATE

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "build" / "images"
AGENTS = {f"xim-vllm-{kind}" for kind in ("cuda", "rocm", "zendnn", "cpu")}
FILES = {path.stem: path for path in sorted(IMAGES.glob("*.Dockerfile"))}
HADOLINT = Path(sys.executable).with_name("hadolint")


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, rest) of each, with its continuation lines joined and no comments."""
    text = re.sub(r"^#.*\n", "", FILES[name].read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found = [line.partition(" ") for line in text.splitlines() if line.strip()]
    return [(word, " ".join(rest.split())) for word, _, rest in found]


def last_stage(name: str) -> dict[str, list[str]]:
    stage: dict[str, list[str]] = {}
    for word, rest in instructions(name):
        if word == "FROM":
            stage = {}
        stage.setdefault(word, []).append(rest)
    return stage


def test_there_is_one_for_each_image() -> None:
    assert FILES.keys() == AGENTS | {"xim-router"}


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([HADOLINT, *FILES.values()], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", FILES)
def test_old_builders_can_read_it(name: str) -> None:
    """A syntax line fetches an image before anything else, and old BuildKit and buildah have no heredocs."""
    text = FILES[name].read_text()
    assert not re.search(r"^#\s*(syntax|escape|check)\s*=", text, re.MULTILINE | re.IGNORECASE)
    assert "<<" not in text


@pytest.mark.parametrize("name", FILES)
def test_every_base_can_be_given_by_its_digest(name: str) -> None:
    named = {rest.partition(" AS ")[2] for word, rest in instructions(name) if word == "FROM"}
    bases = [rest.partition(" AS ")[0] for word, rest in instructions(name) if word == "FROM"]
    assert set(bases) == {"${KEYS}", "${OLD}", "${AGENT}", "${BASE}", "scratch"}
    before = []
    for word, rest in instructions(name):
        if word == "FROM":
            break
        before.append((word, rest.partition("=")[::2]))
    defaults = {key: value for word, (key, value) in before if word == "ARG"}
    assert defaults.keys() == {"BASE", "AGENT", "OLD", "KEYS"}
    assert defaults["AGENT"] in named
    for base in ("BASE", "OLD", "KEYS"):
        assert re.fullmatch(r"[a-z/-]+:(?!latest)[\w.-]+", defaults[base])


@pytest.mark.parametrize("name", FILES)
def test_how_it_runs(name: str) -> None:
    stage, program = last_stage(name), "/opt/xerotier/xerotier-xim-agent"
    assert stage["USER"][-1] == "5152:5152"
    assert stage["STOPSIGNAL"] == ["SIGTERM"]
    assert stage["ENTRYPOINT"] == [f'["{program}", "{"run" if name in AGENTS else "router"}"]']
    asked = "" if name in AGENTS else ', "--metrics-port", "8080", "--path", "/dashboard/"'
    assert stage["HEALTHCHECK"][0].endswith(f' CMD ["{program}", "healthcheck"{asked}]')
    assert "HOME=/var/lib/inference" in stage["ENV"][0]
    (label,) = stage["LABEL"]
    assert f'org.opencontainers.image.title="{name}"' in label
    assert f"VERSION={__version__}" in stage["ARG"]
    steps = [rest for rest in stage["RUN"] if "groupadd" in rest]
    assert "groupadd --gid 5152" in steps[0]
    assert "useradd --uid 5152 --gid 5152 --home-dir /var/lib/inference" in steps[0]


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_the_settings_of_an_agent_are_valid_and_those_of_the_page(name: str) -> None:
    environ = dict(pair.split("=", 1) for pair in last_stage(name)["ENV"][0].split())
    ours = {word: value for word, value in environ.items() if word.startswith("XEROTIER_AGENT_")}
    config = sources.load({}, {"HOME": environ["HOME"], **ours})
    assert str(config.config_path) == "/var/lib/inference/.config/xerotier"
    assert str(config.model_cache_path) == "/var/lib/inference/.cache/xerotier/models"
    assert (config.vllm_path, config.on_final_error) == ("/opt/vllm/bin/vllm", "park")
    assert len(ours) == 4
    assert not any("KEY" in word or "SECRET" in word for word in environ)


def test_what_they_have_in_common_is_the_same_in_all() -> None:
    """They are read one by one, so it is written out in each; the executable's stages and the user's step."""
    parts = set()
    for path in FILES.values():
        text = path.read_text()
        parts.add(text[text.index("# The executable:") : text.index("FROM ${BASE}\n")])
    assert len(parts) == 1
    assert len({last_stage(name)["ENV"][0].partition(" NVIDIA")[0] for name in AGENTS}) == 1


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_exists_and_is_in_the_context(name: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    mounted = re.findall(r"bind,source=([^,\s]+)", FILES[name].read_text())
    copied = [word for w, rest in instructions(name) if w == "COPY" and "$" not in rest and "--from" not in rest
              for word in rest.split()[:-1]]  # fmt: skip
    for path in [*mounted, *copied]:
        assert (ROOT / path).exists()
        assert path.split("/")[0] in kept
    assert {"dist/onedir", "dist/release/onedir"} <= kept


def offline(*arguments: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, IMAGES / "offline", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_launcher_keeps_vllm_off_the_network(tmp_path: Path) -> None:
    launcher, target = tmp_path / "vllm", tmp_path / "opt" / "bin" / "vllm"
    launcher.write_text(
        f"#!{sys.executable}\n# -*- coding: utf-8 -*-\nimport os, sys\nprint(dict(os.environ), sys.argv[1:])\n"
    )
    for _ in range(2):  # the second time a file is its own source
        assert offline(launcher, target).returncode == 0
        done = subprocess.run([target, "a b"], env={"HF_HUB_OFFLINE": "0"}, capture_output=True, text=True, check=True)
        assert done.stdout.endswith("} ['a b']\n")
        assert all(f"'{word}': '{value}'" in done.stdout for word, value in PRIVATE.items())
        launcher = target
    assert target.read_text().startswith(f"#!{sys.executable}\n")


@pytest.mark.parametrize("first", ["#!/bin/sh", "\x7fELF"])
def test_a_launcher_of_another_kind_stops_the_build(tmp_path: Path, first: str) -> None:
    (tmp_path / "vllm").write_text(first + "\n")
    done = offline(tmp_path / "vllm", tmp_path / "to")
    assert done.returncode == 1
    assert "is no Python script" in done.stderr
    assert not (tmp_path / "to").exists()
