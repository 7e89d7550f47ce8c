"""Every series of the agent and of the local router: name, help, and where its value stands in a part's statistics.

vLLM's series are passed through under vLLM's names beside these. `python_*` and `process_*` come from vLLM too, so the
agent exports none of that name.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """A counter when `name` ends in `_total`, a histogram with `buckets`, else a gauge.

    `attr` is a dotted path into what part `part` reports, empty for the report itself; a None there means no sample.
    With labels the value there is a mapping from the first one's value to a number, or to such a mapping of the next
    one. `info` rows are 1, with the attributes named in `labels` as labels. A histogram's value there is a `Histogram`
    with these buckets, their upper bounds.
    """

    name: str
    help: str
    part: str
    attr: str
    labels: tuple[str, ...] = ()
    info: bool = False
    buckets: tuple[float, ...] = ()

    @property
    def kind(self) -> Literal["counter", "gauge", "histogram"]:
        if self.buckets:
            return "histogram"
        return "counter" if self.name.endswith("_total") else "gauge"


# 20 ms with a small model and an empty engine; a prefill of 100,000 tokens, and vLLM's queue, take minutes.
FIRST_TOKEN_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 300.0)
# Sockets of running streams are looked at every 20 ms, so nothing less can be told apart; 10 to 50 tokens a second are
# usual, and what comes 10 s after its predecessor has stood still.
GAP_SECONDS = (0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0)
# A lease is at the engine in a millisecond, unless its body of over 1 MiB has to be fetched.
QUEUE_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0)
# A waiting agent takes a request at once; a request waits at most 60 s for one, and another 60 s when that one failed.
DISPATCH_SECONDS = (0.001, 0.005, 0.02, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
# To the longest request of any tier, 30 minutes.
DURATION_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
# A router in the same rack answers in a millisecond, one on another continent in 0.3 s; 10 s is the time limit.
CALL_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
# 1 MB/s is a poor line; 12.5 and 125 MB/s are what 100 Mbit/s and 1 Gbit/s carry, 1.25 GB/s 10 Gbit/s; several
# transfers share it.
FETCH_BYTES_PER_SECOND = (1e5, 3e5, 1e6, 3e6, 6e6, 12.5e6, 25e6, 60e6, 125e6, 300e6, 600e6, 1.25e9, 3e9)


METRICS: tuple[Metric, ...] = (
    Metric("xim_agent_info", "The running agent", "agent", "", ("version", "protocol"), info=True),
    Metric("xim_agent_start_time_seconds", "Start of the process, Unix seconds", "agent", "started"),
    Metric("xim_agent_ready", "1 while /readyz says so", "ready", ""),
    Metric("xim_agent_condition", "1 for every health condition that holds", "health", "", ("code",)),
    # identity
    Metric("xim_agent_enrolled", "1 while there is a credential", "identity", "enrolled"),
    Metric("xim_agent_token_expiry_seconds", "End of the token, Unix seconds", "identity", "token_expires"),
    Metric("xim_agent_token_refreshes_total", "Tokens renewed", "identity", "refreshes"),
    Metric(
        "xim_agent_identity_failures_total", "Enrollments and refreshes that failed", "identity", "failures", ("code",)
    ),
    # link to the router
    Metric("xim_agent_link_up", "1 while polls are answered", "work", "link_up"),
    Metric("xim_agent_polls_total", "Polls answered", "work", "polls"),
    Metric("xim_agent_polls_failed_total", "Polls that failed", "work", "failed_polls"),
    Metric("xim_agent_last_poll_seconds", "Last answered poll, Unix seconds", "work", "last_poll"),
    Metric("xim_agent_draining", "1 after a stop or a drain was asked for", "work", "draining"),
    Metric("xim_agent_router_calls_total", "Calls to the router", "mesh", "calls"),
    Metric("xim_agent_router_failures_total", "Calls to the router that failed", "mesh", "failures", ("code",)),
    Metric("xim_agent_router_sent_bytes_total", "Bodies sent to the router", "mesh", "bytes_sent"),
    Metric("xim_agent_router_received_bytes_total", "Bodies of the router's replies", "mesh", "bytes_received"),
    Metric("xim_agent_router_clock_skew_seconds", "The router's clock minus ours", "mesh", "skew"),
    Metric(
        "xim_agent_events_call_seconds",
        "Calls that bring answers to the router, from leaving to the reply (polls are held, so they tell nothing)",
        "times",
        "call",
        buckets=CALL_SECONDS,
    ),
    # leases
    Metric("xim_agent_leases_accepted_total", "Leases taken", "work", "sender.accepted"),
    Metric("xim_agent_leases_refused_total", "Leases refused at once", "work", "sender.refused"),
    Metric("xim_agent_leases_ended_total", "Leases over, by ending or error", "work", "sender.ended", ("reason",)),
    Metric("xim_agent_leases_running", "Requests running now", "work", "sender.running"),
    Metric("xim_agent_leases_held", "Leases whose ending is not acknowledged", "work", "sender.held"),
    Metric(
        "xim_agent_oldest_lease_seconds",
        "Age of the oldest running request",
        "work",
        "sender.oldest_running_seconds",
    ),
    Metric(
        "xim_agent_queue_seconds",
        "From the lease to its request being on its way to vLLM (vLLM's own queue: vllm:request_queue_time_seconds)",
        "times",
        "queue",
        buckets=QUEUE_SECONDS,
    ),
    Metric(
        "xim_agent_first_token_seconds",
        "From the lease to the first data of an event stream; other answers do not count",
        "times",
        "first",
        buckets=FIRST_TOKEN_SECONDS,
    ),
    Metric(
        "xim_agent_request_seconds",
        "From the lease to its ending, whichever",
        "times",
        "duration",
        buckets=DURATION_SECONDS,
    ),
    Metric(
        "xim_agent_inter_token_seconds",
        "Between two pieces of an event stream; a piece is all that came in 20 ms, so often one token, or several "
        "(per token: vllm:inter_token_latency_seconds). Not while the router's credit is used up",
        "streams",
        "gaps",
        buckets=GAP_SECONDS,
    ),
    # results
    Metric("xim_agent_frames_total", "Result frames made", "work", "sender.outbox.frames"),
    Metric("xim_agent_frames_resent_total", "Result frames sent again", "work", "sender.outbox.resent_frames"),
    Metric("xim_agent_result_bytes_total", "Bytes of answers", "work", "sender.outbox.data_bytes"),
    Metric(
        "xim_agent_unacknowledged_bytes",
        "Answers the router has not acknowledged",
        "work",
        "sender.outbox.unacknowledged_bytes",
    ),
    # cache
    Metric("xim_agent_cache_bytes", "Disk space used by the model cache", "cache", "bytes_used"),
    Metric("xim_agent_cache_tier_bytes", "Disk space used, by what for", "cache", "tiers", ("tier",)),
    Metric("xim_agent_cache_bound_bytes", "Most the model cache may use", "cache", "bound"),
    Metric("xim_agent_cache_disk_free_bytes", "Free space of the cache's disk", "cache", "disk_free"),
    Metric("xim_agent_cache_fetch_done_bytes", "Done of the step of the transfer at work", "cache", "fetch_done"),
    Metric("xim_agent_cache_fetch_total_bytes", "Size of the step of the transfer at work", "cache", "fetch_total"),
    Metric("xim_agent_cache_fetch_bytes_per_second", "Speed of the transfer at work", "cache", "fetch_rate"),
    Metric("xim_agent_cache_fetch_left_seconds", "Time the step at work still needs", "cache", "fetch_seconds_left"),
    Metric(
        "xim_agent_cache_blob_bytes_per_second",
        "Speed of each fetched blob (a chunk of a model, at most 16 MiB), waits before further attempts included",
        "transfers",
        "speed",
        buckets=FETCH_BYTES_PER_SECOND,
    ),
    Metric("xim_agent_cache_network_bytes_total", "Bytes of models fetched", "cache", "network_bytes"),
    Metric("xim_agent_cache_hit_bytes_total", "Bytes of models that need not be fetched", "cache", "hit_bytes"),
    Metric("xim_agent_cache_stalls_total", "Transfers given up because no byte came", "cache", "stalls"),
    Metric("xim_agent_cache_retries_total", "Transfers tried again", "cache", "retries"),
    Metric("xim_agent_cache_wrong_blobs_total", "Blobs thrown away as damaged", "cache", "wrong_blobs"),
    Metric("xim_agent_cache_evictions_total", "Evictions", "cache", "evictions", ("kind", "reason")),
    Metric("xim_agent_cache_evicted_bytes_total", "Bytes evicted, by kind", "cache", "evicted_bytes", ("kind",)),
    Metric(
        "xim_agent_cache_last_eviction_age_seconds",
        "What was evicted last had not been used for so long",
        "cache",
        "last_eviction_age",
    ),
    # engine and what it serves
    Metric("xim_agent_engine_degraded", "1 after too many failures in a row", "engine", "degraded"),
    Metric("xim_agent_engine_ceiling", "Most requests the engine takes at once", "engine", "ceiling"),
    Metric("xim_agent_engine_requests", "Requests open at the engine", "engine", "active"),
    Metric("xim_agent_engine_starts_total", "Starts of the engine", "engine", "starts"),
    Metric("xim_agent_engine_failures_total", "Starts that failed and crashes", "engine", "failures"),
    Metric("xim_agent_engine_ready_seconds", "Duration of the last start", "engine", "seconds_to_ready"),
    Metric("xim_agent_generation", "Generation of the running assignment, 0: none", "assignment", "generation"),
)

ROUTER_METRICS: tuple[Metric, ...] = (
    Metric("xim_router_info", "The running router", "router", "", ("version", "protocol"), info=True),
    Metric("xim_router_start_time_seconds", "Start of the process, Unix seconds", "router", "started"),
    # the fleet
    Metric("xim_router_agents", "Enrolled agents, by state", "router", "agents", ("state",)),
    Metric(
        "xim_router_tokens_per_second",
        "Tokens that agents say their engines make, by model",
        "router",
        "tokens_per_second",
        ("model",),
    ),
    # requests of clients
    Metric(
        "xim_router_requests_total", "Requests over, by ending: complete, left or error", "times", "ended", ("ending",)
    ),
    Metric("xim_router_queued_requests", "Requests that wait for an agent", "router", "queued", ("project", "model")),
    Metric("xim_router_queued_bytes", "Bodies of the requests that wait", "router", "queued_bytes"),
    Metric(
        "xim_router_oldest_queued_seconds", "Wait of the request that waits longest", "router", "oldest_queued_seconds"
    ),
    Metric("xim_router_running_requests", "Requests that agents have", "router", "running"),
    Metric("xim_router_answer_bytes_total", "Bytes of answers given to clients", "times", "answered_bytes"),
    Metric("xim_router_leases_total", "Leases given to agents", "router", "leases"),
    Metric("xim_router_retries_total", "Requests given to another agent after one failed", "router", "retries"),
    Metric("xim_router_leases_offered_again_total", "Leases that did not reach the agent", "router", "offered_again"),
    Metric(
        "xim_router_dispatch_seconds",
        "From entering the queue to a lease; a retried request counts again",
        "times",
        "dispatch",
        buckets=DISPATCH_SECONDS,
    ),
    Metric(
        "xim_router_first_token_seconds",
        "From the request to the first data of a stream; counted when the request ends",
        "times",
        "first",
        buckets=FIRST_TOKEN_SECONDS,
    ),
    Metric(
        "xim_router_request_seconds",
        "From the request to its ending, whichever",
        "times",
        "duration",
        buckets=DURATION_SECONDS,
    ),
)
