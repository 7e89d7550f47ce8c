from collections.abc import Callable
from hashlib import sha256
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from xim_agent import files as durable
from xim_agent.cache.manifest import (
    CHUNK,
    MAX_MANIFEST,
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


def canonical(doc: Any) -> bytes:
    return msgspec.json.encode(doc, order="sorted")


def read(doc: Any, **changes: Any) -> Manifest:
    data = doc if isinstance(doc, bytes) else canonical(doc)
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
    "a\u200bb": "path_control",
    "a\u00adb": "path_control",
    "a\x9bb": "path_control",
    "a\u2028b": "path_control",
    "a\u00a0b": "path_control",
    "a\ue000b": "path_control",
    "\ufeffa": "path_control",
    "\u212a": "path_not_nfc",
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
    "x.py.": "path_reserved",
    "x.py ": "path_reserved",
    "a/... /b": "path_reserved",
    "nul .txt": "path_reserved",
    "CONIN$": "path_reserved",
    "com¹": "path_reserved",
    f"{durable.TEMPORARY}x": "path_reserved",
    f"a/{durable.TEMPORARY.upper()}x/b": "path_reserved",
    "config.json/../x.py": "path_parent",
    "a/./b": "path_empty_segment",
    " /a": "path_reserved",
    "": "path_empty_segment",
    ".": "path_empty_segment",
    "a//b": "path_empty_segment",
    "a/": "path_empty_segment",
    "./a": "path_empty_segment",
    "cafe\u0301": "path_not_nfc",
    "x" * 256: "path_too_long",
    "/".join(["x" * 200] * 6): "path_too_long",
    "é" * 128: "path_too_long",
    "/".join("x" * 33): "path_too_deep",
}


@pytest.mark.parametrize(("path", "code"), HOSTILE.items())
def test_hostile_paths_are_refused_each_with_its_own_error(path: str, code: str) -> None:
    doc = document()
    doc["files"][0]["path"] = path
    with pytest.raises(ManifestRefused) as e:
        read(doc)
    assert e.value.code == code


