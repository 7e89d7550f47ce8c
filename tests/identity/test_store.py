import errno
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fakes.identity import Agent, Router

from xim_agent.assemble import make_identity
from xim_agent.clock import SystemClock
from xim_agent.config.fields import Config
from xim_agent.errors import AgentError
from xim_agent.hardware.probe import probe
from xim_agent.health import Health
from xim_agent.identity import jose
from xim_agent.identity.rotation import State
from xim_agent.identity.service import IdentityService
from xim_agent.identity.store import FILE, StateStore
from xim_agent.log import redact
from xim_agent.mesh.client import RouterClient

OTHER = """
import sys
from functools import partial
from pathlib import Path
from xim_agent.errors import AgentError
from xim_agent.identity.store import StateStore
try:
    StateStore.open(Path(sys.argv[1]))
except AgentError as error:
    print(error.message, flush=True)
    sys.exit(error.exit_code)
print("open", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "config"


def look(directory: Path) -> tuple[int, int, list[str]]:
    file = directory / FILE
    modes = [path.stat().st_mode & 0o777 if path.exists() else 0 for path in (directory, file)]
    return modes[0], modes[1], sorted(path.name for path in directory.iterdir())


def state() -> State:
    return State(jose.private_text(Ed25519PrivateKey.generate()))


async def test_what_is_saved_is_loaded(directory: Path, router: Router, agent: Agent) -> None:
    await agent.start().enroll_once()
    full = agent.store.load()
    assert full is not None
    with StateStore.open(directory) as store:
        assert store.load() is None
        await store.save(state())
        await store.save(full)
        assert store.load() == full
    assert look(directory) == (0o700, 0o600, [FILE, "enrollment.lock"])
    assert full.key not in repr(full)
    assert full.enrollment is not None
    assert full.enrollment.current not in repr(full)


async def test_set_aside_leaves_no_state(directory: Path) -> None:
    with StateStore.open(directory) as store:
        await store.save(state())
        kept = await store.set_aside("left", None)
        assert store.load() is None
        assert kept.exists()
        assert (await store.set_aside("left", None)).name == "enrollment.json.left.2", "nothing is there to be kept"
        await store.save(first := state())
        second = await store.set_aside("left", fresh := state())
        assert store.load() == fresh
        assert second.read_bytes() == msgspec.json.format(msgspec.json.encode(first))
        assert (await store.set_aside("left", None)).name == "enrollment.json.left.3"
        assert set(look(directory)[2]) == {"enrollment.lock", kept.name, second.name, "enrollment.json.left.3"}


async def test_second_process_exits_14_naming_the_pid(directory: Path) -> None:
    with StateStore.open(directory):
        result = await trio.run_process(
            [sys.executable, "-c", OTHER, str(directory)], capture_stdout=True, check=False, stdin=b""
        )
    assert result.returncode == 14
    assert f"pid {os.getpid()} " in result.stdout.decode()


async def test_a_killed_process_leaves_no_lock(directory: Path) -> None:
    other = partial(trio.run_process, [sys.executable, "-c", OTHER, str(directory)], stdin=-1, stdout=-1, check=False)
    async with trio.open_nursery() as nursery:
        process = await nursery.start(other)
        said = b""
        while not said.endswith(b"\n"):
            said += await process.stdout.receive_some()
        assert said == b"open\n"
        with pytest.raises(AgentError) as caught:
            StateStore.open(directory)
        assert (caught.value.exit_code, f"pid {process.pid} " in caught.value.message) == (14, True)
        process.kill()
    StateStore.open(directory).close()


@pytest.mark.parametrize(("mode", "hint"), [(0o640, "chmod 600"), (0o604, "chmod 600"), (0o660, "chmod 600")])
async def test_state_others_can_reach_is_refused(directory: Path, mode: int, hint: str) -> None:
    with StateStore.open(directory) as store:
        await store.save(state())
        (directory / FILE).chmod(mode)
        with pytest.raises(AgentError) as caught:
            store.load()
    assert (caught.value.code, caught.value.exit_code) == ("state_mode", 77)
    assert hint in caught.value.hint


def test_directory_others_can_reach_is_refused(directory: Path) -> None:
    directory.mkdir(mode=0o755)
    directory.chmod(0o755)
    with pytest.raises(AgentError) as caught:
        StateStore.open(directory)
    assert (caught.value.exit_code, f"`chmod 700 {directory}`") == (77, caught.value.hint)
    assert list(directory.iterdir()) == []


def test_directory_of_another_user_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: directory.stat().st_uid + 1)
    with pytest.raises(AgentError) as caught:
        StateStore.open(directory)
    assert (caught.value.code, caught.value.exit_code) == ("state_owner", 77)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "state_corrupt"),
        (b"{", "state_corrupt"),
        (b"\xff\xfe", "state_corrupt"),
        (b"[]", "state_corrupt"),
        (b'{"version":1}', "state_corrupt"),
        (b'{"version":1,"key":"AA"}', "state_corrupt"),
        (b'{"key":"AA"}', "state_corrupt"),
        (b'{"version":2,"key":"AA"}', "state_version"),
        (b'{"version":0,"key":"AA"}', "state_version"),
    ],
)
async def test_damaged_state_is_named_and_left_alone(directory: Path, content: bytes, code: str) -> None:
    with StateStore.open(directory) as store:
        await store.save(state())
        (directory / FILE).write_bytes(content)
        with pytest.raises(AgentError) as caught:
            store.load()
    assert (caught.value.code, caught.value.exit_code) == (code, 77)
    assert caught.value.hint
    assert (directory / FILE).read_bytes() == content


async def test_state_with_a_foreign_key_set_is_damaged(directory: Path, agent: Agent) -> None:
    await agent.start().enroll_once()
    assert agent.store.data is not None
    content = json.loads(agent.store.data)
    content["enrollment"]["root"] = jose.jwk_of(Ed25519PrivateKey.generate().public_key())
    with StateStore.open(directory) as store:
        await store.save(state())
        (directory / FILE).write_text(json.dumps(content))
        with pytest.raises(AgentError) as caught:
            store.load()
    assert caught.value.code == "state_corrupt"


async def test_failed_write_keeps_the_old_state(directory: Path) -> None:
    first = state()
    with StateStore.open(directory) as store:
        await store.save(first)
        (directory / f"{FILE}.new").mkdir()
        with pytest.raises(AgentError) as caught:
            await store.save(state())
        assert (caught.value.code, caught.value.exit_code) == ("state_write_failed", 77)
        assert store.load() == first


async def test_settings_are_judged_when_wired(directory: Path) -> None:
    """The router's URL at once and made plain; the join key only when it is needed."""
    clock, hardware = SystemClock(), await probe()
    async with RouterClient(insecure=False, clock=clock, on_skew=lambda skew: None) as client:
        with StateStore.open(directory) as store:

            def made(**settings: str) -> IdentityService:
                return make_identity(Config(**settings), store, client, Health(clock.now), lambda: hardware)  # type: ignore[arg-type]

            service = made(router_url=" https://r.example:8443/ ", join_key="xjk_bad")
            assert service._override == ("https://r.example:8443",)
            with pytest.raises(AgentError) as caught:
                await service.enroll_once()
            assert (caught.value.code, caught.value.exit_code) == ("join_key_malformed", 78)
            with pytest.raises(AgentError) as caught:
                made(router_url="r.example")
            assert (caught.value.code, caught.value.exit_code) == ("router_url_malformed", 78)


