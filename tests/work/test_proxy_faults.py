"""A thousand streams through each kind of fault between agent and router: every answer whole, each ended once."""

from pathlib import Path
from typing import Any, get_args

import pytest
from fakes.data_path import data_path
from fakes.tcp_faults import Kind

from xim_agent.router.jobs import Limits

pytestmark = pytest.mark.filterwarnings("ignore:Async generator 'http:ResourceWarning")  # of a call cut in its body
STREAMS = 1000
# What one such fault costs, in the time that passes for the agent, says how many there may be of it.
SHARE = {"blackhole": 0.03, "half_close": 0.06}


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("seed", [1, *(pytest.param(s, marks=pytest.mark.full) for s in (2, 3, 4))])
async def test_every_answer_arrives_whole(tmp_path: Path, kind: Kind, seed: int, autojump_clock: Any) -> None:
    # Several faults in a row may outlast the time that the router lets a client wait for a slot: rightly.
    async with data_path(tmp_path, seed=seed, limits=Limits(queue_wait=600.0)) as path:
        path.proxy.spoil(kind, SHARE.get(kind, 0.1))
        await path.ask_many(STREAMS)
        assert path.outcomes() == {"complete": STREAMS}
        assert path.proxy.hits[kind] >= 10
        if kind in ("delay", "throttle"):
            assert not path.agent.router.statistics().failures, "what is slow is waited for"
        path.proxy.spoil(None, 0)
        await path.flushed()
        path.check()
