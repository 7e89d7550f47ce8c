"""Debian's chromium driven by Playwright: visitors of the dashboard, and what a sound page never does to them."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Dialog, Page, Request, expect, sync_playwright

CHROMIUM = "/usr/bin/chromium"
# It opens nothing but our own pages, and root has no sandbox to give it.
_FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
_VIOLATIONS = """document.addEventListener("securitypolicyviolation",
  (event) => console.error(`policy: ${event.violatedDirective} ${event.blockedURI}`))"""
WIDE, NARROW = 1440, 360
WAIT = 10_000.0  # ms; a busy machine is slow
expect.set_options(timeout=WAIT)


@contextmanager
def chromium() -> Iterator[Browser]:
    assert Path(CHROMIUM).exists(), f"{CHROMIUM} does not exist: run ./build/test"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        try:
            yield browser
        finally:
            browser.close()


Visit = Callable[..., "Visitor"]


class Visitor:
    """A browser context of its own with one page.

    `troubles`: dialogs of scripts, errors in the console, violations of the policy, requests to elsewhere. `expected`:
    patterns of those that a test provokes. `loaded`: bytes over the wire, with headers, of what has ended.
    """

    def __init__(self, browser: Browser, url: str, *, width: int = WIDE, scheme: str = "light", **more: Any) -> None:
        self.url = url
        self.troubles: list[str] = []
        self.expected: list[str] = []
        self.loaded = 0.0
        size = {"width": width, "height": 900}
        self.context = browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce", **more)  # type: ignore[arg-type]
        self.context.add_init_script(_VIOLATIONS)
        self.context.set_default_timeout(WAIT)
        self.page: Page = self.context.new_page()
        self.page.on("dialog", self._dialog)
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.troubles.append(f"error: {error}"))
        self.context.on("request", self._request)
        self.cdp = self.context.new_cdp_session(self.page)
        self.cdp.on("Network.loadingFinished", self._finished)
        self.cdp.send("Network.enable")

    def _dialog(self, dialog: Dialog) -> None:
        self.troubles.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning", "assert"):
            self.troubles.append(f"console: {message.text}")

    def _request(self, request: Request) -> None:
        if urlsplit(request.url).scheme != "data" and not request.url.startswith(self.url + "/"):
            self.troubles.append(f"elsewhere: {request.url}")

    def _finished(self, event: dict[str, Any]) -> None:
        self.loaded += event["encodedDataLength"]

    def unexpected(self) -> list[str]:
        return [trouble for trouble in self.troubles if not any(re.search(p, trouble) for p in self.expected)]

    def close(self) -> None:
        self.context.close()

    def go(self, route: str) -> None:
        """To a page by its route, `agents` or `agents/ID`; returns when it is shown."""
        address = f"{self.url}/dashboard/#/{route}"
        if self.page.url != address:
            self.page.evaluate("for (const e of document.querySelector('main').children) e.dataset.old = 'yes'")
            self.page.goto(address)
        self.wait_live()
        self.page.wait_for_selector("main > h1:not([data-old]):not(:has-text('Waiting for the router'))")

    def look(self, width: int, scheme: str = "light") -> None:
        self.page.set_viewport_size({"width": width, "height": 900})
        # A chart follows in the frame after the one that has the new width.
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        self.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]

    def wait_live(self) -> None:
        """Until the page has its data and follows the router."""
        self.page.wait_for_selector("#link:has-text('live')")

    def wait(self, what: str, check: Callable[[], Any]) -> Any:
        """Polls the page; the bound is a failure with a name."""
        for _ in range(int(WAIT / 50)):
            if found := check():
                return found
            self.page.wait_for_timeout(50)
        raise AssertionError(f"not within {WAIT / 1000:.0f} s: {what}\n{self.text}")

    def picture(self, name: str) -> None:
        """Kept in the folder that XIM_TEST_PICTURES names, to be looked at."""
        if folder := os.environ.get("XIM_TEST_PICTURES"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)

    @property
    def text(self) -> str:
        return self.page.inner_text("body")

    def make_join_key(self, way: str) -> list[str]:
        """What *Add an agent* shows then, for `way` (its id): what to run and to paste, in order."""
        self.go("join")
        self.page.get_by_role("button", name="Make a join key").click()
        self.page.get_by_label("How will it run?").select_option(way)
        return self.page.locator("ol.steps pre").all_inner_texts()

    def assign(self, model: str) -> None:
        """Gives it to all agents."""
        self.go("models")
        self.page.locator("main tbody tr", has_text=model).get_by_role("button", name="Assign").click()
        self.page.get_by_role("dialog").get_by_role("button", name="Assign").click()
        expect(self.page.locator("#notice")).to_contain_text("goes to all agents")

    def ask(self, words: str, model: str) -> str:
        """The answer of *Try it*, when it is complete."""
        self.go("try")
        expect(self.page.get_by_label("Model", exact=True)).to_contain_text(model)
        self.page.get_by_label("Message").fill(words)
        self.page.get_by_role("button", name="Send").click()
        expect(self.page.locator("#notice")).to_contain_text("complete")
        return self.page.locator(".turn.assistant .text").last.inner_text()

    def remove(self, agent: str) -> None:
        self.go(f"agents/{agent}")
        self.page.get_by_role("button", name="Remove").click()
        self.page.get_by_role("dialog").get_by_role("button", name="Remove").click()
        expect(self.page.locator("#notice")).to_contain_text("is removed")

    def overflow(self) -> list[str]:
        """What reaches over the window's right edge."""
        found: list[str] = self.page.evaluate(_OVERFLOW)
        return found


# A box that scrolls by itself may hold more than the window is wide, but only code does so: other texts are broken.
_OVERFLOW = """() => {
  const width = document.documentElement.clientWidth
  const wide = [...document.querySelectorAll("body *")].filter((e) => !e.closest("pre, thead, .skip")
    && e.checkVisibility({visibilityProperty: true}) && e.getBoundingClientRect().right > width + 1)
  if (document.scrollingElement.scrollWidth > width) wide.push(document.body)
  return wide.slice(0, 8).map((e) => `${e.tagName}.${e.className}: ${e.textContent.slice(0, 60)}`)
}"""
