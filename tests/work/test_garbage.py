"""A request may bring 32 MiB, and the garbage collector comes seldom (`heap`): nothing of a request waits for it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from fakes.data_path import MODEL, PROJECT, DataPath, data_path
from fakes.garbage import none_left

from xim_agent.engine.streams import Connection
from xim_agent.mesh.messages import Lease
from xim_agent.router import catalog
from xim_agent.router.jobs import Grant, Job
from xim_agent.work.outgoing import Outgoing

WHOLE = json.dumps({"model": MODEL, "stream": True, "prompt": "x" * 100_000}).encode()


async def ask(path: DataPath, body: bytes, status: int, then: Callable[[DataPath], None] | None = None) -> None:
    """Over a socket by hand, since clients leave garbage, too. `then` happens at the first bytes of the answer, and the
    client goes if it does nothing."""
    key = catalog.create_api_key(path.store.db, PROJECT, 1e9)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\nconnection: close\r\n"
    async with await trio.open_tcp_stream("127.0.0.1", path.proxy.target) as stream:
        await stream.send_all(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 %d " % status)
        if then is not None:
            then(path)
        if then is not leave:
            while await stream.receive_some():
                pass
    if then is DataPath.kill_engine:
        await path.start_engine()
        await path.ready()


def leave(_: DataPath) -> None:
    pass


@pytest.mark.parametrize(
    ("body", "status", "then"),
    [
        pytest.param(WHOLE, 200, None, id="whole"),
        pytest.param(WHOLE, 200, leave, id="client leaves"),
        pytest.param(WHOLE, 200, DataPath.kill_engine, id="engine dies"),
        pytest.param(WHOLE.replace(MODEL.encode(), b"other"), 404, None, id="unknown model"),
        pytest.param(WHOLE[:-1], 400, None, id="no JSON"),
        pytest.param(b"x" * (33 << 20), 413, None, id="too large"),
    ],
)
async def test_a_request_leaves_nothing_behind(
    tmp_path: Path, body: bytes, status: int, then: Callable[[DataPath], None] | None
) -> None:
    async with data_path(tmp_path) as path:
        await ask(path, body, status, then)
        await path.flushed()
        with none_left(Job, Grant, Lease, Outgoing, Connection):
            for _ in range(3):
                await ask(path, body, status, then)
            await path.flushed()
            await trio.testing.wait_all_tasks_blocked(0.05)
