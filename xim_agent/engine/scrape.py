"""vLLM's /metrics as the few numbers we use. Pure."""

import re
from dataclasses import dataclass, field

from xim_agent.mesh.messages import Load

_LINE = re.compile(r"^vllm:(\w+)(?:\{([^}]*)\})? (\S+)", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_SUMMED = frozenset(
    {
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "generation_tokens_total",
        "iteration_tokens_total_count",
    }
)


@dataclass(frozen=True)
class Scrape:
    """Sums over engines (usage: the highest). None: not reported. `kv_tokens`: what the cache holds."""

    running: float | None = None
    waiting: float | None = None
    kv_usage: float | None = None
    generated: float | None = None
    steps: float | None = None
    kv_tokens: int | None = None

    @property
    def requests(self) -> int:
        return int((self.running or 0) + (self.waiting or 0))

    @property
    def core(self) -> tuple[float | None, ...] | None:
        """What only vLLM's engine core changes; None when this version tells too little to see a hang by it.

        The step counter alone is not enough: it stands still through the chunks of a long prefill (vLLM 0.32 counts
        only steps that bring tokens), while the share of the KV cache in use grows with each.
        """
        if self.steps is None:
            return None
        return self.steps, self.generated, self.kv_usage, self.running, self.waiting

    def load(self, before: "Scrape | None", seconds: float) -> Load:
        rate = None
        if before and before.generated is not None and self.generated is not None and seconds > 0:
            rate = max(0.0, self.generated - before.generated) / seconds
        whole = [None if v is None else int(v) for v in (self.running, self.waiting)]
        return Load(running=whole[0], waiting=whole[1], kv_usage=self.kv_usage, tokens_per_s=rate)


def parse(text: str) -> Scrape:
    """Lines that are not as expected are passed over: versions differ."""
    values: dict[str, list[float]] = {}
    kv_tokens = None
    for name, labels, value in _LINE.findall(text):
        if name == "cache_config_info":
            told = dict(_LABEL.findall(labels))
            blocks, size = told.get("num_gpu_blocks", ""), told.get("block_size", "")
            if blocks.isdigit() and size.isdigit():
                kv_tokens = (kv_tokens or 0) + int(blocks) * int(size)
        elif name in _SUMMED:
            try:
                values.setdefault(name, []).append(float(value))
            except ValueError:
                continue
    usage = values.get("kv_cache_usage_perc")

    def total(name: str) -> float | None:
        return sum(values[name]) if name in values else None

    return Scrape(
        running=total("num_requests_running"),
        waiting=total("num_requests_waiting"),
        kv_usage=max(usage) if usage else None,
        generated=total("generation_tokens_total"),
        steps=total("iteration_tokens_total_count"),
        kv_tokens=kv_tokens,
    )


@dataclass
class Gauges:
    """The last look at the metrics, and the rates between the last two."""

    text: bytes = b""
    load: Load = field(default_factory=Load)
    last: Scrape | None = None
    at: float = 0.0

    def note(self, text: str, found: Scrape, now: float) -> None:
        self.load = found.load(self.last, now - self.at)
        self.text, self.last, self.at = text.encode(), found, now
