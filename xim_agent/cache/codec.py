"""How the bytes of one chunk are stored: as they are, as a zstd frame, or as a zstd frame of their byte planes."""

from hashlib import sha256

import zstandard

from xim_agent.cache.manifest import CHUNK, Codec

LEVEL = 1  # model-cache.md §7: of bf16 weights level 3 is slower and no smaller
WORTH = 0.97  # zstd must save at least 3 %, else the chunk stays raw and costs nothing to read


class CorruptChunk(ValueError):
    """The stored bytes do not decode to exactly the size the manifest promised."""


def encode(data: bytes | memoryview, codec: Codec, threads: int = 1) -> bytes:
    """A frame with content size and checksum. It does not depend on `threads` (≥ 1), so equal chunks stay equal."""
    if codec == "raw":
        return bytes(data)
    plain = bytes(data[0::2]) + bytes(data[1::2]) if codec == "zstd-split2" else data
    return zstandard.ZstdCompressor(
        level=LEVEL, threads=max(1, threads), write_checksum=True, write_content_size=True
    ).compress(plain)


def choose(data: bytes | memoryview, threads: int = 1) -> tuple[Codec, bytes | memoryview]:
    """The smaller of `raw` and `zstd`."""
    packed = encode(data, "zstd", threads)
    return ("zstd", packed) if len(packed) <= WORTH * len(data) else ("raw", data)


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
