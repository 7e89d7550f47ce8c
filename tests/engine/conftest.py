"""An engine service over the scripted launcher, with a guard of its own."""

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio
from fakes.engine import Bench, write_model

from xim_agent.engine.guard import Guard
from xim_agent.engine.service import EngineService


@pytest.fixture
def guard() -> Iterator[Guard]:
    made = Guard.start()
    yield made
    made.close()


@pytest.fixture
def runtime() -> Iterator[Path]:
    """Short, because sockets lie in it."""
    made = Path(tempfile.mkdtemp(prefix="xim"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def bench(guard: Guard, runtime: Path) -> Bench:
    return Bench(guard, runtime, write_model(runtime / "model"))


@pytest.fixture
async def running(bench: Bench, nursery: trio.Nursery) -> AsyncIterator[EngineService]:
    """A ready engine with the defaults of the fake."""
    service = bench.service()
    nursery.start_soon(service.run)
    with trio.fail_after(20):
        await service.switch(bench.target())
        await service.wait_ready()
    yield service
    with trio.fail_after(20):
        await service.stop()