def test_a_pid_that_cannot_be_written_is_no_matter(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*call: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with StateStore.open(directory), pytest.raises(AgentError, match="pid unknown"):
        StateStore.open(directory)


def test_links_are_not_followed(directory: Path, tmp_path: Path) -> None:
    with StateStore.open(directory) as store:
        (tmp_path / "elsewhere").write_text("{}")
        (directory / FILE).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(AgentError) as caught:
            store.load()
    assert caught.value.exit_code == 77


@pytest.mark.parametrize(
    ("what", "hint"),
    [
        ("directory", "no regular file: `mv {} {}.aside`"),
        ("pipe", "no regular file: `mv {} {}.aside`"),
        ("link", "symbolic link, which is not followed: `cp --remove-destination $(readlink -f {}) {}`"),
    ],
)
def test_state_that_is_no_file_is_named_at_once(directory: Path, tmp_path: Path, what: str, hint: str) -> None:
    """A pipe would make an agent wait for ever, with the lock held."""
    with StateStore.open(directory) as store:
        path = plant(what, store.path, tmp_path)
        with pytest.raises(AgentError) as caught:
            store.load()
    assert (caught.value.code, caught.value.exit_code) == ("state_unreadable", 77)
    assert hint.format(path, path) in caught.value.hint


def plant(what: str, path: Path, elsewhere: Path) -> Path:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    if what == "directory":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path, 0o600)
    else:
        (elsewhere / "elsewhere").write_text("{}")
        path.symlink_to(elsewhere / "elsewhere")
    return path


