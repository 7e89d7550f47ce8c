"""Codecs and levels on what weights look like; by hand, on one core: `PYTHONPATH=. python tests/bench/codec.py [MiB]`.

bf16 and fp16: normals with a scale per row of 4,096; fp8: e4m3 of normals over an absmax scale per row; int4: two
values a byte, rounded over an absmax scale per group of 128. Prints ratio and MB of plain bytes per second of this
thread's CPU time (best of 3), which other programs disturb less than wall time; at the end joining and SHA-256 alone.
Matches reach back half a MiB at the levels used, so 4 MiB of data are enough.
"""

import random
import struct
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from itertools import repeat

import zstandard

from xim_agent.cache.codec import planes

ROW = 4096
LEVELS = (-1, 1, "1h6", 3, 6)


def bf16(row: list[float]) -> bytes:
    packed = struct.pack(f"<{len(row)}f", *row)
    out = bytearray(2 * len(row))
    out[0::2], out[1::2] = packed[2::4], packed[3::4]
    return bytes(out)


def fp16(row: list[float]) -> bytes:
    return struct.pack(f"<{len(row)}e", *row)


def fp8(row: list[float]) -> bytes:
    scale = 448 / max(map(abs, row))
    return bytes(map(e4m3, (x * scale for x in row)))


def e4m3(x: float) -> int:
    """Rounded through fp16, whose three mantissa bits below the cut decide; subnormals as 2**-9 steps."""
    sign, size = (0x80 if x < 0 else 0), abs(x)
    if size < 2**-6:
        return sign | round(size * 512)
    half = int.from_bytes(struct.pack("<e", size), "little") + 64
    return int(sign | min(0x7E, (half >> 7) - 64))


def int4(row: list[float]) -> bytes:
    out = bytearray()
    for at in range(0, len(row), 128):
        group = row[at : at + 128]
        scale = 7 / max(map(abs, group))
        values = [round(x * scale) + 8 for x in group]
        out += bytes(low | high << 4 for low, high in zip(values[0::2], values[1::2], strict=True))
    return bytes(out)


def tensor(kind: Callable[[list[float]], bytes], size: int) -> bytes:
    """Same bytes every time."""
    rand, out = random.Random(7), bytearray()
    while len(out) < size:
        scale = 0.02 * rand.lognormvariate(0, 0.5)
        out += kind(list(map(rand.gauss, repeat(0.0, ROW), repeat(scale))))
    return bytes(out[:size])


def joined(plain: bytes) -> bytearray:
    """As `codec.Decoder` does it."""
    out, half = bytearray(len(plain)), (len(plain) + 1) // 2
    out[0::2], out[1::2] = memoryview(plain)[:half], memoryview(plain)[half:]
    return out


def packer(level: int | str, size: int) -> zstandard.ZstdCompressor:
    number, special = (1, {"hash_log": 6, "min_match": 7}) if level == "1h6" else (int(level), {})
    params = zstandard.ZstdCompressionParameters.from_level(number, source_size=size, write_checksum=True, **special)
    return zstandard.ZstdCompressor(compression_params=params)


def rate(call: Callable[[], object], size: int) -> float:
    best = float("inf")
    for _ in range(3):
        start = time.thread_time()
        call()
        best = min(best, time.thread_time() - start)
    return size / best / 1e6


def main() -> None:
    size = int(sys.argv[1] if sys.argv[1:] else 4) << 20
    print(f"{'data':5} {'codec':12} {'level':>5} {'ratio':>6} {'compress':>9} {'decompress':>10}  (MB/s)")
    for kind in (bf16, fp16, fp8, int4):
        data = tensor(kind, size)
        for split in (False, True):
            for level in LEVELS:
                pack = packer(level, size)
                unpack = zstandard.ZstdDecompressor().decompress
                before: Callable[[bytes], bytes] = planes if split else bytes
                packed = pack.compress(before(data))
                up = rate(lambda p=pack, f=before, d=data: p.compress(f(d)), size)  # type: ignore[misc]
                down = rate(lambda u=unpack, d=packed: u(d), size)  # type: ignore[misc]
                name = "zstd-split2" if split else "zstd"
                print(f"{kind.__name__:5} {name:12} {level:>5} {len(packed) / size:6.3f} {up:9.0f} {down:10.0f}")
    print(f"join {rate(lambda: joined(data), size):.0f}, sha256 {rate(lambda: sha256(data), size):.0f}")


if __name__ == "__main__":
    main()
