"""What `/metrics` and `/status` tell of the engine."""

from dataclasses import dataclass

from xim_agent.mesh.messages import Load


@dataclass(frozen=True)
class EngineStatistics:
    """`seconds_to_ready` of the last start that became ready; `failure` the class of the last failure, until ready."""

    state: str
    degraded: bool
    ceiling: int
    active: int
    starts: int
    failures: int
    failure: str | None
    seconds_to_ready: float | None
    load: Load
