"""How the bytes of one chunk are stored: as they are, as a zstd frame, or as a zstd frame of their byte planes.

Ratio and MB/s per second of CPU, by tests/bench/codec.py: normals with a scale per row, fp8 and int4 rounded over an
absmax scale. `1h12`: level 1 with a match finder that takes only long matches, which leaves the mantissa bits alone.
Cutting into planes and joining them is not included (about 1,500 and 2,300 MB/s).

    data  codec        level  ratio  compress decompress
    bf16  zstd            -1  1.000      3096       5632
    bf16  zstd             1  0.789       887       1163
    bf16  zstd             3  0.785       420       1006
    bf16  zstd-split2     -1  0.854       596       2172
    bf16  zstd-split2      1  0.690       586       1923
    bf16  zstd-split2   1h12  0.684       692       2178
    bf16  zstd-split2      3  0.717       235       1160
    fp16  zstd             1  0.928       868       1201
    fp16  zstd             3  0.924       425        994
    fp16  zstd-split2   1h12  0.859      1418       2390
    fp16  zstd-split2      3  0.859      1152       2410
    fp8   zstd             1  0.821       943       1183
    fp8   zstd             3  0.821       818       1184
    fp8   zstd-split2   1h12  0.821       950       1183
    int4  zstd             1  0.852       943       1236
    int4  zstd             3  0.852       803       1237
    int4  zstd-split2   1h12  0.852       954       1244
"""

from hashlib import sha256

import zstandard

from xim_agent.cache.manifest import CHUNK, Codec

LEVEL = 1  # the table above: more is slower and hardly smaller, of split bf16 even larger; less does not compress
WORTH = 0.97  # zstd must save at least 3 %, else the chunk stays raw and costs nothing to read
SAMPLE, SAMPLES = 128 * 1024, 8  # bytes, and how many places: spread, for a chunk may hold several tensors
BETTER = 0.01  # of the chunk: joining planes costs the reader time, so it must save something


class CorruptChunk(ValueError):
    """The stored bytes do not decode to exactly the size the manifest promised."""


def encode(data: bytes | bytearray | memoryview, codec: Codec, threads: int = 1) -> bytes:
    """A frame with content size and checksum. It does not depend on `threads` (≥ 1), so equal chunks stay equal."""
    if codec == "raw":
        return bytes(data)
    return _pack_planes(data, threads) if codec == "zstd-split2" else _pack(data, threads)


def planes(data: bytes | bytearray | memoryview) -> bytes:
    """The even bytes, then the odd ones. Slices of `bytes` are 2.5 times as fast as those of a memoryview."""
    plain = data if isinstance(data, bytes) else bytes(data)
    return b"".join((plain[0::2], plain[1::2]))


def choose(data: bytes | memoryview, threads: int = 1) -> tuple[Codec, bytes | memoryview]:
    """The codec that makes it small, by a sample, which knows mixed files and needs no dtype; depends on `data` only.

    Chunks no longer than the sample are compressed in both ways. Costs 5 % of a chunk's time.
    """
    count = 1 if len(data) <= SAMPLES * SAMPLE else SAMPLES
    step = (len(data) - SAMPLE) // max(1, count - 1) & ~1  # even, so that the planes are those of the chunk
    sample = data if count == 1 else b"".join(data[step * i : step * i + SAMPLE] for i in range(count))
    flat, split = len(_pack(sample, 1)), len(_pack_planes(sample, 1))
    codec: Codec = "zstd-split2" if flat - split > BETTER * len(sample) else "zstd"
    packed = encode(data, codec, threads)
    return (codec, packed) if len(packed) <= WORTH * len(data) else ("raw", data)


def _pack(plain: bytes | bytearray | memoryview, threads: int) -> bytes:
    return zstandard.ZstdCompressor(
        level=LEVEL, threads=max(1, threads), write_checksum=True, write_content_size=True
    ).compress(plain)


def _pack_planes(data: bytes | bytearray | memoryview, threads: int) -> bytes:
    params = zstandard.ZstdCompressionParameters.from_level(
        LEVEL,
        source_size=len(data),
        hash_log=12,
        min_match=7,
        threads=max(1, threads),
        write_checksum=True,
        write_content_size=True,
    )
    return zstandard.ZstdCompressor(compression_params=params).compress(planes(data))


def verified(stored: bytes | bytearray, digest: str) -> bool:
    """Whether the SHA-256 of the stored bytes is `digest`; nothing is decoded before this has said yes."""
    return sha256(stored).hexdigest() == digest


def decode(stored: bytes | bytearray, codec: str, size: int) -> bytes | bytearray:
    """Exactly `size` bytes, or CorruptChunk. Allocates at most two chunks, whatever the frame says."""
    if codec == "raw":
        if len(stored) != size:
            raise CorruptChunk(f"{len(stored)} bytes instead of {size}")
        return stored
    try:
        frame = zstandard.get_frame_parameters(stored)
        if frame.content_size != size or size > CHUNK:
            raise CorruptChunk(f"the frame holds {frame.content_size} bytes instead of {size}")
        if not frame.has_checksum:
            raise CorruptChunk("the frame has no checksum")
        if frame.window_size > CHUNK:
            raise CorruptChunk(f"the frame wants a window of {frame.window_size} bytes")
        plain = zstandard.ZstdDecompressor(max_window_size=CHUNK).decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as e:
        raise CorruptChunk(str(e)) from e
    if len(plain) != size:
        raise CorruptChunk(f"{len(plain)} bytes instead of {size}")
    if codec != "zstd-split2":
        return plain
    even = memoryview(plain)[: (size + 1) // 2]
    joined = bytearray(size)
    joined[0::2] = even
    joined[1::2] = memoryview(plain)[len(even) :]
    return joined
