"""What an operator's commands see and do, beside an agent that serves and without one."""

import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from fakes.models import blob_of

from xim_agent.cache.admin import Commands
from xim_agent.cache.listing import Name, Names
from xim_agent.cache.service import Cache
from xim_agent.errors import AgentError, Exit
from xim_agent.mesh.messages import ModelRef
from xim_agent.router.publish import PublishedModel, publish

Open = Callable[..., Cache]


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    (root / "model.safetensors").write_bytes(bytes(range(256)) * 900)
    (root / "config.json").write_bytes(b'{"a": 1}')
    return root


@pytest.fixture(scope="module")
def all_published(
    model_files: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, PublishedModel]]:
    """`tiny` r1 and r2, which share all chunks but one, and `other`."""
    data, second, other = (tmp_path_factory.mktemp(name) for name in ("router", "second", "other"))
    shutil.copytree(model_files, second, dirs_exist_ok=True)
    (second / "config.json").write_bytes(b'{"a": 2}')
    (other / "config.json").write_bytes(b'{"b": 1}' * 3000)
    made = (publish(model_files, "tiny", "r1", data), publish(second, "tiny", "r2", data))
    return {f"{p.name}@{p.revision}": (data, p) for p in (*made, publish(other, "other", "r1", data))}


@pytest.fixture(scope="module")
def published(all_published: dict[str, tuple[Path, PublishedModel]]) -> tuple[Path, PublishedModel]:
    return all_published["tiny@r1"]


@pytest.fixture
def models(all_published: dict[str, tuple[Path, PublishedModel]]) -> dict[str, ModelRef]:
    return {
        name: ModelRef(p.id, p.name, p.revision, f"sha256:{p.manifest_sha256}", p.size_bytes)
        for name, (_, p) in all_published.items()
    }


@asynccontextmanager
async def being_fetched(cache: Cache, server: Any, model: ModelRef) -> AsyncIterator[None]:
    """While the router holds every chunk of the model back."""
    asked = trio.Event()

    async def gate(digest: str) -> None:
        asked.set()
        await trio.sleep_forever()

    server.gate = gate
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cache.ensure, model, ignore)
        with trio.fail_after(10):
            await asked.wait()
        yield
        nursery.cancel_scope.cancel()
    server.gate = None


def ignore(*_: Any) -> None:
    pass


def by_name(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"{row['model']}@{row['revision']}": row for row in found["models"]}


async def test_ls_tells_what_is_in_use_ready_stored_and_unfinished(
    open_cache: Open, models: dict[str, ModelRef], server: Any, published: Any, disk_usage: Callable[[Path], int]
) -> None:
    async with open_cache() as cache:
        commands = Commands(cache, agent=True)
        assert (await commands.ls())["models"] == ()
        for name in ("tiny@r1", "tiny@r2", "other@r1"):
            await cache.ensure(models[name], ignore)
        cache.pin(models["tiny@r1"])
        cache.store.drop_blob(blob_of(published, "config.json"))  # of r1 alone
        await commands.rm("other")
        async with being_fetched(cache, server, models["other@r1"]):
            found = await commands.ls()
        rows = by_name(found)
        assert {name: row["state"] for name, row in rows.items()} == {
            "tiny@r1": "in use",
            "tiny@r2": "ready",
            "other@r1": "preparing",
        }
        assert rows["tiny@r1"]["saved"] is None, "its chunks are not complete"
        assert 0 < rows["tiny@r2"]["saved"] < 1
        assert rows["tiny@r2"]["size"] == models["tiny@r2"].size_bytes
        assert rows["other@r1"]["percent"] < 100
        assert rows["tiny@r2"]["path"] == str(cache.store.ready[models["tiny@r2"].manifest[7:]])
        assert found["used"] == sum(found["tiers"].values()) == disk_usage(cache.store.root)
        assert found["disk_free"] > 0
        assert by_name(await commands.ls())["other@r1"]["state"] == "partial"
    async with open_cache() as cache:
        assert {row["state"] for row in by_name(await Commands(cache, agent=False).ls()).values()} == {
            "ready",
            "partial",
        }


