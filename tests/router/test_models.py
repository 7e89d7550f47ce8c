"""`router model ls`, `rm` and `gc`, beside publishers."""

import json
import random
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from xim_agent.cache.manifest import Manifest
from xim_agent.cli.router import command
from xim_agent.cli.router_models import publish_model
from xim_agent.errors import AgentError
from xim_agent.router import catalog
from xim_agent.router.models import Garbage, changing, garbage
from xim_agent.router.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "data") as store:
        yield store


def run(store: Store, *args: str) -> Result:
    return CliRunner().invoke(command, ["model", *args, "--data", str(store.directory)])


def refused(result: Result) -> tuple[str, int]:
    assert isinstance(result.exception, AgentError), result.output
    return result.exception.code, result.exception.exit_code


class Quiet:
    """As a `Display`."""

    def show(self, *_: Any, **__: Any) -> None: ...

    def say(self, *_: Any) -> None: ...


def publish(store: Store, name: str, *contents: bytes, display: Any = None) -> catalog.Published:
    """`contents`: of its files."""
    root = store.directory.parent / f"{name}-{len(contents)}-{sha256(b''.join(contents)).hexdigest()[:8]}"
    root.mkdir(exist_ok=True)
    for i, data in enumerate(contents):
        (root / f"{i}.safetensors").write_bytes(data)
    published: catalog.Published = publish_model(store, root, name, None, display or Quiet())
    return published


def blob(seed: int) -> bytes:
    return random.Random(seed).randbytes(5000)


def blobs(store: Store) -> set[str]:
    return {p.name for p in (store.directory / "models/blobs").rglob("*") if p.is_file()}


def named(store: Store, model: catalog.Published) -> set[str]:
    data = (store.directory / "models/manifests" / f"{model.manifest[7:]}.json").read_bytes()
    return set(msgspec.json.decode(data, type=Manifest).blobs())


def enrolled(store: Store, agent: str, state: str = "enrolled") -> None:
    store.db.execute(
        "INSERT OR IGNORE INTO join_keys VALUES(1, x'00', 'p', 'r', '[]', NULL, 9, NULL, 0)",
    )
    store.db.execute(
        "INSERT INTO agents VALUES(?, ?, 1, ?, '', 'p', 'r', '[]', 'node', '{}', '{}', NULL, ?, 0, NULL, 0, 0, NULL)",
        (agent, agent, agent, state),
    )


def test_what_is_published_is_listed_with_who_has_it(store: Store) -> None:
    old, new = publish(store, "m", blob(1), b"0" * 5000), publish(store, "n", blob(2))
    enrolled(store, "a1")
    enrolled(store, "a2")
    catalog.assign(store.db, "m", None, "a1")
    catalog.assign(store.db, "n", None, None)
    store.db.execute("INSERT INTO assignments VALUES('gone', 'm', ?, '{}', 9)", (old.revision,))
    rows = {row["model"]: row for row in json.loads(run(store, "ls", "--json").stdout)}
    assert list(rows) == ["n", "m"]
    assert (rows["m"]["agents"], rows["n"]["agents"]) == (["a1"], ["*"])
    assert (rows["m"]["size"], rows["m"]["manifest"]) == (10_000, old.manifest)
    assert rows["m"]["stored"] < 6000
    text = run(store, "ls").stdout.splitlines()
    assert [line.split()[:2] for line in text[1:]] == [["n", new.revision], ["m", old.revision]]
    assert "10 kB" in text[2]
    assert " a1 " in text[2]
    assert " all " in text[1]


def test_a_removed_model_takes_only_its_own_chunks_along(store: Store) -> None:
    first, second = publish(store, "m", blob(1), blob(2)), publish(store, "n", blob(2), blob(3))
    own = named(store, first) - named(store, second)
    assert len(own) == 1
    result = run(store, "rm", "m")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "1 chunks and 1 other files" in result.stderr
    assert blobs(store) == named(store, second)
    assert [m.name for m in catalog.models(store.db)] == ["n"]


def test_what_is_assigned_stays(store: Store) -> None:
    model = publish(store, "m", blob(1))
    publish(store, "n", blob(2))
    enrolled(store, "a1")
    for agent in (None, "a1"):
        catalog.assign(store.db, "m", None, agent)
        assert refused(run(store, "rm", "m")) == ("model_assigned", 4)
        assert named(store, model) <= blobs(store)
        catalog.assign(store.db, "n", None, agent)
    assert run(store, "rm", "m").exit_code == 0


def test_a_removed_agent_holds_no_model(store: Store) -> None:
    publish(store, "m", blob(1))
    enrolled(store, "a1")
    catalog.assign(store.db, "m", None, "a1")
    store.db.execute("UPDATE agents SET state='removed'")
    assert run(store, "rm", "m").exit_code == 0
    assert blobs(store) == set()


