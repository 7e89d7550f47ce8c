"""The metrics port over a real socket, with what a test says behind it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import trio

from xim_agent.metrics.registry import Collector
from xim_agent.metrics.server import MetricsServer

OPEN = "application/openmetrics-text"


@dataclass(frozen=True)
class FakeAgent:
    version: str = "1.2.3"
    protocol: int = 1
    started: float = 12.5


class Told:
    """What the four callables say; tests change it between requests."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.engine = b""
        self.status: dict[str, Any] = {}


@asynccontextmanager
async def serving(told: Told) -> AsyncIterator[httpx.AsyncClient]:
    server = MetricsServer(
        collect=Collector({"agent": FakeAgent}),
        ready=lambda: told.reasons,
        status=lambda: told.status,
        engine_text=lambda: told.engine,
        redact=lambda text: text.replace("hunter2", "***"),
    )
    async with trio.open_nursery() as nursery:
        (url,) = await nursery.start(server.run, "127.0.0.1", 0)
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
            yield client
        nursery.cancel_scope.cancel()