async def test_rm_takes_what_nobody_else_has(open_cache: Open, models: dict[str, ModelRef], server: Any) -> None:
    async with open_cache() as cache:
        commands = Commands(cache, agent=True)
        await cache.ensure(models["tiny@r1"], ignore)
        path = await cache.ensure(models["tiny@r2"], ignore)
        gone = await commands.rm("tiny@r2")
        assert [(one["what"], one["name"]) for one in gone] == [("ready", "tiny@r2"), ("chunks", "tiny@r2")]
        assert not path.exists()
        assert set(by_name(await commands.ls())) == {"tiny@r1"}
        assert cache.statistics().evictions == {"ready": {"operator": 1}, "chunks": {"operator": 1}}
        report = await commands.verify(None, ignore)
        assert (report["chunks"], report["damaged"]) == (2, []), "the chunk that both had is still there"
        asked = len(server.asked)
        await cache.ensure(models["tiny@r2"], ignore)
        assert len(server.asked) == asked + 1, "only what r2 alone has was removed"


async def test_rm_refuses_what_is_in_use_or_prepared_or_named_unclearly(
    open_cache: Open, models: dict[str, ModelRef], server: Any, published: Any
) -> None:
    async with open_cache() as cache:
        commands = Commands(cache, agent=True)
        await cache.ensure(models["tiny@r1"], ignore)
        cache.pin(models["tiny@r1"])

        async def refused(target: str) -> AgentError:
            with pytest.raises(AgentError) as e:
                await commands.rm(target)
            assert e.value.hint
            return e.value

        error = await refused("tiny")
        assert (error.code, error.exit_code) == ("model_in_use", Exit.BUSY)
        async with being_fetched(cache, server, models["other@r1"]):
            assert (await refused("other@r1")).code == "model_in_use"
            assert await commands.prune(everything=True) == []
        await commands.rm("other@r1")
        await cache.ensure(models["tiny@r2"], ignore)
        error = await refused("tiny")
        assert (error.code, error.exit_code) == ("model_ambiguous", Exit.MISSING)
        assert "tiny@r1, tiny@r2" in error.message
        error = await refused("tony")
        assert error.code == "model_unknown"
        assert "tiny" in error.hint
        for odd in ("../../etc", "", "\x1b[31m", "*", "tiny@", "@r1", "a" * 5000):
            assert (await refused(odd)).code == "model_unknown"
        cache.unpin(models["tiny@r1"])
        await commands.rm("tiny@r1")


async def test_path_is_that_of_the_only_ready_revision(
    open_cache: Open, models: dict[str, ModelRef], published: Any
) -> None:
    async with open_cache() as cache:
        commands = Commands(cache, agent=True)
        path = await cache.ensure(models["tiny@r1"], ignore)
        assert await commands.path("tiny") == str(path)
        await cache.ensure(models["tiny@r2"], ignore)
        with pytest.raises(AgentError, match="2 models"):
            await commands.path("tiny")
        assert await commands.path(models["tiny@r1"].id + "@r1") == str(path)
        await commands.prune()
        with pytest.raises(AgentError) as e:
            await commands.path("tiny@r1")
        assert (e.value.code, e.value.exit_code) == ("model_not_ready", Exit.MISSING)


async def test_prune_keeps_what_costs_a_download_and_what_is_in_use(
    open_cache: Open, models: dict[str, ModelRef], server: Any
) -> None:
    async with open_cache() as cache:
        commands = Commands(cache, agent=True)
        for name in ("other@r1", "tiny@r1"):
            await cache.ensure(models[name], ignore)
        cache.pin(models["tiny@r1"])
        root = cache.store.root
        (root / "quarantine" / "old").write_bytes(b"x" * 5000)
        (root / "blobs" / "ab").mkdir(exist_ok=True)
        (root / "blobs" / "ab" / ("ab" * 32)).write_bytes(b"x" * 5000)
        (root / "blobs" / "ab" / ".tmp-being-written").write_bytes(b"x" * 5000)
        cache.compile_cache_dir("0.9")
        (root / "compile" / "0.8").mkdir()
        (root / "compile" / "0.8" / "x").write_bytes(b"x" * 5000)
        before = await commands.ls()
        planned = await commands.prune(dry_run=True)
        assert by_name(await commands.ls()) == by_name(before)
        assert {(one["what"], one["name"]) for one in planned} == {
            ("quarantine", ""),
            ("orphans", ""),
            ("compile", "0.8"),
            ("ready", "other@r1"),
        }
        assert await commands.prune() == planned
        after = await commands.ls()
        assert before["used"] - after["used"] >= sum(one["bytes"] for one in planned)
        assert (root / "blobs" / "ab" / ".tmp-being-written").exists()
        assert {n: r["state"] for n, r in by_name(after).items()} == {"other@r1": "stored", "tiny@r1": "in use"}
        assert await commands.prune() == []
        asked = len(server.asked)
        await cache.ensure(models["other@r1"], ignore)
        assert len(server.asked) == asked
        await commands.prune(everything=True)
        assert set(by_name(await commands.ls())) == {"tiny@r1"}
        assert {m.stem for m in (root / "manifests").iterdir()} == {models["tiny@r1"].manifest[7:]}


