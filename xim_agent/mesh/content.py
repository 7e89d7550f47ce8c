"""Content-Encoding zstd on small bodies: refuses to unpack more than the caller allows."""

import io

import zstandard

# Below this a body stays as it is (wire-protocol §1).
COMPRESS_FROM = 1024
# An encoder may ask the decoder for a window of 2 GiB; 8 MiB is what RFC 9659 allows in HTTP.
_MAX_WINDOW = 8 * 1024 * 1024
_compressor = zstandard.ZstdCompressor(level=1)


class ContentError(ValueError):
    """The body cannot be unpacked, or is larger than allowed."""


class ContentTooLarge(ContentError):
    """It is larger than allowed."""


def pack(body: bytes) -> tuple[dict[str, str], bytes]:
    """(headers, body): compressed when that is allowed and saves something."""
    if len(body) > COMPRESS_FROM:
        packed = _compressor.compress(body)
        if len(packed) < len(body):
            return {"content-encoding": "zstd"}, packed
    return {}, body


def unpack(body: bytes, encoding: str, limit: int) -> bytes:
    """`encoding`: the Content-Encoding header, empty for none. `limit`: bytes after decoding."""
    name = encoding.strip().lower()
    if name == "zstd":
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
        try:
            with decompressor.stream_reader(io.BytesIO(body), read_across_frames=True) as reader:
                body = reader.read(limit + 1)
        except zstandard.ZstdError as error:
            raise ContentError(f"not zstd: {error}") from None
    elif name not in ("", "identity"):
        raise ContentError(f"content-encoding {encoding!r:.40} was not asked for")
    if len(body) > limit:
        raise ContentTooLarge(f"more than {limit} bytes")
    return body
