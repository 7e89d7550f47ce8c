from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fakes.agent import Bench, FakeAgent, running

from xim_agent.router.jobs import Limits


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """A router that refuses at once what no agent serves."""
    async with running(tmp_path / "router", Limits(grace=0.0)) as bench:
        yield bench


@pytest.fixture
async def agent(bench: Bench) -> FakeAgent:
    """Enrolled; has not polled."""
    return await bench.agent()
