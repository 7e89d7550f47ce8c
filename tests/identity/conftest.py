from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.identity import Agent, Router, opened


@pytest.fixture
def router(tmp_path: Path) -> Iterator[Router]:
    with opened(tmp_path / "router") as router:
        yield router


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[Router]:
    """Another router with keys of its own."""
    with opened(tmp_path / "stranger") as router:
        yield router


@pytest.fixture
def agent(router: Router) -> Agent:
    return Agent(router, router.join_key())
