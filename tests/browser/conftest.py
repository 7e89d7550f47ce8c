import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes.browser import Visit, Visitor, chromium
from fakes.world import World
from playwright.sync_api import Browser

from xim_agent.router.dashboard.parts import Role


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core."""
    file = Path(os.environ.get("XIM_TEST_AXE") or "")
    assert file.is_file(), "XIM_TEST_AXE names no file: run ./build/test, and see what build/axe says"
    return file.read_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def world(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    """A router that nobody has used yet, with the limits of an indirect parameter."""
    with World(tmp_path / "router", getattr(request, "param", None)) as world:
        yield world


@pytest.fixture
def visit(browser: Browser, world: World) -> Iterator[Visit]:
    """Makes visitors, signed in with a `role`. Nobody may have seen trouble in the end."""
    visitors: list[Visitor] = []

    def make(role: Role | None = "admin", **more: Any) -> Visitor:
        visitors.append(visitor := Visitor(browser, world.url, **more))
        if role is not None:
            visitor.page.goto(world.link(role))
            visitor.page.wait_for_selector("nav:visible")
        return visitor

    yield make
    troubles = {number: found for number, visitor in enumerate(visitors) if (found := visitor.unexpected())}
    for visitor in visitors:
        visitor.close()
    assert not troubles
