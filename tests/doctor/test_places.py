"""Directories of all kinds, really there. What is asserted of a plain user holds for root, who becomes one."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fakes.user import NOBODY, unprivileged

from xim_agent.cache import claim
from xim_agent.cache import look as cache_look
from xim_agent.cache.look import look
from xim_agent.cache.plan import Limits
from xim_agent.doctor import places
from xim_agent.errors import AgentError, Exit
from xim_agent.identity.store import StateStore

GB = 10**9
LONGEST = 100


@contextmanager
def full_disk() -> Iterator[None]:
    """No byte can be written to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def state(directory: Path) -> places.Finding:
    return places.state(directory, lambda: StateStore.look(directory))


def test_a_good_state_directory(tmp_path: Path) -> None:
    directory = tmp_path / "s"
    directory.mkdir(mode=0o700)
    before = directory.stat().st_mtime_ns
    found = state(directory)
    assert (found.status, found.text) == ("ok", f"{directory}, of uid {os.geteuid()}, mode 700")
    assert directory.stat().st_mtime_ns == before, "nothing was made there, not for a moment"


def test_a_state_directory_that_can_be_made_is_good(tmp_path: Path) -> None:
    found = state(tmp_path / "a" / "b")
    assert (found.status, found.exit_code) == ("ok", 0)
    assert "does not exist yet" in found.text
    assert not list(tmp_path.iterdir())


def test_a_state_directory_that_cannot_be_made(closed: Path) -> None:
    with unprivileged():
        found = state(closed / "a" / "b")
        assert (found.status, found.exit_code) == ("failure", Exit.STATE)
        assert f"cannot make it in {closed}: Permission denied" in found.text
        assert found.cure == f"`install -d -m 700 -o {os.geteuid()} {closed}/a/b`"


def test_a_state_directory_that_others_can_read(tmp_path: Path) -> None:
    directory = tmp_path / "it's"
    directory.mkdir()
    directory.chmod(0o750)
    found = state(directory)
    assert (found.status, found.exit_code) == ("failure", Exit.STATE)
    assert found.cure == f"""`chmod 700 '{tmp_path}/it'"'"'s'`"""


def test_a_state_directory_of_somebody_else(open_place: Path) -> None:
    directory = Path("/usr")  # root's, everywhere
    if os.geteuid() == 0:
        directory = open_place / "theirs"
        directory.mkdir(mode=0o700)
        os.chown(directory, NOBODY, NOBODY)
    found = state(directory)
    assert (found.status, found.exit_code) == ("failure", Exit.STATE)
    assert found.cure.startswith(f"`chown -R {os.geteuid()} {directory}`")


def test_a_state_that_is_damaged_or_no_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "enrollment.json").write_text("{")
    (tmp_path / "enrollment.json").chmod(0o600)
    assert "it is damaged" in state(tmp_path).text
    (tmp_path / "file").touch(mode=0o600)
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        found = state(path)
        assert (found.status, found.exit_code) == ("failure", Exit.STATE), found


def test_a_state_directory_without_room_or_right_to_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with full_disk():
        found = state(tmp_path)
    assert (found.status, found.exit_code) == ("failure", Exit.STATE)
    assert f"cannot write to {tmp_path}: File too large" in found.text
    assert not list(tmp_path.iterdir())


def sockets(*every: Path, engine: Path | None = None) -> places.Finding:
    return places.sockets(engine, every, lambda place: len(str(place)) < 60, LONGEST)


def test_the_first_place_for_sockets_is_good(open_place: Path) -> None:
    (open_place / "mine").mkdir(mode=0o700)
    for name in ("mine", "not/there/yet"):
        found = sockets(open_place / name)
        assert (found.status, found.text) == ("ok", f"in {open_place / name}, paths of at most 100 bytes")
    assert [path.name for path in open_place.iterdir()] == ["mine"]


@pytest.mark.parametrize("why", ["long", "closed"])
def test_that_another_place_is_taken_for_sockets_is_told(open_place: Path, closed: Path, why: str) -> None:
    first = open_place / ("x" * 60) if why == "long" else closed / "x"
    second = own(open_place / "mine")
    with unprivileged():
        found = sockets(first, second)
    assert found.status == "warning"
    assert found.text.startswith(f"{first}: it ")
    assert found.text.endswith(f"{second} is used instead")


def own(directory: Path) -> Path:
    """Of the plain user that `unprivileged` makes of root."""
    directory.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(directory, NOBODY, NOBODY)
    return directory


def test_no_place_for_sockets(open_place: Path, closed: Path) -> None:
    with unprivileged():
        found = sockets(open_place / ("x" * 60), closed / "x")
    assert (found.status, found.exit_code) == ("failure", Exit.STATE)
    assert "it leaves no room for names in 100 bytes" in found.text
    assert f"it cannot be made in {closed}: Permission denied" in found.text


