"""Frames that somebody made by hand: exactly the bytes, or CorruptChunk, in bounded memory."""

import struct
import sys
from pathlib import Path
from typing import get_args

import pytest
import trio
import zstandard
from fakes.chunks import decoded
from hypothesis import given, settings
from hypothesis import strategies as st

from xim_agent.cache import codec
from xim_agent.cache.manifest import CHUNK, Codec

MAGIC = bytes.fromhex("28b52ffd")
SIZE = 1000
GOOD = zstandard.ZstdCompressor(write_checksum=True).compress(bytes(range(250)) * 4)
GIB = 2**30


def block(kind: int, size: int, data: bytes, last: bool = False) -> bytes:
    """RFC 8878, 3.1.1.2. Kinds: 0 raw, 1 one byte `size` times, 2 compressed, 3 reserved."""
    return (last | kind << 1 | size << 3).to_bytes(3, "little") + data


ONES = block(0, SIZE, b"1" * SIZE, last=True)
SUM = zstandard.ZstdCompressor(write_checksum=True).compress(b"1" * SIZE)[-4:]


def frame(
    content: int | None,
    blocks: bytes = ONES,
    *,
    window_log: int = 24,
    flags: int = 4,
    dictionary: bytes = b"",
    checksum: bytes = SUM,
) -> bytes:
    """RFC 8878, 3.1.1.1. `flags` are added to the descriptor: 4 is "has a checksum"."""
    size = b"" if content is None else struct.pack("<Q", content)
    descriptor = flags | (0 if content is None else 0xC0)
    return MAGIC + bytes([descriptor, (window_log - 10) << 3]) + dictionary + size + blocks + checksum


def skippable(size: int) -> bytes:
    return struct.pack("<II", 0x184D2A50, size) + bytes(size)