async def test_without_an_agent_prune_keeps_what_it_begins_with(open_cache: Open, models: dict[str, ModelRef]) -> None:
    async with open_cache() as cache:
        for name in ("tiny@r1", "other@r1"):
            await cache.ensure(models[name], ignore)
    async with open_cache() as cache:
        commands = Commands(cache, agent=False)
        await commands.prune(everything=True)
        assert {n: r["state"] for n, r in by_name(await commands.ls()).items()} == {"other@r1": "ready"}
        await commands.rm("other")
        assert (await commands.ls())["models"] == ()


async def test_verify_removes_damaged_chunks_and_they_are_fetched_again(
    open_cache: Open, models: dict[str, ModelRef], server: Any, published: Any
) -> None:
    async with open_cache() as cache:
        commands = Commands(cache, agent=True)
        for name in ("tiny@r1", "tiny@r2"):
            await cache.ensure(models[name], ignore)
        seen: list[tuple[int, int]] = []
        report = await commands.verify(None, lambda done, total: seen.append((done, total)))
        assert (report["chunks"], report["files"], report["damaged"], report["unchecked"]) == (3, 4, [], [])
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert seen[-1][0] <= seen[-1][1]
        damaged = blob_of(published, "model.safetensors")
        flip_a_byte(cache.store.blob(damaged))
        report = await commands.verify("tiny@r2", ignore)
        assert [(d["what"], d["name"], sorted(d["models"])) for d in report["damaged"]] == [
            ("chunk", damaged, ["tiny@r1", "tiny@r2"])
        ]
        assert not cache.store.has_blob(damaged)
        assert await commands.prune() == [], "chunks that are not complete do not bring a model back"
        cache.store.retire_damaged(models["tiny@r1"].manifest[7:])
        asked = len(server.asked)
        await cache.ensure(models["tiny@r1"], ignore)
        assert [digest for digest, _ in server.asked[asked:]] == [damaged]
        assert (await commands.verify(None, ignore))["damaged"] == []


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1])


def link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


@pytest.mark.parametrize("harm", [flip_a_byte, cut, link, Path.unlink])
async def test_a_damaged_ready_copy_goes_to_the_quarantine(
    open_cache: Open, models: dict[str, ModelRef], server: Any, model_files: Path, same_tree: Any, harm: Any
) -> None:
    async with open_cache() as cache:
        commands = Commands(cache, agent=True)
        path = await cache.ensure(models["tiny@r1"], ignore)
        harm(path / "model.safetensors")
        report = await commands.verify("tiny", ignore)
        assert [(d["what"], d["name"]) for d in report["damaged"]] == [("file", "model.safetensors")]
        assert not path.exists()
        assert any((cache.store.root / "quarantine").iterdir())
        asked = len(server.asked)
        same_tree(await cache.ensure(models["tiny@r1"], ignore), model_files)
        assert len(server.asked) == asked, "made again from its chunks"


async def test_a_damaged_copy_in_use_stays_and_is_said_loudly(
    open_cache: Open, models: dict[str, ModelRef], error_logs: list[Any]
) -> None:
    async with open_cache() as cache:
        commands = Commands(cache, agent=True)
        path = await cache.ensure(models["tiny@r1"], ignore)
        cache.pin(models["tiny@r1"])
        good = (path / "config.json").read_bytes()
        flip_a_byte(path / "config.json")
        report = await commands.verify(None, ignore)
        assert "left in place" in report["damaged"][0]["done"]
        assert (path / "config.json").exists()
        assert [c.code for c in cache.health.conditions()] == ["cache_damaged"]
        assert error_logs
        (path / "config.json").write_bytes(good)
        await commands.verify(None, ignore)
        assert not cache.health.conditions()


