"""Decoding piece by piece."""

import random
import tracemalloc

import pytest

from xim_agent.cache import codec
from xim_agent.cache.manifest import CHUNK, Codec


@pytest.mark.parametrize("size", [1, 2, codec.PIECE - 1, codec.PIECE, codec.PIECE + 1, 3 * codec.PIECE + 5])
def test_planes_are_joined_piece_by_piece(size: int) -> None:
    data = random.Random(size).randbytes(size)
    pieces = [bytes(p) for p in codec.Decoder().pieces(codec.encode(data, "zstd-split2"), "zstd-split2", size)]
    assert b"".join(pieces) == data
    assert {len(p) for p in pieces[:-1]} <= {codec.PIECE}


@pytest.mark.parametrize("name", ["zstd", "zstd-split2"])
def test_decoding_takes_one_chunk_and_a_piece_of_memory(name: Codec) -> None:
    stored = codec.encode(bytes(CHUNK), name)
    tracemalloc.start()
    try:
        assert sum(len(piece) for piece in codec.Decoder().pieces(stored, name, CHUNK)) == CHUNK
        assert CHUNK <= tracemalloc.get_traced_memory()[1] <= CHUNK + 2 * codec.PIECE
    finally:
        tracemalloc.stop()
