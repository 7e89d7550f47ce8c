"""What the cache tells of itself. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class CachedModel:
    """Bytes as allocated; `stored`: its chunks, shared ones included."""

    manifest: str
    id: str
    name: str
    revision: str
    stored: int
    ready: int
    in_use: bool


@dataclass(frozen=True)
class CacheStatistics:
    """Bytes as allocated at the last look, which is taken around every operation and every 30 s.

    `tiers`: parts of `bytes_used`; `fetch_*`: the transfer that runs now, in bytes, None while none does. Evictions by
    kind and reason; `last_eviction_age`: seconds between the last use of what went last and its end. What else there
    is counts up.
    """

    bytes_used: int
    tiers: Mapping[str, int]
    bound: int
    disk_free: int
    fetch_done: int | None
    fetch_total: int | None
    fetch_rate: float | None
    fetch_seconds_left: float | None
    network_bytes: int
    hit_bytes: int
    stalls: int
    retries: int
    wrong_blobs: int
    evictions: Mapping[str, Mapping[str, int]]
    evicted_bytes: Mapping[str, int]
    last_eviction_age: float | None
    models: tuple[CachedModel, ...]