async def test_verify_is_cut_by_cancellation_and_runs_once_at_a_time(
    open_cache: Open, models: dict[str, ModelRef]
) -> None:
    async with open_cache() as cache:
        commands = Commands(cache, agent=True)
        await cache.ensure(models["tiny@r1"], ignore)
        with trio.CancelScope() as scope:
            await commands.verify(None, lambda done, total: scope.cancel())
        assert scope.cancelled_caught
        codes: list[str] = []

        async def second() -> None:
            with pytest.raises(AgentError) as e:
                await commands.verify(None, ignore)
            codes.append(e.value.code)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(commands.verify, None, ignore)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(second)
        assert codes == ["verify_running"]


async def test_a_removal_waits_for_no_fetch_and_an_operation_for_the_removal(
    open_cache: Open, models: dict[str, ModelRef], server: Any, published: Any
) -> None:
    """A model that an operation is about to take is either gone before it begins, or refused to go."""
    async with open_cache() as cache:
        commands = Commands(cache, agent=True)
        await cache.ensure(models["tiny@r1"], ignore)
        for _ in range(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(commands.rm, "tiny@r1")
                await trio.testing.wait_all_tasks_blocked()
                path = await cache.ensure(models["tiny@r1"], ignore)
            assert (path / "config.json").read_bytes() == b'{"a": 1}'


def test_a_model_is_found_by_name_id_and_digest() -> None:
    names = Names()
    names["a" * 64] = Name("org/model", "r1", "m-1", 1, None)
    names["b" * 64] = Name("org/model", "r1", "m-2", 1, 5.0)
    for target in ("m-1", "m-1@r1", "a" * 12, "a" * 64):
        assert names.one(target) == "a" * 64
    assert names.find("org/model@r1") == ["a" * 64, "b" * 64]
    with pytest.raises(AgentError, match="aaaaaaaaaaaa"):
        names.one("org/model@r1")
    with pytest.raises(AgentError, match="no model"):
        names.one("a" * 11)
    assert names.last_used() == "b" * 64


async def test_a_damaged_manifest_is_told_by_the_next_verification(
    open_cache: Open, models: dict[str, ModelRef], tmp_path: Path
) -> None:
    async with open_cache() as cache:
        await cache.ensure(models["tiny@r1"], ignore)
    (path,) = (tmp_path / "cache/manifests").iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    async with open_cache():
        pass  # whatever opens the cache first finds it
    async with open_cache() as cache:
        commands = Commands(cache, agent=True)
        found = await commands.verify(None, ignore)
        assert [(d["what"], d["name"]) for d in found["damaged"]] == [("manifest", path.stem)]
        assert found["unchecked"] == ["tiny@r1"]
        assert not (await commands.verify(None, ignore))["damaged"]
        await cache.ensure(models["tiny@r1"], ignore)
        assert not (await commands.verify(None, ignore))["unchecked"]


async def test_the_last_use_is_when_it_was_last_in_use(open_cache: Open, models: dict[str, ModelRef]) -> None:
    class Hours:
        def __init__(self, hours: float) -> None:
            self.hours = hours

        def now(self) -> float:
            return 1e9 + 3600 * self.hours

    def used(cache: Cache, name: str) -> float:
        return (cache.store.index.entries()[models[name].manifest[7:]].used - 1e9) / 3600

    clock = Hours(0)
    async with open_cache(clock=clock) as cache:
        for name in ("tiny@r1", "other@r1"):
            await cache.ensure(models[name], ignore)
            cache.pin(models[name])
        clock.hours = 5
        cache.unpin(models["tiny@r1"])
        assert (used(cache, "tiny@r1"), used(cache, "other@r1")) == (5, 0)
        clock.hours = 9  # the other one is in use until the end
    async with open_cache(clock=clock) as cache:
        assert (used(cache, "tiny@r1"), used(cache, "other@r1")) == (5, 9)
