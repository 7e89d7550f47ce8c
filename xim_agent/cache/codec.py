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
from contextlib import contextmanager
from hashlib import sha256

import zstandard

from xim_agent.cache.manifest import CHUNK, Codec

LEVEL = 1  # the table above: more is slower and hardly smaller, of split bf16 even larger; less does not compress
WORTH = 0.97  # zstd must save at least 3 %, else the chunk stays raw and costs nothing to read
SAMPLE, SAMPLES = 128 * 1024, 8  # bytes, and how many places: spread, for a chunk may hold several tensors
BETTER = 0.01  # of the chunk: joining planes costs the reader time, so it must save something
MOST_BLOCKS = 1 << 16  # of a frame; zstd makes at most 196 of each 128 KiB, and empty ones could be millions
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


class Decoder:
    """Memory for one thread that decodes chunk after chunk: new memory costs half as much as decoding into it.

    At most a chunk and a piece, whatever a frame says.
    """

    def __init__(self) -> None:
        self._plain = bytearray()
        self._piece = bytearray(PIECE)  # slices of a memoryview are filled 10 times as slowly as those of a bytearray

    def pieces(self, stored: Data, codec: str, size: int) -> Iterator[Data]:
        """Exactly `size` bytes in order, or CorruptChunk before the first of them; each piece is good until the next.

        Planes are joined piece by piece, which holds the interpreter's lock.
        """
        if codec == "raw":
            if len(stored) != size:
                raise CorruptChunk(f"{len(stored)} bytes instead of {size}")
            return iter((stored,))
        try:
            plain = self._unpacked(stored, size)
        except zstandard.ZstdError as e:
            raise CorruptChunk(str(e)) from e
        return self._joined(plain) if codec == "zstd-split2" else iter((plain,))

    def _unpacked(self, stored: Data, size: int) -> memoryview:
        """Raises CorruptChunk, ZstdError."""
        frame = zstandard.get_frame_parameters(stored)
        if frame.content_size != size or size > CHUNK:
            raise CorruptChunk(f"the frame holds {frame.content_size} bytes instead of {size}")
        if not frame.has_checksum:
            raise CorruptChunk("the frame has no checksum")
        if frame.window_size > CHUNK:
            raise CorruptChunk(f"the frame wants a window of {frame.window_size} bytes")
        if (end := _end(stored)) != len(stored):
            raise CorruptChunk(f"the frame ends at byte {end} of {len(stored)}")
        if len(self._plain) < size:
            self._plain = bytearray()  # before there is another one
            self._plain = bytearray(size)
        plain = memoryview(self._plain)[:size]
        # All of it is here and has room, so that zstd writes it into place in one go, without a window.
        done = zstandard.ZstdDecompressor(max_window_size=CHUNK).stream_reader(stored).readinto(plain)
        if done != size:
            raise CorruptChunk(f"{done} bytes instead of {size}")
        return plain

    def _joined(self, planes: memoryview) -> Iterator[Data]:
        half = (len(planes) + 1) // 2
        even, odd = planes[:half], planes[half:]
        for at in range(0, half, PIECE // 2):
            first, second = even[at : at + PIECE // 2], odd[at : at + PIECE // 2]
            both = len(first) + len(second)
            piece = self._piece if both == PIECE else bytearray(both)
            piece[0::2], piece[1::2] = first, second
            yield piece


def _end(stored: Data) -> int:
    """Where its one frame, with a checksum, ends: what lies behind would not be looked at (RFC 8878, 3.1.1)."""
    at = zstandard.frame_header_size(stored)
    for _ in range(MOST_BLOCKS):
        head = int.from_bytes(stored[at : at + 3], "little")
        at += 3 + (1 if head >> 1 & 3 == 1 else head >> 3)  # kind 1: one byte, so many times
        if head & 1:
            return at + 4
        if at >= len(stored):
            break
    raise CorruptChunk(f"the frame has no last block before byte {at}")


class Decoders:
    """As many as work at once; may be used from any thread."""

    def __init__(self) -> None:
        self._free: list[Decoder] = []

    @contextmanager
    def lent(self) -> Iterator[Decoder]:
        try:
            decoder = self._free.pop()
        except IndexError:
            decoder = Decoder()
        try:
            yield decoder
        finally:
            self._free.append(decoder)
