"""The `cache` commands as processes, without an agent and beside one that holds the cache, over a real socket."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from xim_agent.cache import claim
from xim_agent.cache.admin import Commands
from xim_agent.cache.control import calls
from xim_agent.cache.service import Cache
from xim_agent.cli import cache_reach
from xim_agent.clock import SystemClock
from xim_agent.config.fields import Config
from xim_agent.control.server import ControlServer
from xim_agent.errors import AgentError
from xim_agent.health import Health
from xim_agent.mesh.messages import ModelRef
from xim_agent.router.publish import publish


class Local:
    """A `BlobSource` on the router's directory."""

    def __init__(self, data: Path) -> None:
        self.models = data / "models"

    async def manifest(self, digest: str) -> bytes:
        return (self.models / "manifests" / f"{digest}.json").read_bytes()

    @asynccontextmanager
    async def blob(self, digest: str, offset: int) -> AsyncIterator[Any]:
        @dataclass
        class Reply:
            data: bytes
            status: int = 200
            start: int = 0

            @property
            def total(self) -> int:
                return len(self.data)

            async def chunks(self) -> Any:
                yield self.data

        yield Reply(next(self.models.glob(f"blobs/**/{digest}")).read_bytes())


@dataclass
class Place:
    root: Path
    models: list[ModelRef] = field(default_factory=list)

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    def open(self) -> Cache:
        clock = SystemClock()
        return Cache(
            directory=self.cache, max_bytes=10**9, downloads=2, source=Local(self.root / "router"), allow_unsafe=False,
            clock=clock, health=Health(clock.now),
        )  # fmt: skip

    async def fill(self, cache: Cache) -> None:
        for model in self.models:
            await cache.ensure(model, lambda progress: None)

    async def run(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        done = await trio.run_process(
            [sys.executable, "-m", "xim_agent", "cache", *words],
            env=self.env(**env), capture_stdout=True, capture_stderr=True, check=False,
        )  # fmt: skip
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    def env(self, **more: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("XEROTIER_")}
        return kept | {"XEROTIER_AGENT_MODEL_CACHE_PATH": str(self.cache)} | more


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path)
    for name in ("one", "two"):
        files = tmp_path / name
        files.mkdir()
        (files / "config.json").write_bytes(b'{"name": "%b"}' % name.encode() * 2000)
        p = publish(files, f"org/{name}", "r1", tmp_path / "router")
        place.models.append(ModelRef(p.id, p.name, p.revision, f"sha256:{p.manifest_sha256}", p.size_bytes))
    return place


@asynccontextmanager
async def agent(place: Place) -> AsyncIterator[Cache]:
    """What of an agent the commands meet: its cache, which holds the lock, and its control socket."""
    async with place.open() as cache, trio.open_nursery() as nursery:
        await place.fill(cache)
        announce = partial(claim.announce, cache.store.lock)
        server = ControlServer(place.root / "control.sock", calls(Commands(cache, agent=True)), announce)
        await nursery.start(server.run)
        yield cache
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def nobody(place: Place) -> AsyncIterator[None]:
    async with place.open() as cache:
        await place.fill(cache)
    yield None


@pytest.mark.parametrize("holder", [agent, nobody])
async def test_every_command_says_the_same_with_and_without_an_agent(place: Place, holder: Any) -> None:
    async with holder(place):
        found = await place.run("ls")
        assert found.returncode == 0, found.stderr
        lines = found.stdout.splitlines()
        assert lines[0].split("  ")[0] == "MODEL"
        assert [line.split()[:3] for line in lines[1:3]] == [["org/one", "r1", "ready"], ["org/two", "r1", "ready"]]
        assert "used " in found.stdout
        assert "left to others" in found.stdout
        as_json = json.loads((await place.run("ls", "--json")).stdout)
        assert as_json["format"] == 1
        assert [m["model"] for m in as_json["models"]] == ["org/one", "org/two"]

        path = await place.run("path", "org/one")
        assert path.stdout == as_json["models"][0]["path"] + "\n"
        assert (Path(path.stdout[:-1]) / "config.json").is_file()

        verified = await place.run("verify")
        assert (verified.returncode, verified.stdout.endswith("all as they should be\n")) == (0, True), verified
        (place.cache / "quarantine" / "x").write_bytes(b"x" * 5000)
        planned = await place.run("prune", "--dry-run")
        assert "quarantine: 8 kB" in planned.stdout
        assert "would free" in planned.stdout
        assert (place.cache / "quarantine" / "x").exists()
        assert "would" not in (await place.run("prune")).stdout
        assert not (place.cache / "quarantine" / "x").exists()
        assert (await place.run("prune")).stdout == "nothing to remove\n"
        only_stored = await place.run("path", "org/one")
        assert (only_stored.returncode, only_stored.stdout) == (1, "")
        assert "hint: " in only_stored.stderr
        removed = await place.run("rm", "org/one@r1")
        assert (removed.returncode, removed.stdout.splitlines()[-1].split()[0]) == (0, "freed")
        gone = await place.run("rm", "org/one")
        assert gone.returncode == 1
        assert "[model_unknown]" in gone.stderr


@pytest.mark.parametrize("holder", [agent, nobody])
async def test_damage_has_an_exit_code_of_its_own(place: Place, holder: Any) -> None:
    async with holder(place):
        (blob, *_) = sorted(p for p in (place.cache / "blobs").glob("*/*"))
        blob.write_bytes(b"nonsense")
        found = await place.run("verify")
        assert found.returncode == 3
        assert found.stdout.splitlines()[0].startswith(f"damaged chunk {blob.name} of org/")
        assert (await place.run("verify")).returncode == 0