@pytest.mark.parametrize(
    "path",
    [
        *("a", "café/ü.json", "a b/c", "console.txt", "a..b", "model-00001-of-00002.safetensors"),
        *(".gitattributes", "日本/語.json", 'a"b', "x" * 255, "é" * 127, "/".join("x" * 32)),
    ],
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


def same_blob(*chunks: tuple[str, int, int]) -> dict[str, Any]:
    """One file for each (codec, stored, size), all of the same blob."""
    made = [{"blob": D, "stored": stored, "size": size, "codec": codec} for codec, stored, size in chunks]
    return document(files=[{"path": str(i), "size": c["size"], "sha256": D, "chunks": [c]} for i, c in enumerate(made)])


def with_number(text: str) -> bytes:
    return canonical(document()).replace(b'"size":1}', f'"size":{text}}}'.encode())


ANY = {"size_bytes": None}
GOOD = canonical(document())
REFUSED: list[tuple[str, Callable[[], Any], dict[str, Any]]] = [
    ("manifest_digest", document, {"digest": D}),
    ("manifest_malformed", lambda: b"", {}),
    ("manifest_malformed", lambda: b"{", {}),
    ("manifest_malformed", lambda: b"null", {}),
    ("manifest_malformed", lambda: b"[" * 100_000, {}),
    ("manifest_malformed", lambda: b'{"format":1,"x":' + b"[" * 1_000_000, {}),
    ("manifest_malformed", lambda: b'{"x":' * 100_000, {}),
    ("manifest_malformed", lambda: b"\xef\xbb\xbf" + GOOD, {}),
    ("manifest_malformed", lambda: GOOD + b"x", {}),
    ("manifest_malformed", lambda: GOOD + GOOD, {}),
    ("manifest_malformed", lambda: GOOD + b"\0", {}),
    ("manifest_malformed", lambda: GOOD.replace(b"config", b"c\xff"), {}),
    ("manifest_malformed", lambda: GOOD.replace(b"config", b"c\xed\xa0\x80"), {}),
    ("manifest_malformed", lambda: GOOD.replace(b"config", rb"\ud800"), {}),
    ("manifest_malformed", lambda: GOOD.decode().encode("utf-16"), {}),
    ("manifest_malformed", lambda: document(files={"a": 1}), {}),
    ("manifest_malformed", lambda: document(files=None), {}),
    ("manifest_malformed", lambda: document(files=one(size="1")), {}),
    ("manifest_malformed", lambda: document(files=one(size=True)), {}),
    ("manifest_malformed", lambda: document(files=one(size=1.5)), {}),
    ("manifest_malformed", lambda: document(files=one(size=None)), {}),
    ("manifest_malformed", lambda: document(format="1"), {}),
    *[
        ("manifest_malformed", lambda n=n: with_number(n), {})
        for n in ("NaN", "Infinity", "1e400", "1" * 5000, "01", "-")
    ],
    ("manifest_malformed", lambda: with_number("1.0"), {}),
    ("manifest_malformed", lambda: with_number("1e0"), {}),
    ("manifest_not_canonical", lambda: GOOD + b"\n", {}),
    ("manifest_not_canonical", lambda: GOOD.replace(b":", b": ", 1), {}),
    ("manifest_not_canonical", lambda: GOOD.replace(b'"revision":"r"', b'"revision":"x","revision":"r"'), {}),
    ("manifest_not_canonical", lambda: GOOD.replace(b'{"files":', b'{"files":[],"files":'), {}),
    ("manifest_not_canonical", lambda: GOOD.replace(b'"size":1}', b'"size":1,"size":1}'), {}),
    ("manifest_not_canonical", lambda: GOOD.replace(b'"m"', rb'"\u006d"'), {}),
    ("manifest_not_canonical", lambda: document(more=1), {}),
    ("manifest_not_canonical", lambda: b'{"format":1,' + GOOD.replace(b'"format":1,', b"")[1:], {}),
    ("manifest_too_large", lambda: b" " * (MAX_MANIFEST + 1), {}),
    ("manifest_format", lambda: document(format=2), {}),
    ("manifest_format", lambda: document(format=0), {}),
    ("manifest_format", lambda: {"format": 2, "files": "another shape"}, {}),
    ("manifest_model", lambda: document(model="other"), {}),
    ("manifest_model", lambda: document(revision="other"), {}),
    ("manifest_model", lambda: document(model="M"), {}),
    ("sizes", document, {"size_bytes": 2}),
    ("sizes", lambda: document(files=one(stored=2)), ANY),
    ("sizes", lambda: document(files=one(stored=0, codec="zstd")), ANY),
    ("sizes", lambda: document(files=one(size=-1, stored=-1)), ANY),
    ("sizes", lambda: document(files=one(size=0, stored=0)), ANY),
    ("sizes", lambda: document(files=one(size=0, stored=1, codec="zstd")), ANY),
    ("sizes", lambda: document(files=one(stored=-1, codec="zstd")), ANY),
    ("sizes", lambda: document(files=one(size=2**63, stored=2**63)), ANY),
    ("sizes", lambda: document(files=one(size=2**64 - 1, stored=1, codec="zstd")), ANY),
    ("sizes", lambda: document(files=one(stored=2, codec="zstd")), ANY),
    ("sizes", lambda: document(files=one(size=CHUNK + 1, stored=5, codec="zstd")), ANY),
    ("sizes", lambda: document(files=two(CHUNK - 1, 1)), ANY),
    ("sizes", lambda: document(files=two(CHUNK, CHUNK + 1)), ANY),
    ("sizes", lambda: document(files=two(CHUNK, 0)), ANY),
    ("sizes", lambda: document(files=[{**files("a")[0], "size": 7}]), ANY),
    ("sizes", lambda: document(files=[{**files("a")[0], "size": -1}]), ANY),
    ("sizes", lambda: document(files=[{**one()[0], "size": 2}]), ANY),
    ("sizes", lambda: document(files=[{**one()[0], "size": 2**63}]), ANY),
    ("sizes", lambda: same_blob(("raw", 1, 1), ("raw", 2, 2)), ANY),
    ("sizes", lambda: same_blob(("zstd", 5, 7), ("zstd", 5, 8)), ANY),
    ("sizes", lambda: same_blob(("zstd", 5, 7), ("zstd-split2", 5, 8)), ANY),
    ("sizes", lambda: same_blob(("zstd", 5, 7), ("raw", 6, 6)), ANY),
    ("digest", lambda: document(files=one(blob="../../x")), ANY),
    ("digest", lambda: document(files=one(blob=D.upper())), ANY),
    ("digest", lambda: document(files=one(blob=D + "\n")), ANY),
    ("digest", lambda: document(files=one(blob=D[:-1] + "١")), ANY),
    ("digest", lambda: document(files=[{**files("a")[0], "sha256": "x"}]), ANY),
    *[
        ("unknown_codec", lambda c=c: document(files=one(codec=c)), ANY)
        for c in ("lz4", "", "RAW", "zstd ", "x" * 10**6)
    ],
    ("path_duplicate", lambda: document(files=files("a", "a")), ANY),
    ("path_duplicate", lambda: document(files=files("Straße", "STRASSE")), ANY),
    ("path_duplicate", lambda: document(files=files("d/ΣΑΣ", "D/σας")), ANY),
    ("path_duplicate", lambda: document(files=files("ﬁle", "FILE")), ANY),
    ("path_conflict", lambda: document(files=files("a/b/c", "A/B")), ANY),
    ("path_conflict", lambda: document(files=files("a", "a-b", "a.b", "a/b")), ANY),
    ("too_many_files", lambda: document(files=files(*map(str, range(100_001)))), ANY),
    *[
        ("unsafe_file", lambda p=p: document(files=files(p)), ANY)
        for p in ("modeling.py", "pytorch_model.BIN", "x/y.pt", "a.pkl", "lib.so", ".PY", "config.json.py", "x.ſo")
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


def test_names_that_only_look_alike_are_two() -> None:
    names = ("i", "ı", "j", "ϳ", "a.py.json", "x.PYT")
    assert len(read(document(files=files(*names)), size_bytes=0).files) == len(names)


def test_a_blob_may_be_raw_here_and_a_frame_there() -> None:
    read(same_blob(("raw", 5, 5), ("zstd", 5, 7), ("zstd-split2", 5, 7)), size_bytes=19)


def test_messages_do_not_repeat_what_is_endless_or_moves_the_cursor() -> None:
    for doc in (document(model="\x1b[2J" + "m" * 10**6), document(files=files("\x1b[2J" * 10**5))):
        with pytest.raises(ManifestRefused) as e:
            read(doc, size_bytes=None)
        assert len(e.value.message) < 1500
        assert e.value.message.isprintable()


# -- anything at all -------------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1, 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from([D, "raw", "zstd", "zstd-split2", CHUNK, 1]),
)
KEYS = st.sampled_from(["format", "model", "revision", "files", "path", "size", "sha256", "chunks", "blob", "stored"])
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=6)
)
CHUNKS = st.fixed_dictionaries(
    {
        "blob": st.sampled_from([D, "0" * 64]) | st.text(max_size=4),
        "stored": st.integers(-1, 40) | SCALARS,
        "size": st.integers(-1, 40) | st.just(CHUNK) | SCALARS,
        "codec": st.sampled_from(["raw", "zstd", "zstd-split2"]) | SCALARS,
    }
)
NAMES = st.lists(
    st.sampled_from(["a", "B", "b", "ß", "ss", "..", ".", "", "x.py", "con", "e\u0301"]), min_size=1, max_size=4
)
FILES = st.fixed_dictionaries(
    {
        "path": NAMES.map("/".join) | st.text(max_size=6),
        "size": st.integers(-1, 80) | SCALARS,
        "sha256": st.just(D) | SCALARS,
        "chunks": st.lists(CHUNKS | CHUNKS | SCALARS, max_size=3),
    }
)
LIKELY = st.builds(lambda f: document(files=f), st.lists(FILES, max_size=4))


