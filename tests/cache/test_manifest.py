import json
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xim_agent.cache.manifest import (
    CHUNK,
    Manifest,
    ManifestRefused,
    check_component,
    check_path,
    encode,
    manifest_digest,
    parse,
)

D = sha256(b"x").hexdigest()


def document(**changes: Any) -> dict[str, Any]:
    chunk = {"blob": D, "stored": 1, "size": 1, "codec": "raw"}
    return {
        "format": 1,
        "model": "m",
        "revision": "r",
        "files": [{"path": "config.json", "size": 1, "sha256": D, "chunks": [chunk]}],
    } | changes


def read(doc: Any, **changes: Any) -> Manifest:
    data = doc if isinstance(doc, bytes) else json.dumps(doc).encode()
    expected: dict[str, Any] = {
        "digest": sha256(data).hexdigest(),
        "model": "m",
        "revision": "r",
        "size_bytes": 1,
        "allow_unsafe": False,
    }
    return parse(data, **(expected | changes))


def test_a_good_manifest_round_trips_canonically() -> None:
    manifest = read(document())
    data = encode(manifest)
    assert data.startswith(b'{"files":[{"chunks":[{"blob":"')
    assert b" " not in data
    assert (
        parse(data, digest=sha256(data).hexdigest(), model="m", revision="r", size_bytes=1, allow_unsafe=False)
        == manifest
    )


HOSTILE = {
    "/etc/passwd": "path_absolute",
    "//x": "path_absolute",
    "..": "path_parent",
    "a/../../b": "path_parent",
    "a/..": "path_parent",
    "a\\b": "path_backslash",
    "..\\x": "path_backslash",
    "a\x00b": "path_control",
    "a\nb": "path_control",
    "a\x7f": "path_control",
    "a\u202eb": "path_control",
    "C:/x": "path_drive",
    "c:x": "path_drive",
    "d/e:f": "path_drive",
    "con": "path_reserved",
    "a/NUL.txt": "path_reserved",
    "COM1": "path_reserved",
    "lpt9.json": "path_reserved",
    ".xim-manifest": "path_reserved",
    "a/.XIM-x": "path_reserved",
    "trailing.": "path_reserved",
    "trailing ": "path_reserved",
    "": "path_empty_segment",
    ".": "path_empty_segment",
    "a//b": "path_empty_segment",
    "a/": "path_empty_segment",
    "./a": "path_empty_segment",
    "cafe\u0301": "path_not_nfc",
    "x" * 256: "path_too_long",
    "/".join(["x" * 200] * 6): "path_too_long",
}


@pytest.mark.parametrize(("path", "code"), HOSTILE.items())
def test_hostile_paths_are_refused_each_with_its_own_error(path: str, code: str) -> None:
    doc = document()
    doc["files"][0]["path"] = path
    with pytest.raises(ManifestRefused) as e:
        read(doc)
    assert e.value.code == code


@pytest.mark.parametrize(
    "path", ["a", "café/ü.json", "a b/c", "console.txt", "a..b", "model-00001-of-00002.safetensors"]
)
def test_plain_paths_pass(path: str) -> None:
    check_path(path)


def files(*paths: str) -> list[dict[str, Any]]:
    return [{"path": p, "size": 0, "sha256": D, "chunks": []} for p in paths]


def one(**chunk: Any) -> list[dict[str, Any]]:
    base = {"blob": D, "stored": 1, "size": 1, "codec": "raw"} | chunk
    return [{"path": "a", "size": base["size"], "sha256": D, "chunks": [base]}]


def two(first: int, second: int) -> list[dict[str, Any]]:
    chunks = [{"blob": D, "stored": 1, "size": n, "codec": "zstd"} for n in (first, second)]
    return [{"path": "a", "size": first + second, "sha256": D, "chunks": chunks}]