def test_which_revision_must_be_said(store: Store) -> None:
    first = publish(store, "m", blob(1))
    second = publish(store, "m", blob(2))
    assert refused(run(store, "rm", "m")) == ("model_ambiguous", 1)
    assert refused(run(store, "rm", "x")) == ("model_unknown", 1)
    assert refused(run(store, "rm", "m@x")) == ("model_unknown", 1)
    assert run(store, "rm", f"m@{first.revision}").exit_code == 0
    assert blobs(store) == named(store, second)


def test_gc_takes_what_no_model_needs_and_only_that(store: Store) -> None:
    model = publish(store, "m", blob(1))
    root = store.directory / "models"
    folder = next((root / "blobs").iterdir())
    (folder / ".tmp-0123").write_bytes(b"half a chunk")
    (root / "blobs/ff").mkdir(exist_ok=True)
    (root / "blobs/ff" / ("f" * 64)).write_bytes(b"x" * 10_000)
    (root / "manifests" / f"{'e' * 64}.json").write_bytes(b"{}")
    before = {p for p in root.rglob("*") if p.is_file()}
    dry = run(store, "gc", "--dry-run")
    assert "1 chunks and 2 other files" in dry.stderr
    assert "would go" in dry.stderr
    assert {p for p in root.rglob("*") if p.is_file()} == before
    assert run(store, "gc").exit_code == 0
    assert blobs(store) == named(store, model)
    assert [p.stem for p in (root / "manifests").iterdir()] == [model.manifest[7:]]
    assert "0 chunks, 0 B" in run(store, "gc").stderr


def test_a_replaced_revision_is_garbage(store: Store) -> None:
    for seed in (1, 2):
        root = store.directory.parent / f"r{seed}"
        root.mkdir()
        (root / "w.safetensors").write_bytes(blob(seed))
        model = publish_model(store, root, "m", "v1", Quiet())
    assert "1 chunks and 1 other files" in run(store, "gc").stderr
    assert blobs(store) == named(store, model)


def test_a_lost_manifest_stops_gc_and_not_its_own_removal(store: Store) -> None:
    model = publish(store, "m", blob(1))
    other = publish(store, "n", blob(2))
    path = store.directory / "models/manifests" / f"{model.manifest[7:]}.json"
    for spoil in (lambda: path.write_bytes(b"{}"), path.unlink):
        spoil()
        assert refused(run(store, "gc")) == ("manifest_damaged", 3)
        assert len(blobs(store)) == 2
    assert run(store, "rm", "m").exit_code == 0
    assert blobs(store) == named(store, other)


def test_published_again_a_damaged_chunk_is_mended(store: Store) -> None:
    publish(store, "m", blob(1))
    (path,) = [p for p in (store.directory / "models/blobs").rglob("*") if p.is_file()]
    good = path.read_bytes()
    for bad in (good[:-1], good[:-1] + bytes([good[-1] ^ 1])):
        path.write_bytes(bad)
        publish(store, "m", blob(1))
        assert path.read_bytes() == good


def test_gc_waits_for_a_publisher(store: Store) -> None:
    """Its chunks are on the disk and no manifest names them yet."""
    stored, go_on, waiting = threading.Event(), threading.Event(), threading.Event()
    done: dict[str, Any] = {}

    class Slow(Quiet):
        def show(self, *_: Any, **__: Any) -> None:
            stored.set()
            assert go_on.wait(30)

    def publishes() -> None:
        with Store.open(store.directory) as own:
            done["model"] = publish(own, "m", blob(1), blob(2), display=Slow())

    def collects() -> None:
        with Store.open(store.directory) as own, changing(own.directory, waiting.set, alone=True):
            done["found"] = garbage(own.db, own.directory)

    threads = [threading.Thread(target=publishes), threading.Thread(target=collects)]
    threads[0].start()
    assert stored.wait(30)
    assert blobs(store)
    threads[1].start()
    assert waiting.wait(30)
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert done["found"] == Garbage((), 0, 0)
    assert blobs(store) == named(store, done["model"])


def test_publishers_do_not_wait_for_each_other(store: Store) -> None:
    def waits() -> None:
        raise AssertionError("waits")

    with changing(store.directory, waits, alone=False), changing(store.directory, waits, alone=False):
        pass


def test_there_must_be_a_router(tmp_path: Path) -> None:
    for args in (["ls"], ["rm", "m"], ["gc"]):
        result = CliRunner().invoke(command, ["model", *args, "--data", str(tmp_path / "typo")])
        assert refused(result) == ("router_unknown", 2)
