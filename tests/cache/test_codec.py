import random
import struct
from hashlib import sha256
from typing import get_args

import pytest
import zstandard
from fakes.chunks import decoded
from hypothesis import given
from hypothesis import strategies as st

from xim_agent.cache import codec
from xim_agent.cache.manifest import CHUNK, Codec


@given(st.binary(max_size=5000), st.sampled_from(get_args(Codec)))
def test_every_codec_gives_the_bytes_back(data: bytes, name: Codec) -> None:
    assert decoded(codec.encode(data, name), name, len(data)) == data


@given(st.binary(min_size=1, max_size=5000))
def test_a_view_packs_like_its_bytes_and_the_choice_is_never_larger(data: bytes) -> None:
    name, stored = codec.choose(memoryview(bytearray(data)))
    assert (name, bytes(stored)) == codec.choose(data)
    assert len(stored) <= len(data)
    assert decoded(bytes(stored), name, len(data)) == data


def test_raw_is_chosen_where_zstd_saves_little() -> None:
    noise = random.Random(1).randbytes(100_000)
    assert codec.choose(noise)[0] == "raw"
    assert codec.choose(noise[:98_500] + bytes(1_500))[0] == "raw"
    assert codec.choose(noise[:90_000] + bytes(10_000))[0] == "zstd"


def weights(size: int, seed: int = 5) -> bytes:
    """bf16 normals."""
    rand, out = random.Random(seed), bytearray(size // 2 * 2)
    packed = struct.pack(f"<{size // 2}f", *(rand.gauss(0, 0.02) for _ in range(size // 2)))
    out[0::2], out[1::2] = packed[2::4], packed[3::4]
    return bytes(out)


WEIGHTS = weights(1 << 20) * 2  # longer than the sample
NOISE = random.Random(1).randbytes(1 << 20)
TEXT = b"".join(b"%d: the quick brown fox\n" % i for i in range(80_000))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (WEIGHTS, "zstd-split2"),
        (WEIGHTS[:-1], "zstd-split2"),
        (WEIGHTS[1:], "zstd-split2"),
        (WEIGHTS[:300_001], "zstd-split2"),
        (TEXT[:100] + WEIGHTS, "zstd-split2"),
        (TEXT, "zstd"),
        (NOISE[:200_000] * 10, "zstd"),  # no single sample shows the repetition
        (NOISE + random.Random(2).randbytes(1 << 20), "raw"),
    ],
    ids=["bf16", "odd length", "odd start", "short", "header", "text", "far repetition", "noise"],
)
def test_the_codec_fits_the_data(data: bytes, expected: str) -> None:
    name, stored = codec.choose(data)
    assert name == expected
    assert decoded(bytes(stored), name, len(data)) == data


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_mixed_chunk_is_never_much_larger_than_by_another_codec(share: float) -> None:
    for other in (TEXT, NOISE):
        at = int(share * (1 << 21))
        data = WEIGHTS[:at] + (other * 3)[: (1 << 21) - at]
        best = min(len(data), *(len(codec.encode(data, name)) for name in get_args(Codec)))
        assert len(codec.choose(data)[1]) <= 1.03 * best


def test_bf16_takes_less_than_70_percent() -> None:
    assert len(codec.choose(WEIGHTS[: 1 << 20])[1]) < 0.70 * (1 << 20)


def test_the_number_of_threads_does_not_change_the_frame() -> None:
    data = random.Random(2).randbytes(1000) * 4000
    assert len({codec.encode(data, "zstd", n) for n in (1, 2, 4)}) == 1
    assert len({codec.choose(WEIGHTS, n) for n in (1, 2, 4)}) == 1


GOOD = zstandard.ZstdCompressor(write_checksum=True).compress(b"a" * 1000)
FLIPPED = GOOD[:-1] + bytes([GOOD[-1] ^ 1])
BAD = {
    "not zstd": b"hello",
    "empty": b"",
    "truncated": GOOD[:-1],
    "trailing bytes": GOOD + b"x",
    "two frames": GOOD + GOOD,
    "wrong checksum": FLIPPED,
    "no checksum": zstandard.ZstdCompressor().compress(b"a" * 1000),
    "no content size": zstandard.ZstdCompressor(write_checksum=True, write_content_size=False).compress(b"a" * 1000),
    "bomb": zstandard.ZstdCompressor(write_checksum=True).compress(bytes(64 * 1024 * 1024)),
    "larger by one": zstandard.ZstdCompressor(write_checksum=True).compress(b"a" * 1001),
    "a window of 2 GiB": bytes.fromhex("28b52ffd84a8e803000000"),
}


@pytest.mark.parametrize("name", ["zstd", "zstd-split2"])
@pytest.mark.parametrize("stored", BAD.values(), ids=BAD.keys())
def test_bad_frames_are_refused(stored: bytes, name: str) -> None:
    with pytest.raises(codec.CorruptChunk):
        decoded(stored, name, 1000)


def test_a_raw_chunk_of_another_size_is_refused() -> None:
    with pytest.raises(codec.CorruptChunk):
        decoded(b"abc", "raw", 4)


def test_more_than_a_chunk_is_never_decoded() -> None:
    stored = zstandard.ZstdCompressor(write_checksum=True).compress(bytes(CHUNK + 1))
    with pytest.raises(codec.CorruptChunk):
        decoded(stored, "zstd", CHUNK + 1)


def test_verified_compares_the_digest_of_the_stored_bytes() -> None:
    assert codec.verified(b"abc", sha256(b"abc").hexdigest())
    assert not codec.verified(b"abd", sha256(b"abc").hexdigest())
