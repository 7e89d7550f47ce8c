"""kill -9 before, after and in the middle of every operation of enroll and of refresh, at the agent and at the router.

After each the next start authenticates without anybody doing anything, and the join key, which has one use, is spent
once. The operations are not listed here: a run that is not killed is recorded, and then killed at each of them.
"""

import errno
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fakes.crash import KILLED, Frozen, Point, Zygote, frozen, points, zygote
from fakes.stack import free_port

from xim_agent.router.store import Store


@dataclass
class Scene:
    """A zygote, and a router that serves `data`."""

    zygote: Zygote | Frozen
    root: Path
    port: int
    count: int = 0

    @property
    def data(self) -> Path:
        return self.root / "router"

    def join_key(self) -> tuple[int, str]:
        now = time.time()
        with Store.open(self.data) as store:
            return store.create_join_key(project="p", region="eu", uses=1, expires_at=now + 3600, now=now)

    def state(self) -> Path:
        """A new state directory."""
        self.count += 1
        return self.root / f"agent{self.count}"

    def enrolled(self) -> tuple[int, Path]:
        """Number of the join key, and the state of a new agent."""
        number, key = self.join_key()
        state = self.state()
        assert self.zygote.agent(state, key) == 0, self.zygote.said()
        return number, state

    def spent(self, number: int) -> tuple[int, int]:
        """Uses left of a join key, and agents that it enrolled."""
        with Store.open(self.data) as store:
            left = store.db.execute("SELECT uses_left FROM join_keys WHERE id=?", (number,)).fetchone()[0]
            return left, store.db.execute("SELECT count(*) FROM agents WHERE join_key=?", (number,)).fetchone()[0]

    def comes_back(self, state: Path, join_key: str | None, number: int) -> None:
        """The next two starts: with what the operator has configured anyway, then with the state alone."""
        for configured in (join_key, None):
            assert self.zygote.agent(state, configured) == 0, self.zygote.said()
        assert self.spent(number) == (0, 1)
        assert {path.name for path in state.iterdir()} == {"enrollment.json", "enrollment.lock"}


@pytest.fixture(scope="module", params=["forked", pytest.param("frozen", marks=pytest.mark.full)])
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    root = tmp_path_factory.mktemp("crash")
    how = zygote(root) if request.param == "forked" else frozen(request.getfixturevalue("agent_exe"), root)
    with how as made:
        scene = Scene(made, root, free_port())
        made.end_router(made.start_router(scene.data, scene.port))  # from now on join keys say where it is
        yield scene


@pytest.fixture
def serving(scene: Scene) -> Iterator[Scene]:
    pid = scene.zygote.start_router(scene.data, scene.port)
    yield scene
    scene.zygote.end_router(pid)


def survive(scene: Scene, found: list[Point], case: Callable[[Point], bool], least: float = 0.8) -> None:
    """Runs every case and shows all that failed. A case tells whether its point was reached: replies come in pieces
    that differ, so a few may not be. Of the executable every fifth point: all of them were 20 minutes.
    """
    failed, reached = {}, 0
    if isinstance(scene.zygote, Frozen):
        found, least = found[::5], least / 2  # of so few, more may be those that are not reached
    for point in found:
        try:
            reached += case(point)
        except AssertionError as error:
            failed[str(point)] = str(error)[:300]
    assert not failed, json.dumps(failed, indent=1)
    assert reached >= least * len(found), f"{reached} of {len(found)} points were reached"


def recorded(log: Path, *operations: str) -> list[Point]:
    """The points of a run, which has the operations that it must have: the matrix cannot be empty and pass."""
    found = points(log)
    assert {point.operation.split(" ")[0] for point in found} >= set(operations)
    return found


def test_agent_is_killed_at_every_operation_of_enroll(serving: Scene, tmp_path: Path) -> None:
    _, key = serving.join_key()
    log = tmp_path / "operations"
    assert serving.zygote.agent(serving.state(), key, log=str(log)) == 0, serving.zygote.said()

    def case(point: Point) -> bool:
        number, key = serving.join_key()
        state = serving.state()
        code = serving.zygote.agent(state, key, at=point.at, how=point.how)
        serving.comes_back(state, key, number)
        return code == KILLED

    survive(serving, recorded(log, "open", "write", "fsync", "rename", "connect", "send", "receive"), case)