async def test_what_the_engine_uses_is_shown_and_refused(place: Place, error_logs: list[Any]) -> None:
    async with agent(place) as cache:
        cache.pin(place.models[0])
        assert "in use" in (await place.run("ls")).stdout
        refused = await place.run("rm", "org/one")
        assert refused.returncode == 4
        assert "in use by the engine" in refused.stderr
        path = Path((await place.run("path", "org/one")).stdout[:-1]) / "config.json"
        path.chmod(0o600)
        path.write_bytes(b"x" * path.stat().st_size)
        assert (await place.run("verify", "org/one")).returncode == 3
        assert path.exists()
        assert [c.code for c in cache.health.conditions()] == ["cache_damaged"]


async def test_where_there_is_no_cache_nothing_is_made(place: Place) -> None:
    found = await place.run("ls")
    assert (found.returncode, found.stdout) == (0, f"there is no model cache in {place.cache} yet\n")
    assert json.loads((await place.run("ls", "--json")).stdout)["models"] == []
    for words in (["rm", "x"], ["path", "x"], ["verify"], ["prune"]):
        missing = await place.run(*words)
        assert missing.returncode == 1
        assert "--model-cache-path" in missing.stderr
    assert not place.cache.exists()


async def test_an_empty_cache_says_so(place: Place) -> None:
    async with place.open():
        pass
    assert (await place.run("ls")).stdout.splitlines()[0] == "no models"


async def test_bad_words(place: Place) -> None:
    async with agent(place):
        for command, odd in (("rm", "../.."), ("path", "\x1b[2J"), ("verify", "a" * 3000), ("rm", "ü@ß")):
            found = await place.run(command, odd)
            assert found.returncode == 1, found
            assert "\x1b" not in found.stderr
    assert (await place.run("rm")).returncode == 2
    assert (await place.run("ls", XEROTIER_AGENT_MODEL_CACHE_PATH="/dev/null/x")).returncode == 77


async def test_a_cache_of_another_format_is_refused(place: Place) -> None:
    async with place.open():
        pass
    (place.cache / "FORMAT").write_text("9")
    found = await place.run("ls")
    assert found.returncode == 77
    assert "format '9'" in found.stderr


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_reach, "PATIENCE", 0.3)
    monkeypatch.setattr(claim, "SILENT_SECONDS", 0.1)


async def refused(place: Place) -> AgentError:
    config = Config(model_cache_path=place.cache)
    with pytest.raises(AgentError) as e:
        await cache_reach.reach(config, "cache/ls", {}, lambda progress: None)
    return e.value


async def test_a_file_is_no_cache_that_is_still_to_come(place: Place) -> None:
    place.cache.write_text("mine")
    error = await refused(place)
    assert (error.code, error.exit_code) == ("cache_directory", 77)
    assert "is no directory" in error.message


@pytest.mark.usefixtures("impatient")
async def test_an_older_agent_without_a_socket_is_named(place: Place) -> None:
    async with place.open():
        error = await refused(place)
    assert (error.code, error.exit_code) == ("cache_held", 14)
    assert f"process {os.getpid()}" in error.message
    assert f"kill {os.getpid()}" in error.hint


@pytest.mark.usefixtures("impatient")
async def test_another_command_is_named_and_not_waited_for_in_silence(place: Place) -> None:
    """It may be a `verify` that takes an hour, or stopped with Ctrl-Z."""
    async with place.open() as cache:
        claim.announce(cache.store.lock, claim.COMMAND)
        with trio.fail_after(20):
            error = await refused(place)
    assert (error.code, error.exit_code) == ("cache_held", 14)
    assert "another `cache` command" in error.message


@pytest.mark.usefixtures("impatient")
async def test_a_socket_that_a_dead_agent_left_is_not_asked_for_ever(place: Place) -> None:
    async with place.open() as cache:
        claim.announce(cache.store.lock, str(place.root / "gone.sock"))
        error = await refused(place)
    assert (error.code, error.exit_code) == ("agent_unreachable", 14)
    assert "gone.sock" in error.message
    assert (await place.run("ls")).returncode == 0, "the lock is free, what its file says is old"


async def test_no_permission_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain user finds out by itself; for root, to whom nothing is denied, the kernel's answer is played."""
    async with place.open():
        pass

    def denied(*_: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(claim.files, "lock", denied)
    error = await refused(place)
    assert (error.code, error.exit_code) == ("cache_denied", 77)
    assert f"uid {os.geteuid()}" in error.message


async def test_ctrl_c_ends_the_work_in_the_agent(place: Place) -> None:
    begun, ended = trio.Event(), trio.Event()

    async def slow(arguments: Any, report: Any) -> Any:
        report([1, 2])
        begun.set()
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with place.open() as cache, trio.open_nursery() as nursery:
        announce = partial(claim.announce, cache.store.lock)
        await nursery.start(ControlServer(place.root / "c.sock", {"cache/verify": slow}, announce).run)
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "xim_agent", "cache", "verify"], env=place.env(), stderr=subprocess.DEVNULL
        )
        with trio.fail_after(20):
            await begun.wait()
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 130
            await ended.wait()
        nursery.cancel_scope.cancel()


async def test_the_start_waits_for_a_command_that_has_the_cache(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, opened, holder = trio.Event(), trio.Event(), claim.holder

    def look(path: Path) -> claim.Holder:
        trio.from_thread.run_sync(asked.set)
        return holder(path)

    async def start() -> None:
        async with place.open():
            opened.set()

    monkeypatch.setattr(claim, "holder", look)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            async with place.open() as cache:
                claim.announce(cache.store.lock, claim.COMMAND)
                nursery.start_soon(start)
                await asked.wait()
                assert not opened.is_set()
            await opened.wait()
