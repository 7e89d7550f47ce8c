import errno
import json
import os
import sys
from functools import partial
from pathlib import Path

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
    modes = [path.stat().st_mode & 0o777 for path in (directory, directory / FILE)]
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
        kept = await store.set_aside("removed")
        assert store.load() is None
        assert kept.exists()
        assert await store.set_aside("removed") == kept


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
                return make_identity(Config(**settings), store, client, Health(clock.now), hardware)  # type: ignore[arg-type]

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