def test_a_place_for_sockets_of_somebody_else(open_place: Path) -> None:
    theirs = own(open_place / "theirs") if os.geteuid() == 0 else Path("/usr")
    found = sockets(theirs, open_place / "mine")
    assert (found.status, found.exit_code) == ("failure", Exit.STATE), "the agent does not go on to the next either"
    assert "it belongs to uid" in found.text


def test_the_engines_own_socket(open_place: Path, closed: Path) -> None:
    assert sockets(open_place / "mine", engine=open_place / "e.sock").status == "ok"
    found = sockets(open_place / "mine", engine=open_place / ("x" * 100))
    assert (found.status, found.exit_code) == ("failure", Exit.CONFIG)
    assert f"has {len(str(open_place)) + 101} bytes, 100 are possible" in found.text
    with unprivileged():
        found = sockets(open_place / "mine", engine=closed / "e.sock")
    assert (found.status, found.exit_code) == ("failure", Exit.CONFIG)
    assert "Permission denied" in found.text
    assert "No such file or directory" in sockets(open_place / "mine", engine=open_place / "no" / "e.sock").text


def cache(directory: Path, bound: int = GB) -> places.Finding:
    there = places.nearest(directory)
    seen = look(directory, bound, there)
    return places.cache(directory, seen.limits, seen.used, seen.elsewhere)


def test_a_good_cache(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "one").write_bytes(b"x" * 3_000_000)
    (tmp_path / "FORMAT").write_text("1")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.rglob("*"))}
    found = cache(tmp_path, 10**6)
    assert found.status == "ok"
    assert found.text.startswith(f"{tmp_path}: 0.0 GB of 0.0 GB used, ")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.rglob("*"))} == before
    assert look(tmp_path, GB, tmp_path).used >= 3_000_000
    assert cache(tmp_path / "not" / "yet", 10**6).status == "ok"


def test_a_cache_of_another_format_or_with_a_link_in_it(tmp_path: Path) -> None:
    (tmp_path / "FORMAT").write_text("1")
    (tmp_path / "blobs").symlink_to("/usr")
    with pytest.raises(AgentError) as foreign:
        cache(tmp_path)
    assert (foreign.value.code, foreign.value.exit_code) == ("cache_foreign", Exit.STATE)
    (tmp_path / "FORMAT").write_text("7")
    with pytest.raises(AgentError) as other:
        cache(tmp_path)
    assert (other.value.code, other.value.exit_code) == ("cache_format", Exit.STATE)


def test_a_cache_that_cannot_be_written_or_made(closed: Path) -> None:
    with unprivileged():
        found = cache(closed)
        assert (found.status, found.exit_code) == ("failure", Exit.STATE)
        assert found.cure.startswith(f"`chown -R {os.geteuid()} {closed}`")
        assert cache(closed / "c").cure.startswith(f"`install -d -o {os.geteuid()} {closed}/c`")


def test_a_cache_on_a_full_disk(tmp_path: Path) -> None:
    with full_disk():
        assert "cannot write" in cache(tmp_path).text


def test_a_part_of_the_cache_on_another_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/shm in /dev is one everywhere."""
    monkeypatch.setattr(cache_look, "FOLDERS", ("shm", "pts", "not_there"))
    monkeypatch.setattr(claim, "LOCK", "null")  # so that it is a cache
    seen = look(Path("/dev"), GB, Path("/dev"))
    assert "shm" in seen.elsewhere
    assert "not_there" not in seen.elsewhere
    found = places.cache(Path("/tmp"), seen.limits, 0, ("blobs",))
    assert (found.status, found.exit_code) == ("failure", Exit.STATE)
    assert "blobs in /tmp lie on another file system" in found.text


@pytest.mark.parametrize(
    ("bound", "free", "used", "status", "said"),
    [
        (100 * GB, 102 * GB, 0, "ok", "0.0 GB of 100.0 GB used"),
        (100 * GB, 3 * GB, 99 * GB, "ok", "99.0 GB of 100.0 GB used"),
        (100 * GB, 42 * GB, 0, "warning", "it can grow to 40.0 GB only"),
        (100 * GB, 2 * GB, 0, "failure", "there is room for no model"),
        (100 * GB, 0, 0, "failure", "there is room for no model"),
    ],
)
def test_bound_against_disk(tmp_path: Path, bound: int, free: int, used: int, status: str, said: str) -> None:
    """2 % of a disk of 100 GB are left to others."""
    found = places.cache(tmp_path, Limits(bound, free, 100 * GB), used, ())
    assert (found.status, said in found.text) == (status, True), found
    assert found.exit_code == (Exit.STATE if status == "failure" else 0)
    if status == "warning":
        assert found.cure.endswith("XEROTIER_AGENT_MODEL_CACHE_MAX_SIZE_GB=40")
