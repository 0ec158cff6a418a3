"""The pages as a person uses them: a server with the packaged model, and Playwright's Chromium.

The browser is the system's own, which ``find_browser`` finds; Playwright brings only the driver.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import pytest
from browser_support import find_browser
from live_server import Live, live_server
from playwright.sync_api import Browser, Page, expect, sync_playwright

needs_browser = pytest.mark.skipif(
    find_browser() is None,
    reason="no Chromium is installed; install one, or name it in TEGULA_BROWSER",
)
expect.set_options(timeout=30_000)
_BY_LOOKS = ["color-contrast", "scrollable-region-focusable", "link-in-text-block"]
_WAYS_TO_LOOK: tuple[tuple[Literal["light", "dark"], int, list[str] | None], ...] = (
    ("light", 360, None),
    ("dark", 360, _BY_LOOKS),
    ("dark", 1600, None),
    ("light", 1600, _BY_LOOKS),
)
"""Colours, widths and the rules of axe, all if None: in half of them, those that see a change."""


@pytest.fixture(scope="module")
def workbench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server that runs the packaged model on the processor."""
    with live_server(tmp_path_factory.mktemp("server"), packaged_model=True) as server:
        yield server


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """The system's browser; closed with the module, because its loop lets no other run beside."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_browser(), args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    """A tab of a browser that nobody has used; a page that complains fails the test.

    Answers of 4xx and 5xx are no complaints: pages say them in sentences of their own.
    """
    context = chromium.new_context(viewport={"width": 1100, "height": 900})
    tab = context.new_page()
    said: list[str] = []
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("console", lambda line: said.append(line.text) if line.type == "error" else None)
    yield tab
    context.close()
    assert [text for text in said if "Failed to load resource" not in text] == []


def open_signed_in(page: Page, live: Live, path: str = "/") -> None:
    """Open a page, signed in as ``tegula serve --demo`` does it."""
    page.goto(f"{live.url}/#token={live.token}")
    expect(page.locator("#sign-out")).to_be_visible()
    if path != "/":
        page.goto(f"{live.url}{path}")


@cache
def _axe() -> str:
    return (Path(str(files("axe_playwright_python"))) / "axe.min.js").read_text(encoding="utf-8")


def findings(page: Page, rules: list[str] | None = None) -> list[str]:
    """What axe finds on a page as it is now, a line each."""
    if not page.evaluate("typeof window.axe === 'object'"):
        page.evaluate(_axe())
    options: dict[str, Any] = {"resultTypes": ["violations"]}
    if rules is not None:
        options["runOnly"] = rules
    answer: dict[str, Any] = page.evaluate("options => axe.run(document, options)", options)
    return [
        f"{found['id']}: {found['help']}: {json.dumps([one['target'] for one in found['nodes']])}"
        for found in answer["violations"]
    ]


def check_accessible(page: Page) -> None:
    """Fail on whatever axe finds, and where a narrow page scrolls sideways, in all ways to look."""
    before = page.viewport_size
    for scheme, width, rules in _WAYS_TO_LOOK:
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 900})
        found = findings(page, rules)
        assert not found, f"{scheme}, {width} px: {found}"
        assert page.evaluate("document.documentElement.scrollWidth") <= width, (scheme, width)
    page.emulate_media(color_scheme="light")
    page.set_viewport_size(before or {"width": 1100, "height": 900})
