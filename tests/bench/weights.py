"""Files of bf16 weights with the statistics of real ones, made fast without numpy: every 16 MiB of them is another."""

import json
import math
import random
from array import array
from pathlib import Path

CHUNK = 16 * 1024 * 1024
_VALUES = 2 * 1024 * 1024  # drawn one by one; of these every chunk is made
_ROW = 4096


def planes(rand: random.Random) -> tuple[bytes, bytes]:
    """Low and high bytes of normals with a scale for each row, as bf16."""
    values = array("f")
    while len(values) < _VALUES:
        scale = 0.02 * math.exp(rand.gauss(0, 0.5))
        values.extend([rand.gauss(0, scale) for _ in range(_ROW)])
    data = values.tobytes()
    return data[2::4], data[3::4]


class Weights:
    """The low plane of each chunk gets other mantissas (they are noise in real weights too), the high one is turned."""

    def __init__(self, seed: int) -> None:
        self._rand = random.Random(seed)
        times = CHUNK // 2 // _VALUES
        self._low, self._high = (plane * times for plane in planes(self._rand))
        self._mantissas = int.from_bytes(b"\x7f" * len(self._low), "little")
        self._lows = int.from_bytes(self._low, "little")

    def chunk(self) -> bytearray:
        size = len(self._low)
        noise = int.from_bytes(self._rand.randbytes(size), "little") & self._mantissas
        turn = self._rand.randrange(size)
        data = bytearray(CHUNK)
        data[0::2] = (self._lows ^ noise).to_bytes(size, "little")
        data[1::2] = self._high[turn:] + self._high[:turn]
        return data


def write_model(root: Path, size: int, files: int) -> None:
    """`size` bytes, a multiple of the chunk's, in `files` safetensors files (their header in the first chunk)."""
    root.mkdir(parents=True)
    (root / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}))
    weights, left = Weights(1), size // CHUNK
    for i in range(files):
        count = left // (files - i)
        left -= count
        with (root / f"model-{i + 1:05}-of-{files:05}.safetensors").open("wb") as file:
            for j in range(count):
                data = weights.chunk()
                if j == 0:
                    data[: len(_header(count))] = _header(count)
                file.write(data)


def _header(chunks: int) -> bytes:
    """One tensor that fills the file."""
    room = 4096
    values = (chunks * CHUNK - room) // 2
    tensor = {"w": {"dtype": "BF16", "shape": [values], "data_offsets": [0, 2 * values]}}
    return (room - 8).to_bytes(8, "little") + json.dumps(tensor).encode().ljust(room - 8)