RLE = block(1, 128 * 1024, b"\0")
LONG = RLE * (2 * GIB // (128 * 1024)) + block(1, 1, b"\0", last=True)  # 64 KiB that expand to 2 GiB
EMPTY = zstandard.ZstdCompressor(write_checksum=True).compress(b"")
BOMBS = {
    "more than it says": frame(SIZE, LONG),
    "as much as it says": frame(2 * GIB + 1, LONG),
    "says nothing": frame(None, LONG),
    "says too little": frame(SIZE - 1),
    "says too much": frame(SIZE + 1),
    "says 2**64 - 1": frame(2**64 - 1),
    "says 2**64 - 2": frame(2**64 - 2),
    "says nothing, and is right": frame(None),
    "a window of 2 GiB": frame(SIZE, window_log=31),
    "a window of 2 GiB, cut off": frame(SIZE, window_log=31)[:-1],
    "a window of 2 GiB, unknown size": frame(None, LONG, window_log=31),
    "the largest window": frame(SIZE, window_log=41)[:-1],
    "a block above 128 KiB": frame(SIZE, block(1, 2**21 - 1, b"\0", last=True)),
    "a block of the reserved kind": frame(SIZE, block(3, SIZE, b"1" * SIZE, last=True)),
    "no last block": frame(SIZE, block(0, SIZE, b"1" * SIZE)),
    "no blocks": frame(SIZE, b""),
    "a million empty blocks": frame(SIZE, block(0, 0, b"") * 1_000_000 + ONES),
    "a reserved flag": frame(SIZE, flags=4 | 8),
    "a wrong checksum": frame(SIZE, checksum=bytes(4)),
    "no checksum": frame(SIZE, flags=0, checksum=b""),
    "no checksum, and four bytes in its place": frame(SIZE, flags=0),
    "a dictionary": frame(SIZE, flags=4 | 1, dictionary=b"\7"),
    "a dictionary of four bytes": frame(SIZE, flags=4 | 3, dictionary=b"\7\7\7\7"),
    "a trailing byte": GOOD + b"\0",
    "a mebibyte behind": GOOD + bytes(2**20),
    "twice": GOOD + GOOD,
    "a hundred thousand frames": frame(SIZE) + EMPTY * 100_000,
    "an empty frame before": EMPTY + GOOD,
    "a skippable frame before": skippable(10) + GOOD,
    "a skippable frame behind": GOOD + skippable(10),
    "skippable": skippable(SIZE),
    "skippable, of 4 GiB": skippable(SIZE)[:4] + b"\xff" * 4,
    "only skippable frames": skippable(0) * 100_000,
    "nothing": b"",
    "without magic": GOOD[4:],
    "gzip": bytes.fromhex("1f8b0800000000000003") + bytes(20),
    **{f"legacy format 0.{n}": bytes([0x20 + n]) + MAGIC[1:] + GOOD[4:] for n in range(2, 8)},
    "legacy format 0.1": bytes.fromhex("1eb52ffd") + GOOD[4:],
}
PACKED = ["zstd", "zstd-split2"]


def test_the_frames_here_are_made_right() -> None:
    assert decoded(frame(SIZE), "zstd", SIZE) == b"1" * SIZE
    assert decoded(GOOD, "zstd", SIZE) == bytes(range(250)) * 4


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("stored", BOMBS.values(), ids=BOMBS)
def test_bombs_are_refused(stored: bytes, name: str) -> None:
    with pytest.raises(codec.CorruptChunk):
        decoded(stored, name, SIZE)


def test_a_cut_frame_is_refused_wherever_it_is_cut() -> None:
    for n in range(len(GOOD)):
        with pytest.raises(codec.CorruptChunk):
            decoded(GOOD[:n], "zstd", SIZE)


@pytest.mark.parametrize("size", [1, 2, 3, 4095, CHUNK - 1, CHUNK])
def test_planes_of_any_length_come_back(size: int) -> None:
    data = (b"abcdefg" * (size // 7 + 1))[:size]
    assert decoded(codec.encode(data, "zstd-split2"), "zstd-split2", size) == data


MEMORY = """
import resource, sys
from test_bombs import BOMBS, GIB, PACKED, SIZE, decoded
from xim_agent.cache import codec
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
limit = int(status["VmSize"].split()[0]) * 1024 + 64 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for name in PACKED:
    for stored in BOMBS.values():
        try:
            decoded(stored, name, SIZE)
        except codec.CorruptChunk:
            continue
        sys.exit("not refused")  # as MemoryError, too, would be none
"""


async def test_no_bomb_takes_memory() -> None:
    """Not even addresses: 64 MiB beside what the process had, a window is 2 GiB."""
    here = Path(__file__)
    paths = f"import sys; sys.path[:0] = {[str(here.parent), str(here.parents[1]), str(here.parents[2])]!r}\n"
    await trio.run_process([sys.executable, "-c", paths + MEMORY])


@st.composite
def mutated(draw: st.DrawFn) -> tuple[bytes, bytes, Codec]:
    """(what was encoded, a frame of it that somebody changed, codec)."""
    data = draw(st.binary(min_size=1, max_size=300)) * draw(st.integers(1, 300))
    name: Codec = draw(st.sampled_from(get_args(Codec)))
    stored = bytearray(codec.encode(data, name))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(stored)) | st.integers(0, min(20, len(stored))))
        cut = draw(st.integers(0, 4))
        stored[at : at + cut] = draw(st.binary(max_size=8))
    return data, bytes(stored), name


def decodes_to_nothing_else(data: bytes, stored: bytes, name: str) -> None:
    try:
        found = decoded(stored, name, len(data))
    except codec.CorruptChunk:
        return
    assert len(found) == len(data)
    if name != "raw":  # which has no checksum of its own; the digest of the stored bytes was compared before
        assert found == data


@given(mutated())
def test_a_changed_frame_is_refused_or_harmless(case: tuple[bytes, bytes, Codec]) -> None:
    decodes_to_nothing_else(*case)


@given(st.binary(max_size=300), st.integers(-1, 2**70), st.sampled_from(PACKED))
def test_nothing_but_a_refusal_comes_of_a_frame_that_is_none(tail: bytes, size: int, name: str) -> None:
    try:
        assert len(decoded(MAGIC + tail, name, size)) == size
    except codec.CorruptChunk:
        pass


@pytest.mark.full
@settings(max_examples=5_000)
@given(mutated())
def test_a_changed_frame_is_refused_or_harmless_at_length(case: tuple[bytes, bytes, Codec]) -> None:
    decodes_to_nothing_else(*case)
