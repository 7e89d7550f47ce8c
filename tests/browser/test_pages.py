"""Every page as everybody must find it: wide and narrow, light and dark, by keyboard, without a fault for axe."""

import json

import pytest
from fakes.browser import NARROW, WIDE, Visit, Visitor
from fakes.world import World

LOOKS = [(WIDE, "light"), (NARROW, "dark")]
MORE_LOOKS = [(WIDE, "dark"), (NARROW, "light")]
MAX_BYTES = 200_000  # of a page that is opened for the first time

# What hinders people for certain; of what axe has to guess it says so elsewhere in its result.
_AXE = """async () => (await axe.run(document, {resultTypes: ["violations"]})).violations
  .filter((v) => ["serious", "critical"].includes(v.impact))
  .map((v) => `${v.id}: ${v.nodes.slice(0, 3).map((n) => `${n.target} ${n.failureSummary}`).join(" | ")}`)"""


def pages(agent: str | None) -> list[str]:
    return ["agents", *([f"agents/{agent}"] if agent else []), "join", "models", "keys", "try"]


def faults(visitor: Visitor, axe: str) -> list[str]:
    visitor.page.evaluate(axe)
    found: list[str] = visitor.page.evaluate(_AXE)
    return found + [f"wider than the window: {what}" for what in visitor.overflow()]


def looked_at(
    visitor: Visitor, axe: str, routes: list[str], state: str, looks: list[tuple[int, str]]
) -> dict[str, list[str]]:
    """Faults by page and look."""
    found: dict[str, list[str]] = {}
    for route in routes:
        visitor.go(route)
        for width, scheme in looks:
            visitor.look(width, scheme)
            name = f"{route.partition('/')[0] if '/' not in route else 'agent'}-{state}-{width}-{scheme}"
            visitor.picture(name)
            if wrong := faults(visitor, axe):
                found[name] = wrong
    return found


# Tab through the whole page: what can be acted on, what of it got the focus, and where the focus was not to be seen.
_MARK = """() => {
  const all = [...document.querySelectorAll("a[href], button, input, select, textarea, summary, [tabindex]")]
  window.reachable = all.filter((e) => !e.disabled && e.tabIndex >= 0 && e.checkVisibility({visibilityProperty: true})
    && (e.type !== "radio" || e.checked))
  return window.reachable.length
}"""
_FOCUS = """() => {
  const now = document.activeElement, style = getComputedStyle(now)
  const seen = (style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0) || style.boxShadow !== "none"
  const at = now.getBoundingClientRect()
  const covered = at.width === 0 || at.bottom < 0 || at.top > innerHeight
  return [window.reachable.indexOf(now), seen && !covered, `${now.tagName} ${now.textContent.slice(0, 40)}`]
}"""
_NAMES = "() => window.reachable.map((e) => `${e.tagName} ${e.id} ${e.textContent.slice(0, 40)}`)"


def by_keyboard(visitor: Visitor) -> list[str]:
    """What the Tab key does not reach, and what does not show that it has the focus."""
    page = visitor.page
    page.evaluate("document.activeElement.blur()")
    count, reached, unseen = page.evaluate(_MARK), set(), []
    for _ in range(2 * count + 3):  # twice round: a live page may begin in its middle
        page.keyboard.press("Tab")
        index, seen, name = page.evaluate(_FOCUS)
        reached.add(index)
        if reached.issuperset(range(count)):
            break
        if index >= 0 and not seen:
            unseen.append(f"focus not visible: {name}")
    names = page.evaluate(_NAMES)
    return unseen + [f"not reached: {names[i]}" for i in range(count) if i not in reached]


def furnished(world: World) -> str:
    """A router with something of everything; returns the id of an agent that does a lot."""
    world.publish("llama-3.1-8b-instruct")
    world.publish("toy", "2026-11-26", assigned=False)
    for region in ("eu-west", "us-east"):
        world.join_key(project="research", region=region)
    busy = world.agent("gpu-1.example")
    busy.says = {"model": {"id": "llama-3.1-8b-instruct", "revision": "r1", "generation": 1}}
    busy.says |= {"load": {"running": 3, "waiting": 2, "kv_usage": 0.42, "tokens_per_s": 183.4}}
    fetching = {"stage": "fetch", "done": 1_300_000_000, "total": 5_000_000_000, "rate": 95e6, "text": ""}
    world.agent("gpu-2.example").says = {"phase": "starting", "capacity": 0, "model": None, "progress": fetching}
    starting = {"stage": "engine", "done": 14, "total": 0, "rate": 0.0, "text": "loading weights"}
    world.agent("gpu-3.example").says = {"phase": "starting", "capacity": 0, "model": None, "progress": starting}
    trouble = {"code": "disk_full", "text": "the model cache has 1.2 GB left of 40 GB", "since": 1.0}
    world.agent("gpu-4.example").says = {"phase": "draining", "capacity": 0, "health": [trouble]}
    world.agent("gpu-5.example", living=False)
    return busy.id


@pytest.mark.parametrize("looks", [LOOKS, pytest.param(MORE_LOOKS, marks=pytest.mark.full)])
@pytest.mark.parametrize("state", ["empty", "furnished"])
def test_pages_hinder_nobody(world: World, visit: Visit, axe: str, state: str, looks: list[tuple[int, str]]) -> None:
    agent = furnished(world) if state == "furnished" else None
    found = looked_at(visit(), axe, pages(agent), state, looks)
    assert not found, json.dumps(found, indent=1)


def test_pages_work_by_keyboard(world: World, visit: Visit) -> None:
    agent, visitor = furnished(world), visit()
    found = {}
    for route in pages(agent):
        visitor.go(route)
        if wrong := by_keyboard(visitor):
            found[route] = wrong
    assert not found, json.dumps(found, indent=1)


def test_pages_are_small(world: World, visit: Visit) -> None:
    agent, visitor = furnished(world), visit()
    for route in pages(agent):
        before = visitor.loaded
        visitor.page.goto("about:blank")
        visitor.page.goto(f"{world.url}/dashboard/#/{route}")
        visitor.page.wait_for_selector("main h1")
        visitor.page.wait_for_load_state("load")
        assert 2_000 < visitor.loaded - before < MAX_BYTES


def test_the_way_in_hinders_nobody(world: World, visit: Visit, axe: str) -> None:
    visitor = visit(role=None)
    visitor.expected = ["status of 401"]  # it asks who is there
    visitor.page.goto(f"{world.url}/")
    visitor.page.wait_for_selector("main > h1:has-text('Sign in')")
    found = {}
    for width, scheme in LOOKS + MORE_LOOKS:
        visitor.look(width, scheme)
        visitor.picture(f"login-{width}-{scheme}")
        found[f"{width} {scheme}"] = faults(visitor, axe)
    assert not any(found.values()), json.dumps(found, indent=1)
    assert not by_keyboard(visitor)