@st.composite
def mutated(draw: Any) -> bytes:
    """A good manifest with up to four places cut out, doubled, replaced or swapped."""
    data = bytearray(canonical(document(files=[*files("a/b", "c"), *one()])))
    for _ in range(draw(st.integers(1, 4))):
        at, size = draw(st.integers(0, len(data))), draw(st.integers(0, 12))
        new = draw(st.one_of(st.just(b""), st.binary(max_size=4), st.just(bytes(data[at : at + size]) * 2)))
        data[at : at + size] = new
    return bytes(data)


def only_refused(data: bytes) -> None:
    """The parser's one promise about what it was never meant to read; what it accepts is sound."""
    try:
        manifest = read(data, size_bytes=None)
    except ManifestRefused:
        return
    assert encode(manifest) == data
    names = [f.path for f in manifest.files]
    assert len({n.casefold() for n in names}) == len(names)
    assert not {part for n in names for part in n.split("/")} & {"", ".", ".."}
    assert all(f.size == sum(c.size for c in f.chunks) for f in manifest.files)
    assert all(0 < c.stored <= CHUNK and 0 < c.size <= CHUNK for _, _, c in manifest.places())


@settings(max_examples=400)
@given(st.binary(max_size=200) | JSON.map(canonical) | LIKELY.map(canonical) | mutated())
@example(GOOD)
def test_nothing_but_a_refusal_comes_of_anything(data: bytes) -> None:
    only_refused(data)


@pytest.mark.full
@settings(max_examples=20_000)
@given(st.binary(max_size=2000) | JSON.map(canonical) | LIKELY.map(canonical) | mutated())
def test_nothing_but_a_refusal_comes_of_anything_at_length(data: bytes) -> None:
    only_refused(data)
