"""What a chunk decodes to, in one."""

from xim_agent.cache.codec import Data, Decoder


def decoded(stored: Data, codec: str, size: int) -> bytes:
    """Raises CorruptChunk."""
    return b"".join(map(bytes, Decoder().pieces(stored, codec, size)))