def test_agent_is_killed_at_every_operation_of_refresh(serving: Scene, tmp_path: Path) -> None:
    _, state = serving.enrolled()
    log = tmp_path / "operations"
    assert serving.zygote.agent(state, None, log=str(log)) == 0, serving.zygote.said()

    def case(point: Point) -> bool:
        number, state = serving.enrolled()
        # At the first refresh, and again with a previous token beside the newest.
        codes = [serving.zygote.agent(state, None, at=point.at, how=point.how) for _ in range(2)]
        serving.comes_back(state, None, number)
        return KILLED in codes

    survive(serving, recorded(log, "open", "write", "fsync", "rename", "connect", "send", "receive"), case)


def router_dies(scene: Scene, log: Path, enrolled: bool) -> None:
    """At every operation of the call that an agent makes, enrolled before or not."""

    def agent() -> tuple[int, Path, str | None]:
        if enrolled:
            pid = scene.zygote.start_router(scene.data, scene.port)
            number, state = scene.enrolled()
            scene.zygote.end_router(pid)
            return number, state, None
        number, key = scene.join_key()
        return number, scene.state(), key

    for kept in (None, str(log)):  # the first call of all makes things that later ones find
        _, state, key = agent()
        pid = scene.zygote.start_router(scene.data, scene.port, log=kept or "")
        assert scene.zygote.agent(state, key) == 0, scene.zygote.said()
        scene.zygote.end_router(pid)

    def case(point: Point) -> bool:
        number, state, key = agent()
        pid = scene.zygote.start_router(scene.data, scene.port, at=point.at, how=point.how)
        scene.zygote.agent(state, key)
        died = scene.zygote.end_router(pid)
        again = scene.zygote.start_router(scene.data, scene.port)
        try:
            scene.comes_back(state, key, number)
        finally:
            scene.zygote.end_router(again)
        return died

    # How many pages SQLite writes depends on how full they are.
    survive(scene, recorded(log, "write", "fsync", "send", "receive"), case, least=0.5)


def test_router_is_killed_at_every_operation_of_enroll(scene: Scene, tmp_path: Path) -> None:
    router_dies(scene, tmp_path / "operations", enrolled=False)


def test_router_is_killed_at_every_operation_of_refresh(scene: Scene, tmp_path: Path) -> None:
    router_dies(scene, tmp_path / "operations", enrolled=True)


@pytest.mark.parametrize("error", [errno.ENOSPC, pytest.param(errno.EROFS, marks=pytest.mark.full)])
@pytest.mark.parametrize("enrolled", [False, True])
def test_disk_fails_at_every_operation(serving: Scene, tmp_path: Path, error: int, enrolled: bool) -> None:
    """Exit 77 with a name and the old state whole; nothing is lost once the disk works again."""

    def agent() -> tuple[int, Path, str | None]:
        if enrolled:
            return *serving.enrolled(), None
        number, key = serving.join_key()
        return number, serving.state(), key

    _, state, key = agent()
    log = tmp_path / "operations"
    assert serving.zygote.agent(state, key, log=str(log), only="files") == 0, serving.zygote.said()
    found = {point.at: point for point in recorded(log, "open", "write", "fsync", "chmod", "rename")}

    def case(point: Point) -> bool:
        number, state, key = agent()
        before = content(state)
        code = serving.zygote.agent(state, key, at=point.at, how=str(error), only="files")
        if code:
            assert code == 77
            last = serving.zygote.said()[-800:]
            assert "state_write_failed" in last or "state_unreadable" in last
            assert not (state / "enrollment.json.new").exists(), "half a file would fill the disk further"
            after = content(state)
            assert after.get("enrollment") or after == before or not before
        serving.comes_back(state, key, number)
        return code == 77

    survive(serving, list(found.values()), case, least=0.6)  # the pid in the lock file may stay unwritten


def content(state: Path) -> dict[str, Any]:
    """Empty before the first write. Raises ValueError for a file that is not whole."""
    path = state / "enrollment.json"
    return dict(json.loads(path.read_bytes())) if path.exists() else {}


@pytest.mark.full
def test_any_sequence_of_deaths(scene: Scene) -> None:
    """Agent and router are killed again and again, at random, before the agent ever gets through."""
    choose = random.Random(3)
    for _ in range(40):
        number, key = scene.join_key()
        state = scene.state()
        for _ in range(6):
            who = choose.choice(["agent", "router"])
            fail = {"at": choose.randint(1, 40), "how": choose.choice(["before", "after", "torn"])}
            pid = scene.zygote.start_router(scene.data, scene.port, **(fail if who == "router" else {}))
            scene.zygote.agent(state, key, **(fail if who == "agent" else {}))
            scene.zygote.end_router(pid)
        pid = scene.zygote.start_router(scene.data, scene.port)
        scene.comes_back(state, key, number)
        scene.zygote.end_router(pid)
