"""Decoding piece by piece."""

import random
import tracemalloc
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xim_agent.cache import codec
from xim_agent.cache.manifest import CHUNK, Codec


@pytest.mark.parametrize("size", [1, 2, codec.PIECE - 1, codec.PIECE, codec.PIECE + 1, 3 * codec.PIECE + 5])
def test_planes_are_joined_piece_by_piece(size: int) -> None:
    data = random.Random(size).randbytes(size)
    pieces = [bytes(p) for p in codec.Decoder().pieces(codec.encode(data, "zstd-split2"), "zstd-split2", size)]
    assert b"".join(pieces) == data
    assert {len(p) for p in pieces[:-1]} <= {codec.PIECE}


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=2000), st.sampled_from(get_args(Codec)), st.booleans())))
def test_nothing_of_an_earlier_chunk_shows(chunks: list[tuple[bytes, Codec, bool]]) -> None:
    decoder = codec.Decoder()
    for data, name, cut in chunks:
        stored = codec.encode(data, name)
        if cut:
            with pytest.raises(codec.CorruptChunk):
                decoder.pieces(stored[:-1], name, len(data))
        else:
            assert b"".join(map(bytes, decoder.pieces(stored, name, len(data)))) == data


def test_a_decoder_is_lent_to_one_at_a_time_and_again() -> None:
    decoders = codec.Decoders()
    with decoders.lent() as one, decoders.lent() as two:
        assert one is not two
    with decoders.lent() as again, decoders.lent() as other:
        assert {again, other} == {one, two}


@pytest.mark.parametrize("name", ["zstd", "zstd-split2"])
def test_decoding_takes_one_chunk_and_a_piece_of_memory(name: Codec) -> None:
    stored = codec.encode(bytes(CHUNK), name)
    tracemalloc.start()
    try:
        assert sum(len(piece) for piece in codec.Decoder().pieces(stored, name, CHUNK)) == CHUNK
        assert CHUNK <= tracemalloc.get_traced_memory()[1] <= CHUNK + 2 * codec.PIECE
    finally:
        tracemalloc.stop()
