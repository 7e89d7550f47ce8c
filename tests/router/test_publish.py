import os
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path

import msgspec
import pytest
import trio
from fakes.chunks import decoded

from xim_agent.cache import codec
from xim_agent.cache.manifest import CHUNK, Manifest, check_component, encode, parse
from xim_agent.errors import AgentError
from xim_agent.router.publish import PublishedModel, model_id, publish


@pytest.fixture
def files(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    (root / "sub").mkdir(parents=True)
    rand = random.Random(3)
    (root / "big.safetensors").write_bytes(rand.randbytes(1024) * (CHUNK // 1024) + rand.randbytes(1000))
    (root / "config.json").write_bytes(b'{"x": 1}')
    (root / "sub/empty").touch()
    for name in ("modeling.py", "pytorch_model.bin", ".gitattributes", "x.PKL"):
        (root / name).write_bytes(b"x")
    (root / ".git").mkdir()
    (root / ".git/HEAD").write_bytes(b"x")
    return root


def load(data: Path, p: PublishedModel) -> tuple[bytes, Manifest]:
    raw = (data / "models/manifests" / f"{p.manifest_sha256}.json").read_bytes()
    return raw, msgspec.json.decode(raw, type=Manifest)


def test_files_become_chunks_that_give_them_back(files: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    p = publish(files, "org/Model", "v1", tmp_path / "data", progress=lambda d, t: seen.append((d, t)))
    raw, manifest = load(tmp_path / "data", p)
    assert sha256(raw).hexdigest() == p.manifest_sha256
    assert encode(manifest) == raw
    parse(raw, digest=p.manifest_sha256, model="org/Model", revision="v1", size_bytes=p.size_bytes, allow_unsafe=False)
    assert [f.path for f in manifest.files] == ["big.safetensors", "config.json", "sub/empty"]
    for file in manifest.files:
        data = b""
        for c in file.chunks:
            stored = (tmp_path / "data/models/blobs" / c.blob[:2] / c.blob).read_bytes()
            assert codec.verified(stored, c.blob)
            assert len(stored) == c.stored
            data += decoded(stored, c.codec, c.size)
        assert data == (files / file.path).read_bytes()
    assert [c.codec for c in manifest.files[0].chunks] == ["zstd", "raw"]
    assert seen[-1] == (p.size_bytes, p.size_bytes)
    assert p.stored_bytes < p.size_bytes


def test_what_is_left_out_is_said(files: Path, tmp_path: Path) -> None:
    (files / "linked").symlink_to(tmp_path, target_is_directory=True)
    (files / "broken.json").symlink_to("nowhere")
    os.mkfifo(files / "fifo")
    p = publish(files, "m", None, tmp_path / "data")
    assert p.dropped == (
        ".git/",
        ".gitattributes",
        "broken.json",
        "fifo",
        "linked/",
        "modeling.py",
        "pytorch_model.bin",
        "x.PKL",
    )


def test_links_to_files_are_followed(files: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"weights")
    (files / "link.safetensors").symlink_to(tmp_path / "elsewhere")
    _, manifest = load(tmp_path / "data", publish(files, "m", None, tmp_path / "data"))
    assert next(f.size for f in manifest.files if f.path == "link.safetensors") == 7


def test_the_revision_comes_from_the_content(files: Path, tmp_path: Path) -> None:
    first = publish(files, "m", None, tmp_path / "data")
    assert publish(files, "m", None, tmp_path / "data", workers=4) == first
    (files / "config.json").write_bytes(b'{"x": 2}')
    assert publish(files, "m", None, tmp_path / "data").revision != first.revision


def test_equal_chunks_are_stored_once_and_not_written_again(files: Path, tmp_path: Path) -> None:
    def blobs() -> dict[str, int]:
        return {b.name: b.stat().st_mtime_ns for b in (tmp_path / "data/models/blobs").rglob("*") if b.is_file()}

    (files / "copy.safetensors").write_bytes((files / "big.safetensors").read_bytes())
    p = publish(files, "m", None, tmp_path / "data")
    before = blobs()
    assert len(before) == 3
    assert p.stored_bytes < 200_000
    publish(files, "n", None, tmp_path / "data")
    assert blobs() == before


async def test_publishers_at_the_same_time_do_no_harm(files: Path, tmp_path: Path) -> None:
    results: list[PublishedModel] = []

    async def one() -> None:
        results.append(await trio.to_thread.run_sync(partial(publish, files, "m", None, tmp_path / "data")))

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(one)
    assert len(set(results)) == 1
    assert not list((tmp_path / "data").rglob(".tmp-*"))


def test_a_cut_publish_leaves_no_manifest_and_no_half_chunk(files: Path, tmp_path: Path) -> None:
    class Cut(Exception):
        pass

    def cut(done: int, total: int) -> None:
        raise Cut

    with pytest.raises(Cut):
        publish(files, "m", None, tmp_path / "data", progress=cut)
    assert not list((tmp_path / "data").rglob("*.json"))
    for blob in (tmp_path / "data/models/blobs").rglob("*"):
        assert blob.is_dir() or codec.verified(blob.read_bytes(), blob.name)


def empty(root: Path) -> None:
    for path in root.rglob("*"):
        if path.is_file():
            path.unlink()


REFUSED: list[tuple[Callable[[Path], object], str | None, str]] = [
    (empty, None, "model_path"),
    (lambda root: (root / "a\\b").touch(), None, "path_backslash"),
    (lambda root: (root / "cafe\u0301").touch(), None, "path_not_nfc"),
    (lambda root: (root / "aux.txt").touch(), None, "path_reserved"),
    (lambda root: (root / "CONFIG.JSON").touch(), None, "path_duplicate"),
    (lambda root: (root / "SUB").touch(), None, "path_conflict"),
    (lambda root: None, "../v1", "model_name"),
]


@pytest.mark.parametrize(("spoil", "revision", "code"), REFUSED)
def test_what_agents_would_refuse_is_refused(
    files: Path, tmp_path: Path, spoil: Callable[[Path], object], revision: str | None, code: str
) -> None:
    spoil(files)
    with pytest.raises(AgentError) as e:
        publish(files, "m", revision, tmp_path / "data")
    assert e.value.code == code
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["", "a@b", "a\nb", "\x1b[1m", " a", "a" * 201])
def test_a_name_that_cannot_be_assigned_is_refused(files: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(AgentError) as e:
        publish(files, name, None, tmp_path / "data")
    assert (e.value.code, e.value.exit_code) == ("model_name", 2)


@pytest.mark.parametrize(
    ("limit", "value", "code"), [("MAX_FILES", 2, "too_many_files"), ("MAX_MANIFEST", 700, "manifest_too_large")]
)
def test_a_model_too_large_for_a_manifest_is_refused(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, code: str
) -> None:
    monkeypatch.setattr(f"xim_agent.cache.manifest.{limit}", value)
    with pytest.raises(AgentError) as e:
        publish(files, "m", None, tmp_path / "data")
    assert e.value.code == code
    assert not list((tmp_path / "data").rglob("*.json"))


def test_a_file_that_cannot_be_read_is_named(files: Path, tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="empty") as e:
        publish(
            files, "m", None, tmp_path / "data", progress=lambda d, t: (files / "sub/empty").unlink(missing_ok=True)
        )
    assert e.value.code == "publish_io"


def test_a_store_that_cannot_be_written_is_named(files: Path, tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(AgentError, match="data") as e:
        publish(files, "m", None, tmp_path / "data")
    assert e.value.code == "publish_io"


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="nowhere"):
        publish(tmp_path / "nowhere", "m", None, tmp_path / "data")


def test_every_name_has_its_own_id() -> None:
    names = ["tiny", "org/model", "org-model", "org:model", "ä", "ö", "../x", ".x", "x", "", "a b", "a" * 300]
    ids = [check_component(model_id(name)) for name in names]
    assert len(set(ids)) == len(names)
    assert ids[0] == "tiny"


MEASURE = """
import resource, sys
from pathlib import Path
from xim_agent.router.publish import publish
publish(Path(sys.argv[1]), "m", None, Path(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    def peak(chunks: int) -> int:
        root = tmp_path / f"m{chunks}"
        root.mkdir()
        rand = random.Random(chunks)
        with (root / "w.safetensors").open("wb") as file:
            for _ in range(chunks):
                file.write(rand.randbytes(CHUNK // 16) * 16)
        words = [sys.executable, "-c", MEASURE, str(root), str(tmp_path / f"d{chunks}")]
        return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)

    assert peak(12) - peak(2) < 40_000  # kB; ten chunks more are 160 MB
