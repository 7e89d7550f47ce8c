"""A dashboard that stays open: it follows the router through everything, without being loaded again."""

import re

import pytest
from fakes.browser import Visit
from fakes.world import World
from playwright.sync_api import expect

from xim_agent.router.dashboard import sessions
from xim_agent.router.jobs import Limits

FETCHING = {"stage": "fetch", "done": 1_300_000_000, "total": 5_000_000_000, "rate": 95e6, "text": ""}
STARTING = {"stage": "engine", "done": 14, "total": 0, "rate": 0.0, "text": "loading weights"}
# What the browser itself writes into the console when a request fails.
LOST = ["Failed to load resource: net::ERR_", "status of 401"]


def test_a_router_that_restarts_is_found_again(world: World, visit: Visit) -> None:
    world.agent("node")
    visitor = visit()
    visitor.expected = LOST
    visitor.page.evaluate("window.same = true")
    world.down()
    expect(visitor.page.locator("#link")).to_contain_text("lost")
    visitor.page.click("nav >> text=Models")
    expect(visitor.page.locator("main")).to_contain_text("comes when it does")
    world.up()
    expect(visitor.page.locator("main h1")).to_have_text("Models")
    visitor.go("agents")
    newcomer = world.agent("newcomer")
    expect(visitor.page.locator("main")).to_contain_text("newcomer")
    assert visitor.page.evaluate("window.same")
    newcomer.kill()


@pytest.mark.parametrize("world", [Limits(grace=0.0, disconnected=2.0, dead=4.0)], indirect=True)
def test_an_agent_is_shown_as_it_lives_and_dies(world: World, visit: Visit) -> None:
    """To two people alike, who load nothing again; what takes the router minutes takes it seconds here."""
    world.publish("toy")
    visitors = [visit(), visit(role="read-only")]
    agent = world.agent("node", living=False)

    def all_show(text: str) -> None:
        for visitor in visitors:
            expect(visitor.page.locator("main tbody tr")).to_contain_text(text)

    all_show("pending")
    agent.says = {"phase": "starting", "capacity": 0, "model": None, "progress": FETCHING}
    agent.wake()
    all_show("online")
    all_show("fetching 1.3 GB of 5.0 GB")
    agent.says = {"phase": "starting", "capacity": 0, "model": None, "progress": STARTING}
    all_show("loading weights")
    agent.says = {}
    all_show("ready")
    agent.kill()
    all_show("disconnected")
    all_show("dead")


def test_what_one_does_the_other_sees(world: World, visit: Visit) -> None:
    """By keyboard: a dialog takes the focus, keeps it, is left by Escape without harm, and gives the focus back."""
    agent = world.agent("node")
    one, other = visit(), visit()
    one.go(f"agents/{agent.id}")
    button = one.page.get_by_role("button", name="Suspend")
    button.focus()
    one.page.keyboard.press("Enter")
    dialog = one.page.get_by_role("dialog")
    expect(dialog).to_contain_text("node")
    for _ in range(4):
        assert one.page.evaluate("document.activeElement === document.body || document.activeElement.closest('dialog')")
        one.page.keyboard.press("Tab")
    one.page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(button).to_be_focused()
    expect(other.page.locator("main tbody tr")).to_contain_text("online")
    one.page.keyboard.press("Enter")
    dialog.get_by_role("button", name="Suspend").press("Enter")
    expect(one.page.get_by_role("button", name="Resume")).to_be_focused()
    expect(other.page.locator("main tbody tr")).to_contain_text("suspended")
    one.remove(agent.id)
    expect(other.page.locator("main .empty")).to_be_visible()