REFUSED: list[tuple[str, Callable[[], Any], dict[str, Any]]] = [
    ("manifest_digest", document, {"digest": D}),
    ("manifest_malformed", lambda: b"{", {}),
    ("manifest_malformed", lambda: b"[" * 100_000, {}),
    ("manifest_malformed", lambda: document(files={"a": 1}), {}),
    ("manifest_malformed", lambda: document(files=one(size="1")), {}),
    ("manifest_format", lambda: document(format=2), {}),
    ("manifest_model", lambda: document(model="other"), {}),
    ("manifest_model", lambda: document(revision="other"), {}),
    ("sizes", document, {"size_bytes": 2}),
    ("sizes", lambda: document(files=one(stored=2)), {"size_bytes": None}),
    ("sizes", lambda: document(files=one(stored=0, codec="zstd")), {"size_bytes": None}),
    ("sizes", lambda: document(files=one(size=-1, stored=-1)), {"size_bytes": None}),
    ("sizes", lambda: document(files=one(stored=2, codec="zstd")), {"size_bytes": None}),
    ("sizes", lambda: document(files=one(size=CHUNK + 1, stored=5, codec="zstd")), {"size_bytes": None}),
    ("sizes", lambda: document(files=two(CHUNK - 1, 1)), {"size_bytes": None}),
    ("sizes", lambda: document(files=[{**files("a")[0], "size": 7}]), {"size_bytes": None}),
    ("sizes", lambda: document(files=[*one(), {**one(stored=2, size=2)[0], "path": "b"}]), {"size_bytes": None}),
    ("digest", lambda: document(files=one(blob="../../x")), {"size_bytes": None}),
    ("digest", lambda: document(files=one(blob=D.upper())), {"size_bytes": None}),
    ("digest", lambda: document(files=[{**files("a")[0], "sha256": "x"}]), {"size_bytes": None}),
    ("unknown_codec", lambda: document(files=one(codec="lz4")), {"size_bytes": None}),
    ("path_duplicate", lambda: document(files=files("a", "a")), {"size_bytes": None}),
    ("path_duplicate", lambda: document(files=files("Straße", "STRASSE")), {"size_bytes": None}),
    ("path_conflict", lambda: document(files=files("a/b/c", "A/B")), {"size_bytes": None}),
    ("too_many_files", lambda: document(files=files(*map(str, range(100_001)))), {"size_bytes": None}),
    *[
        ("unsafe_file", lambda p=p: document(files=files(p)), {"size_bytes": None})
        for p in ("modeling.py", "pytorch_model.BIN", "x/y.pt", "a.pkl", "lib.so")
    ],
]


@pytest.mark.parametrize(("code", "make", "changes"), REFUSED)
def test_bad_manifests_are_refused_each_with_its_own_error(
    code: str, make: Callable[[], Any], changes: dict[str, Any]
) -> None:
    with pytest.raises(ManifestRefused) as e:
        read(make(), **changes)
    assert e.value.code == code


def test_the_operator_can_allow_unsafe_files() -> None:
    assert read(document(files=files("modeling.py")), size_bytes=0, allow_unsafe=True).files[0].path == "modeling.py"


@pytest.mark.parametrize("value", ["", ".", "..", ".a", "-a", "a/b", "a" * 129, "a\n", "ä", "a~b"])
def test_ids_and_revisions_that_are_no_directory_names_are_refused(value: str) -> None:
    with pytest.raises(ManifestRefused):
        check_component(value)


@pytest.mark.parametrize("value", ["", D, "sha256:", "sha512:" + D, "sha256:" + D.upper(), "sha256:" + D + "\n"])
def test_malformed_manifest_references_are_refused(value: str) -> None:
    with pytest.raises(ManifestRefused):
        manifest_digest(value)


@given(st.text(max_size=40))
def test_an_accepted_path_stays_below_its_directory(path: str) -> None:
    try:
        check_path(path)
    except ManifestRefused:
        return
    parts = path.split("/")
    assert not path.startswith("/")
    assert not {"", ".", ".."} & set(parts)
    assert path.isprintable()


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_read(data: bytes) -> None:
    with pytest.raises(ManifestRefused):
        read(data)
