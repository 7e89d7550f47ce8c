"""How the bytes of one chunk are stored: as they are, as a zstd frame, or as a zstd frame of their byte planes.

Ratio, and MB of plain data per second of CPU on one core, by tests/bench/codec.py; readers of split2 join the planes
besides, at 2,310 MB/s (SHA-256: 1,770). `1h6`: level 1 with nearly no match finder, so that all but long repetitions is
left to Huffman coding, which is all that weights have to give.

    data  codec        level  ratio  compress  decompress
    bf16  zstd             1  0.789       920        1168
    bf16  zstd-split2      1  0.690       424        2001
    bf16  zstd-split2    1h6  0.680       737        3166
    bf16  zstd-split2      3  0.716       200        1213
    fp16  zstd             1  0.928       906        1248
    fp16  zstd-split2    1h6  0.859       793        2461
    fp16  zstd-split2      3  0.859       743        2658
    fp8   zstd             1  0.821       971        1202
    fp8   zstd             3  0.821       839        1177
    int4  zstd             1  0.852       960        1226
    int4  zstd             3  0.852       866        1250
    any   zstd            -1  1.000      4600       10000
"""

from collections.abc import Iterator
from hashlib import sha256

import zstandard

from xim_agent.cache.manifest import CHUNK, Codec

LEVEL = 1  # the table above: more is slower and hardly smaller, of split bf16 even larger; less does not compress
WORTH = 0.97  # zstd must save at least 3 %, else the chunk stays raw and costs nothing to read
SAMPLE, SAMPLES = 128 * 1024, 8  # bytes, and how many places: spread, for a chunk may hold several tensors
BETTER = 0.01  # of the chunk: joining planes costs the reader time, so it must save something
PIECE = 1024 * 1024  # even, so that pieces begin with a byte of the even plane; stays in a core's own cache

Data = bytes | bytearray | memoryview


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
        hash_log=6,
        min_match=7,
        threads=max(1, threads),
        write_checksum=True,
        write_content_size=True,
    )
    return zstandard.ZstdCompressor(compression_params=params).compress(planes(data))


def verified(stored: Data, digest: str) -> bool:
    """Whether the SHA-256 of the stored bytes is `digest`; nothing is decoded before this has said yes."""
    return sha256(stored).hexdigest() == digest


def decode(stored: Data, codec: str, size: int) -> bytearray:
    """As `pieces`, in one."""
    data = bytearray()
    for piece in pieces(stored, codec, size):
        data += piece
    return data


def pieces(stored: Data, codec: str, size: int) -> Iterator[Data]:
    """Exactly `size` bytes in order, or CorruptChunk before the first of them; each piece is good until the next.

    Allocates at most one chunk and a piece, whatever the frame says. Planes are joined piece by piece: memory that is
    touched for the first time costs more than decoding, and joining holds the interpreter's lock.
    """
    if codec == "raw":
        if len(stored) != size:
            raise CorruptChunk(f"{len(stored)} bytes instead of {size}")
        return iter((stored,))
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
    return _joined(plain) if codec == "zstd-split2" else iter((plain,))


def _joined(planes: bytes) -> Iterator[Data]:
    view, half = memoryview(planes), (len(planes) + 1) // 2
    even, odd = view[:half], view[half:]
    piece = bytearray(min(PIECE, len(planes)))  # of a bytearray: slices of a memoryview are filled 10 times as slowly
    for at in range(0, half, PIECE // 2):
        first, second = even[at : at + PIECE // 2], odd[at : at + PIECE // 2]
        if len(first) + len(second) != len(piece):
            piece = bytearray(len(first) + len(second))
        piece[0::2], piece[1::2] = first, second
        yield piece
