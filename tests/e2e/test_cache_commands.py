"""The `cache` commands of the executable beside an agent of the executable; only the engine is scripted."""

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.scripted import Scripted, serving
from fakes.stack import alive, until

pytestmark = pytest.mark.e2e


class Commanded(Scripted):
    @property
    def cache(self) -> Path:
        return self.root / "cache"

    def command(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.exe, "cache", *words], env=self.env(**env), capture_output=True, text=True, timeout=60, check=False
        )

    def states(self) -> dict[str, str]:
        """States by model."""
        found = self.command("ls", "--json")
        assert found.returncode == 0, found.stderr
        return {row["model"]: row["state"] for row in json.loads(found.stdout)["models"]}


@pytest.fixture
def stack(agent_exe: Path, tmp_path: Path) -> Iterator[Commanded]:
    with serving(Commanded, agent_exe, tmp_path) as stack:
        yield stack


def test_beside_a_serving_agent_and_after_it_was_killed(stack: Commanded, tmp_path: Path) -> None:
    assert stack.agent is not None
    found = stack.command("ls")
    assert found.stdout.splitlines()[1:2] == [line for line in found.stdout.splitlines() if "in use" in line], found
    assert stack.states() == {"toy": "in use"}
    verified = stack.command("verify")
    assert (verified.returncode, verified.stdout.endswith("all as they should be\n")) == (0, True), verified
    assert stack.post("/v1/completions", {"model": "toy", "prompt": "x", "max_tokens": 2}).status_code == 200
    refused = stack.command("rm", "toy")
    assert (refused.returncode, "in use by the engine" in refused.stderr) == (4, True), refused
    assert stack.command("prune", "--all", "--dry-run").returncode == 0
    path = stack.command("path", "toy").stdout.strip()
    assert (Path(path) / "config.json").is_file()
    assert stack.metric("xim_agent_cache_tier_bytes") == stack.metric("xim_agent_cache_bytes") > 0

    second = subprocess.run(
        [stack.exe, "run"], capture_output=True, text=True, timeout=60, check=False,
        env=stack.env(XEROTIER_AGENT_CONFIG_PATH=str(tmp_path / "c2"), XEROTIER_AGENT_METRICS_PORT="0"),
    )  # fmt: skip
    assert second.returncode == 14
    (holder,) = re.findall(r"used by another agent, process (\d+)", second.stderr)
    family = stack.agent.family()
    assert int(holder) in [process.pid for process in family]

    os.kill(int(holder), signal.SIGKILL)
    stack.agent.wait(20)
    until("its processes are gone", lambda: not alive(family), 20)
    assert stack.states() == {"toy": "ready"}
    assert stack.command("prune", "--all").returncode == 0
    assert stack.states() == {"toy": "ready"}, "the agent begins with it"
    stack.agent = None
    stack.start_agent()
    stack.wait_ready(60)
    assert stack.states() == {"toy": "in use"}, "the dead agent's socket is replaced"


def test_what_root_does_the_agents_user_can_go_on_with(stack: Commanded) -> None:
    """For a plain user there is nothing to it: all is his."""
    uid = 5152 if os.geteuid() == 0 else os.geteuid()
    assert stack.stop_agent() == 0
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        cache = Path(place) / "cache"
        shutil.copytree(stack.cache, cache)
        (cache / "index.sqlite").write_bytes(b"damaged")
        shutil.rmtree(cache / "quarantine")
        for found in [cache, *cache.rglob("*")]:
            os.chown(found, uid, uid)
        for words in (["ls"], ["verify"], ["prune"], ["rm", "toy"]):
            done = stack.command(*words, XEROTIER_AGENT_MODEL_CACHE_PATH=str(cache))
            assert done.returncode == 0, done
        assert {found.stat().st_uid for found in [cache, *cache.rglob("*")]} == {uid}


@pytest.mark.full
def test_an_agent_that_is_stopped_is_named_in_bounded_time(stack: Commanded) -> None:
    assert stack.agent is not None
    (holder,) = re.findall(r"^(\d+)", (stack.cache / "lock").read_text())
    os.kill(int(holder), signal.SIGSTOP)
    try:
        found = stack.command("ls")
    finally:
        os.kill(int(holder), signal.SIGCONT)
    assert (found.returncode, "[agent_silent]" in found.stderr, holder in found.stderr) == (14, True, True), found
    assert stack.states() == {"toy": "in use"}