@pytest.mark.parametrize(("what", "cure"), [("directory", "`mv {} {}.aside`"), ("link", "`rm {}`")])
@pytest.mark.parametrize("name", ["enrollment.json.new", "enrollment.lock"])
async def test_hint_is_about_what_is_in_the_way_and_nothing_else(
    directory: Path, tmp_path: Path, name: str, what: str, cure: str
) -> None:
    """Never to move the whole directory: the credential is in it."""
    path = plant(what, directory / name, tmp_path)
    with pytest.raises(AgentError) as caught, StateStore.open(directory) as store:
        await store.save(state())
    assert caught.value.exit_code == 77
    assert caught.value.hint.endswith(cure.format(path, path))


def test_hint_never_touches_what_is_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*call: object, **more: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "a"))

    monkeypatch.setattr(Path, "mkdir", closed)
    with pytest.raises(AgentError) as caught:
        StateStore.open(tmp_path / "a" / "b")
    assert "chown" not in caught.value.hint
    assert f"install -d -m 700 -o {os.geteuid()} {tmp_path / 'a' / 'b'}" in caught.value.hint


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "chown -R {uid} {dir} && chmod -R u+rwX {dir}"),
        (errno.EDQUOT, "quota of uid {uid}"),
        (errno.EIO, "dmesg"),
    ],
)
async def test_every_error_of_the_disk_has_a_cure(
    directory: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def fails(*call: object) -> None:
        raise OSError(number, os.strerror(number))

    with StateStore.open(directory) as store:
        monkeypatch.setattr(os, "fsync", fails)
        with pytest.raises(AgentError) as caught:
            await store.save(state())
    assert words.format(uid=os.geteuid(), dir=directory) in caught.value.hint
    assert look(directory)[2] == ["enrollment.lock"]


async def test_directory_is_synced_after_the_file_has_its_name(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the rename may be lost with the power: what was used at the router must be on disk before."""
    order: list[str] = []
    sync, rename = os.fsync, Path.replace

    def synced(fd: int) -> None:
        order.append(f"fsync {Path(f'/proc/self/fd/{fd}').readlink().name}")
        sync(fd)

    def renamed(self: Path, target: Path) -> Path:
        order.append("rename")
        return rename(self, target)

    with StateStore.open(directory) as store:
        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(Path, "replace", renamed)
        await store.save(state())
    assert order == [f"fsync {FILE}.new", "rename", f"fsync {directory.name}"]


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e["enrollment"].update(routers=[]),
        lambda e: e["enrollment"].update(routers=["nonsense"]),
        lambda e: e.update(key=jose.private_text(Ed25519PrivateKey.generate())),
        lambda e: e["enrollment"].update(agent_id="another"),
        lambda e: e["enrollment"].update(token="a.b.c"),
    ],
)
async def test_parts_that_do_not_belong_together_are_damage(directory: Path, agent: Agent, change: Any) -> None:
    await agent.start().enroll_once()
    assert agent.store.data is not None
    content = json.loads(agent.store.data)
    change(content)
    with StateStore.open(directory) as store:
        await store.save(state())
        (directory / FILE).write_text(json.dumps(content))
        with pytest.raises(AgentError) as caught:
            store.load()
    assert (caught.value.code, caught.value.exit_code) == ("state_corrupt", 77)


async def test_secret_of_the_state_is_hidden_from_every_line(directory: Path) -> None:
    with StateStore.open(directory) as store:
        await store.save(kept := state())
        assert kept.key not in redact(f"x{kept.key}x")
        forgotten = jose.private_text(Ed25519PrivateKey.generate())
        text = (directory / FILE).read_text().replace(kept.key, forgotten)
        (directory / FILE).write_text(text)
        assert forgotten in redact(forgotten)
        store.load()
        assert forgotten not in redact(forgotten)
