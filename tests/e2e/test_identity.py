"""Agents and a router as processes of the executable: what happens to a running agent's identity."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.place import Place, Running, serving_router
from fakes.stack import until

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def place(agent_exe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with serving_router(str(agent_exe), tmp_path_factory.mktemp("identity")) as place:
        yield place


def value(agent: Running, metric: str) -> float:
    found = re.search(rf"^{metric} ([0-9.]+)$", agent.metrics(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def polls_well(agent: Running) -> None:
    seen = value(agent, "xim_agent_polls_total")
    until("it polls, and well", lambda: value(agent, "xim_agent_polls_total") > seen and up(agent), 60)


def up(agent: Running) -> bool:
    return value(agent, "xim_agent_link_up") == 1


def test_running_agent_follows_a_signing_key_that_replaces_all_others(place: Place) -> None:
    """Its token is worth nothing from one moment to the next; it has a new one within seconds, and never enrolls."""
    state, agent_id = place.enrolled()
    with place.run(state) as agent:
        until("it polls", lambda: up(agent), 30)
        before = value(agent, "xim_agent_token_refreshes_total")
        place.router("rotate-signing-key", "--compromised")
        until("it is followed", lambda: value(agent, "xim_agent_token_refreshes_total") > before, 60)
        polls_well(agent)
        assert "enrollment successful" not in agent.text
    done = place.enroll(state)
    assert (done.returncode, "nothing to do" in done.stderr, agent_id in done.stderr) == (0, True, True)


def test_agent_that_was_off_during_rotations_comes_back(place: Place) -> None:
    state, _ = place.enrolled()
    for _ in range(2):
        place.router("rotate-signing-key")
    with place.run(state) as agent:
        until("it polls", lambda: up(agent), 30)
        assert "enrollment successful" not in agent.text


def test_join_key_left_in_place_is_not_spent_by_later_starts(place: Place) -> None:
    number, key = place.new_key()
    state = place.directory()
    for _ in range(3):
        with place.run(state, JOIN_KEY=key) as agent:
            until("it polls", lambda agent=agent: up(agent), 30)
    place.router("join-key", "revoke", number)
    with place.run(state, JOIN_KEY=key) as agent:  # a stale one is no matter either
        until("it polls", lambda: up(agent), 30)
        assert "join key ignored" in agent.text


def test_removed_while_it_runs_it_ends_and_its_join_key_does_not_bring_it_back(place: Place) -> None:
    key = place.router("join-key", "create", "--project", "p", "--uses", "5").stdout.strip()
    state = place.directory()
    with place.run(state, JOIN_KEY=key) as agent:
        until("it polls", lambda: up(agent), 30)
        agent_id = json.loads((state / "enrollment.json").read_bytes())["enrollment"]["agent_id"]
        place.router("agents", "remove", agent_id)
        assert agent.popen.wait(60) == 12
        kept = next(state.glob("enrollment.json.removed*"))
        assert f"its state is kept as {kept}" in agent.text
        assert "hint: " in agent.text
    again = place.enroll(state, JOIN_KEY=key)
    assert (again.returncode, "[agent_removed]" in again.stderr, "hint: " in again.stderr) == (12, True, True)
    assert json.loads(place.router("join-key", "ls", "--json").stdout)[0]["uses_left"] == 4
    assert place.enroll(state, JOIN_KEY=place.join_key()).returncode == 0


def test_memory_of_an_agent_is_not_for_others_of_its_user(place: Place) -> None:
    """Root may look. That others may not is seen by the owner of what /proc shows; the agent lives with it as well."""
    user = os.geteuid() or 5152
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        home.chmod(0o755)
        mine = Place(shutil.copy(place.exe, home), home / "mine", place.port)
        mine.root.mkdir()
        os.chown(mine.root, user, -1)
        check_memory(mine, place.join_key(), user)


def check_memory(place: Place, key: str, user: int) -> None:
    with place.run(place.directory(), user=user, JOIN_KEY=key) as agent:
        until("it polls", lambda: up(agent), 30)
        children = Path(f"/proc/{agent.popen.pid}/task/{agent.popen.pid}/children").read_text().split()
        assert children
        assert {Path(f"/proc/{pid}/mem").stat().st_uid for pid in children} == {0}
