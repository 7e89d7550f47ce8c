"""Every message of wire-protocol.md §4 and §5 as a type. Unknown keys are ignored; that is how version 1 grows."""

from typing import Any, Literal

from msgspec import UNSET, Raw, Struct, UnsetType

Phase = Literal["starting", "ready", "draining", "degraded"]
Task = Literal["generate", "embed", "score"]
EndReason = Literal["complete", "cancelled", "deadline"]
ErrorCode = Literal["engine_lost", "engine_overloaded", "invalid_request", "draining", "internal"]

SERVED_PATHS = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/embeddings",
        "/v1/rerank",
        "/v1/score",
        "/tokenize",
        "/detokenize",
    }
)

MAX_BODY = 32 * 1024 * 1024
MAX_INLINE_BODY = 1024 * 1024
MAX_POLL_REPLY = 64 * 1024 * 1024
MAX_EVENTS = 1024 * 1024
MAX_BATCH = 256 * 1024
MAX_WAIT_MS = 25_000


class ModelRef(Struct, frozen=True):
    """The model of a signed assignment; `manifest` is `sha256:<hex>`, `size_bytes` the sum of its files."""

    id: str
    name: str
    revision: str
    manifest: str
    size_bytes: int


class Serving(Struct, frozen=True):
    served_model_name: str
    task: Task = "generate"
    quantization: str | None = None
    max_model_len: int | None = None
    engine_args: tuple[str, ...] = ()


class Assignment(Struct, frozen=True):
    iss: str
    sub: str
    iat: int
    generation: int
    model: ModelRef
    serving: Serving


class Load(Struct, frozen=True):
    running: int | None = None
    waiting: int | None = None
    kv_usage: float | None = None
    tokens_per_s: float | None = None


class ModelState(Struct, frozen=True):
    id: str
    revision: str
    generation: int


class Progress(Struct, frozen=True):
    """`done` and `total` in bytes for fetch and verify, in seconds (total 0) for the engine; `rate` per second."""

    stage: Literal["fetch", "verify", "engine"]
    done: int
    total: int
    rate: float
    text: str = ""


class Condition(Struct, frozen=True):
    """`hint`: what to do about it; empty when nothing is known."""

    code: str
    text: str
    since: float
    hint: str = ""


class PollRequest(Struct, frozen=True):
    """`versions`: of what runs there now, by its name: `agent`, `vllm` as soon as it is known."""

    boot: str
    n: int
    phase: Phase
    capacity: int
    wait_ms: int
    held: list[int]
    model: ModelState | None
    ceiling: int
    load: Load
    progress: Progress | None
    health: list[Condition]
    versions: dict[str, str] = {}


class Lease(Struct, frozen=True):
    id: int
    request: str
    method: str
    path: str
    headers: dict[str, str]
    body: bytes | None
    stream: bool
    tenant: str
    deadline_ms: int
    credit: int
    ttl_ms: int = 75_000


class OddLease(Lease, frozen=True):
    """A lease of which only the id could be read; `flaw` says why. Never on the wire."""

    flaw: str = ""


class PollOrders(Struct, frozen=True):
    credit: dict[int, int] = {}
    cancel: list[int] = []
    generation: int = 0
    drain: bool = False
    idle_reason: str | None = None
    retry_ms: int = 0


class PollReply(PollOrders, frozen=True):
    leases: list[Lease] = []


class EventsRequest(Struct, frozen=True):
    """`frames`: each an encoded `[lease, seq, kind, payload]`, kept encoded so that a resend is the same bytes."""

    boot: str
    frames: list[Raw]


class EventsReply(Struct, frozen=True):
    acked: dict[int, int] = {}
    credit: dict[int, int] = {}
    cancel: list[int] = []
    unknown: list[int] = []


class Head(Struct, frozen=True):
    status: int
    headers: dict[str, str]


class End(Struct, frozen=True):
    reason: EndReason
    bytes: int
    chunks: int
    ttft_ms: int | None
    duration_ms: int


class Error(Struct, frozen=True):
    code: ErrorCode
    message: str
    retryable: bool


class Problem(Struct, frozen=True):
    """RFC 9457 with our `code`; members beyond these stay in the raw map."""

    code: str = ""
    title: str = ""
    detail: str = ""
    status: int | None = None
    extra: dict[str, Any] | UnsetType = UNSET
