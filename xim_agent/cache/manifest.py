"""The manifest of one model revision (format 1), and every reason to refuse it before anything is fetched."""

import re
import unicodedata
from collections.abc import Iterator
from hashlib import sha256
from itertools import pairwise
from typing import Literal, get_args

import msgspec
from msgspec import Struct

from xim_agent.errors import AgentError, Exit

FORMAT = 1
CHUNK = 16 * 1024 * 1024
MAX_FILES = 100_000
MAX_MANIFEST = 64 * 1024 * 1024
MARKER = ".xim-manifest"  # in a ready directory: the digest of the manifest it was made from

Codec = Literal["raw", "zstd", "zstd-split2"]

DIGEST = re.compile(r"[0-9a-f]{64}")
_COMPONENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DRIVE = re.compile(r"[A-Za-z]:")
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])( *\..*)?", re.IGNORECASE)
_OURS = (".xim-", ".tmp-")  # of the marker, and of files that a crash left half written
_UNSAFE = (
    *(".py", ".pyc", ".pyo", ".pyd", ".pyw", ".pyz", ".so", ".dll", ".dylib"),
    *(".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".dill", ".joblib", ".npy", ".npz"),
)
_MAX_SEGMENT = 255  # NAME_MAX of Linux, bytes
_MAX_PATH = 1024
_MAX_DEPTH = 32  # models have two or three; 500 in each of 60,000 paths took 15 s to check


class Chunk(Struct, frozen=True):
    """`blob` is the SHA-256 of the `stored` bytes, which decode to `size` bytes of the file."""

    blob: str
    stored: int
    size: int
    codec: str


class File(Struct, frozen=True):
    path: str
    size: int
    sha256: str
    chunks: tuple[Chunk, ...]


class Manifest(Struct, frozen=True):
    format: int
    model: str
    revision: str
    files: tuple[File, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(f.size for f in self.files)

    def blobs(self) -> dict[str, int]:
        """Stored bytes by digest, each blob once, in the order of the files."""
        return {c.blob: c.stored for f in self.files for c in f.chunks}

    def places(self) -> Iterator[tuple[int, int, Chunk]]:
        """(index of the file, index of the chunk in it, chunk)."""
        for i, file in enumerate(self.files):
            for j, chunk in enumerate(file.chunks):
                yield i, j, chunk


class _Version(Struct):
    format: int


class ManifestRefused(AgentError):
    """The manifest breaks a rule. `code` names the rule."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(code, message, hint=hint, exit_code=Exit.CONFIG)


def encode(manifest: Manifest) -> bytes:
    """Canonical JSON: sorted keys, no white space, UTF-8."""
    return msgspec.json.encode(manifest, order="sorted")


def manifest_digest(reference: str) -> str:
    """`sha256:<hex>` → hex. Raises ManifestRefused."""
    kind, _, digest = reference.partition(":")
    if kind != "sha256" or not DIGEST.fullmatch(digest):
        raise ManifestRefused("manifest_reference", f"not a manifest reference: {reference[:100]!r}")
    return digest


def check_component(value: str) -> str:
    """A model id or revision, which becomes one directory name. Raises ManifestRefused."""
    if not _COMPONENT.fullmatch(value):
        raise ManifestRefused("model_name", f"not a model id or revision: {value[:140]!r}")
    return value


def is_unsafe(path: str) -> bool:
    """Named like a Python module, a native module or a pickle: loading it may run code."""
    return path.casefold().endswith(_UNSAFE)


def check_path(path: str) -> None:
    """Raises ManifestRefused unless `path` names, on every system, one file below the directory it is joined to."""
    reason = _path_problem(path)
    if reason is not None:
        raise ManifestRefused(f"path_{reason}", f"the manifest has a path that is refused ({reason}): {path[:200]!r}")


def _path_problem(path: str) -> str | None:
    if path.startswith("/"):
        return "absolute"
    if "\\" in path:
        return "backslash"
    if not path.isprintable():
        return "control"
    if unicodedata.normalize("NFC", path) != path:
        return "not_nfc"
    if len(path.encode()) > _MAX_PATH:
        return "too_long"
    if path.count("/") >= _MAX_DEPTH:
        return "too_deep"
    return next((p for p in map(_segment_problem, path.split("/")) if p), None)


def _segment_problem(segment: str) -> str | None:
    if segment == "..":
        return "parent"
    if segment in ("", "."):
        return "empty_segment"
    if _DRIVE.match(segment):
        return "drive"
    if _RESERVED.fullmatch(segment) or segment.lower().startswith(_OURS) or segment[-1] in ". ":
        return "reserved"
    return "too_long" if len(segment.encode()) > _MAX_SEGMENT else None


def parse(
    data: bytes, *, digest: str, model: str, revision: str, size_bytes: int | None, allow_unsafe: bool
) -> Manifest:
    """The manifest in `data`, if it is the one with this SHA-256 (hex), for this model, and breaks no rule.

    `size_bytes` None: not compared. Raises ManifestRefused.
    """
    if sha256(data).hexdigest() != digest:
        raise ManifestRefused("manifest_digest", f"the manifest is not the assigned one ({digest})")
    manifest = check(data)
    if (manifest.model, manifest.revision) != (model, revision):
        raise ManifestRefused(
            "manifest_model",
            f"the manifest is of {manifest.model[:100]!r}@{manifest.revision[:100]!r}, "
            f"assigned is {model[:100]!r}@{revision[:100]!r}",
        )
    unsafe = next((f.path for f in manifest.files if is_unsafe(f.path)), None)
    if unsafe is not None and not allow_unsafe:
        raise ManifestRefused(
            "unsafe_file",
            f"the model holds a file that could run code: {unsafe!r}",
            hint="set XEROTIER_AGENT_ALLOW_UNSAFE_FILES if you trust whoever published it",
        )
    if size_bytes is not None and manifest.size != size_bytes:
        raise ManifestRefused("sizes", f"the files have {manifest.size} bytes, the assignment says {size_bytes}")
    return manifest


def check(data: bytes) -> Manifest:
    """The manifest in `data` if it breaks no rule that holds whatever was assigned. Raises ManifestRefused."""
    if len(data) > MAX_MANIFEST:
        raise ManifestRefused(
            "manifest_too_large", f"the manifest has {len(data)} bytes, at most {MAX_MANIFEST} allowed"
        )
    manifest = _decode(data)
    if len(manifest.files) > MAX_FILES:
        raise ManifestRefused("too_many_files", f"{len(manifest.files)} files, at most {MAX_FILES} allowed")
    if encode(manifest) != data:  # member given twice, another order, white space, more members, 1.0 for 1
        raise ManifestRefused(
            "manifest_not_canonical", "the manifest is not in canonical form", hint="publish the model again"
        )
    _check_paths(manifest)
    stored: dict[str, int] = {}
    plain: dict[str, int] = {}
    for file in manifest.files:
        _check_file(file, stored, plain)
    return manifest


def _decode(data: bytes) -> Manifest:
    try:
        version = msgspec.json.decode(data, type=_Version).format
        if version == FORMAT:
            return msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ManifestRefused("manifest_malformed", f"the manifest cannot be read: {str(e)[:200]}") from e
    raise ManifestRefused("manifest_format", f"manifest format {version} is unknown", hint="it needs a newer agent")


def _check_paths(manifest: Manifest) -> None:
    seen: set[str] = set()
    for file in manifest.files:
        check_path(file.path)
        folded = unicodedata.normalize("NFC", unicodedata.normalize("NFD", file.path).casefold())
        if folded in seen:
            raise ManifestRefused("path_duplicate", f"two files are the same after case folding: {file.path!r}")
        seen.add(folded)
    # Sorted by segments, all that lies below a path comes right behind it.
    for path, after in pairwise(sorted(path.split("/") for path in seen)):
        if after[: len(path)] == path:
            raise ManifestRefused("path_conflict", f"{'/'.join(path)!r} is both a file and a directory")


def _check_file(file: File, stored: dict[str, int], plain: dict[str, int]) -> None:
    """Sizes of the blobs seen so far, which must agree: as they are `stored`, and of what is inside a frame (`plain`).

    The same bytes may be a raw chunk elsewhere: a model may hold a compressed copy of one of its files.
    """
    if file.size < 0 or not DIGEST.fullmatch(file.sha256):
        raise ManifestRefused("sizes" if file.size < 0 else "digest", f"bad size or digest of {file.path!r}")
    last = len(file.chunks) - 1
    for j, chunk in enumerate(file.chunks):
        where = f"chunk {j} of {file.path!r}"
        if chunk.codec not in get_args(Codec):
            raise ManifestRefused(
                "unknown_codec", f"{where} has the codec {chunk.codec[:40]!r}", hint="it needs a newer agent"
            )
        if not DIGEST.fullmatch(chunk.blob):
            raise ManifestRefused("digest", f"{where} has a malformed digest")
        full = chunk.size == CHUNK if j < last else 1 <= chunk.size <= CHUNK
        fits = chunk.stored == chunk.size if chunk.codec == "raw" else 1 <= chunk.stored <= chunk.size
        same = stored.setdefault(chunk.blob, chunk.stored) == chunk.stored
        if chunk.codec != "raw":
            same = same and plain.setdefault(chunk.blob, chunk.size) == chunk.size
        if not (full and fits and same):
            raise ManifestRefused("sizes", f"{where} has sizes that do not add up ({chunk.stored} → {chunk.size})")
    if sum(c.size for c in file.chunks) != file.size:
        raise ManifestRefused("sizes", f"the chunks of {file.path!r} do not add up to its {file.size} bytes")
