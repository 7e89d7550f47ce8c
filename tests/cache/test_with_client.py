"""The cache behind the agent's own HTTP client."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.routing import Route

from xim_agent.cache.service import Cache
from xim_agent.clock import SystemClock
from xim_agent.mesh.client import RouterClient
from xim_agent.mesh.messages import ModelRef
from xim_agent.router.blobs import blob_endpoint, manifest_endpoint


@dataclass
class Bearer:
    router: str
    token: str


class Credentials:
    def __init__(self, router: str) -> None:
        self.router = router

    async def wait_bearer(self) -> Bearer:
        return Bearer(self.router, "token")

    async def refused(self, token: str) -> None:
        raise AssertionError("no token is refused here")


async def test_a_model_arrives_through_the_agents_own_client(
    open_cache: Callable[..., Cache],
    model: ModelRef,
    server: Any,
    model_files: Path,
    same_tree: Callable[[Path, Path], None],
) -> None:
    server.app.router.routes += [
        Route("/v1/models/manifests/{sha256}", manifest_endpoint),
        Route("/v1/models/blobs/{sha256}", blob_endpoint),
    ]
    async with RouterClient(insecure=False, clock=SystemClock(), on_skew=lambda s: None) as client:
        client.credentials = Credentials(server.url)
        async with open_cache(source=client) as cache:
            same_tree(await cache.ensure(model, lambda p: None), model_files)
