"""The executable as a container runs it, after an error that trying again cannot cure."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fakes.place import Place, serving_router
from fakes.stack import until

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def place(agent_exe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with serving_router(str(agent_exe), tmp_path_factory.mktemp("park")) as place:
        yield place


@pytest.mark.parametrize("form", ["one file", "one directory"])
def test_an_agent_that_was_removed_stays_and_tells_it_and_stops_at_once(
    place: Place, agent_onedir: Path, form: str, monkeypatch: Any
) -> None:
    if form == "one directory":
        monkeypatch.setattr(place, "exe", str(agent_onedir))
    state, agent = place.enrolled()
    with place.run(state, ON_FINAL_ERROR="park") as running:
        env = place.env(state, {}, {"METRICS_PORT": str(running.port)})

        def ask(*words: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run([place.exe, *words], env=env, capture_output=True, text=True, check=False)

        until("it polls", lambda: "xim_agent_link_up 1.0" in running.metrics(), 30)
        place.router("agents", "remove", agent)
        until("it is parked", lambda: "parked: nothing is tried before a restart" in running.text, 60)
        until("it answers", lambda: running.metrics(), 10)
        checked, status = ask("healthcheck"), ask("status", "--json")
        assert checked.returncode == 1
        assert "not ready: agent_removed: " in checked.stdout
        assert [row["code"] for row in json.loads(status.stdout)["health"]] == ["agent_removed"]
        family = [running.popen.pid, *(p.pid for p in psutil.Process(running.popen.pid).children(recursive=True))]
        assert len(family) == (2 if form == "one file" else 1), "the guard of the engine has ended"
        running.popen.terminate()
        assert running.popen.wait(10) == 0
        assert running.text.count("parked: ") == 1
        until("nothing is left", lambda: not any(map(psutil.pid_exists, family)), 10)