def test_a_question_is_answered_for_itself_alone(visit: Visit) -> None:
    """A browser tells that a dialog was closed with its next frame, and the next question may be open by then."""
    asked = visit().page.evaluate("""async () => {
        const { confirmed } = await import("/dashboard/core.js");
        const frame = () => new Promise(requestAnimationFrame);
        const dialog = document.getElementById("dialog"), answers = [];
        for (const chosen of ["no", "yes", "no", "yes"]) {
            answers.push(confirmed(chosen, "", "Do"));
            dialog.close(chosen);
        }
        answers.push(confirmed("last", "", "Do"));
        await frame().then(frame);
        dialog.close("yes");
        return Promise.all(answers);
    }""")
    assert asked == [False, True, False, True, True]


def test_a_session_that_ended_shows_the_way_back(world: World, visit: Visit) -> None:
    visitor = visit()
    visitor.expected = LOST
    world.run_sync(sessions.revoke, world.bench.store.db)
    expect(visitor.page.locator("main h1")).to_have_text("Sign in")
    expect(visitor.page.locator("main")).to_contain_text("router admin-link")
    visitor.page.goto(world.link())
    visitor.wait_live()
    expect(visitor.page.locator("main h1")).to_have_text("Agents")


def test_a_link_works_once_and_is_not_kept_in_the_history(world: World, visit: Visit) -> None:
    first, second = visit(role=None), visit(role=None)
    second.expected = ["status of 40[13]"]
    first.expected = ["status of 401"]
    link = world.link()
    first.page.goto(link)
    first.wait_live()
    assert first.page.url.endswith("#/agents")
    second.page.goto(link)
    expect(second.page.locator("main")).to_contain_text("used already")
    assert "login" not in second.page.url


def test_who_may_only_look_changes_nothing(world: World, visit: Visit) -> None:
    """Whatever can be clicked on any page, nothing is written; and the router refuses what would write."""
    agent = world.agent("node")
    world.publish("toy")
    visitor = visit(role="read-only")
    visitor.expected = ["status of 403"]
    written: list[str] = []
    visitor.context.on("request", lambda r: written.append(f"{r.method} {r.url}") if r.method != "GET" else None)
    for route in ("agents", f"agents/{agent.id}", "join", "models", "keys", "try"):
        visitor.go(route)
        buttons = visitor.page.locator("main :is(button, input[type=submit]):visible")
        for number in range(buttons.count()):
            button = buttons.nth(number)
            if button.is_visible() and button.is_enabled():
                button.click()
                visitor.page.keyboard.press("Escape")
        for field in visitor.page.locator("main :is(input:not([type]), input[type=text], textarea):visible").all():
            if field.is_enabled() and field.is_editable():
                field.fill("x")
                field.press("Enter")
    assert not written
    refused = visitor.page.evaluate(
        _WRITE, [re.sub(r"{\w+}", agent.id, path) for path in world.bench.router.dashboard.writes]
    )
    assert refused
    assert set(refused) == {"403 read_only"}


_HIDE = """hidden => {
  Object.defineProperty(document, "hidden", {value: hidden, configurable: true})
  document.dispatchEvent(new Event("visibilitychange"))
}"""
_WRITE = """async (paths) => {
  const {csrf} = await (await fetch("/dashboard/api/session")).json()
  const headers = {"content-type": "application/json", "x-csrf-token": csrf}
  return Promise.all(paths.map(async (path) => {
    const reply = await fetch(path, {method: "POST", headers, body: "{}"})
    return `${reply.status} ${(await reply.json()).error?.code}`
  }))
}"""


def test_a_page_that_was_hidden_shows_what_happened_meanwhile(world: World, visit: Visit) -> None:
    """Tabs behind others take no connection; those in front again are up to date at once."""
    visitor = visit()
    visitor.wait_live()
    hide = (
        "hidden => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});"
        " document.dispatchEvent(new Event('visibilitychange')) }"
    )
    visitor.page.evaluate(hide, True)
    feed = world.bench.router.dashboard.feed
    visitor.wait("it has let go", lambda: feed.open == 0)
    world.agent("newcomer")
    visitor.page.evaluate(_HIDE, False)
    expect(visitor.page.locator("main")).to_contain_text("newcomer")
