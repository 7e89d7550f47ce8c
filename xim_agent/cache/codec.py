"""How the bytes of one chunk are stored: as they are, as a zstd frame, or as a zstd frame of their byte planes."""

from collections.abc import Iterator
from hashlib import sha256

import zstandard

from xim_agent.cache.manifest import CHUNK, Codec

LEVEL = 1  # model-cache.md §7: of bf16 weights level 3 is slower and no smaller
WORTH = 0.97  # zstd must save at least 3 %, else the chunk stays raw and costs nothing to read
PIECE = 1024 * 1024  # even, so that pieces begin with a byte of the even plane; stays in a core's own cache

Data = bytes | bytearray | memoryview


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
