"""The pages as a person uses them: a server with the packaged model, and Playwright's Chromium.

The browser is the system's own, which ``find_browser`` finds; Playwright brings only the driver.
"""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from api_support import DATA_URI
from browser_support import find_browser
from live_server import Live, live_server
from PIL import Image
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Error,
    FilePayload,
    Page,
    Route,
    expect,
    sync_playwright,
)

from tegula.server.db import new_id
from tegula.server.tables import FileRecord, Prediction, State

needs_browser = pytest.mark.skipif(
    find_browser() is None,
    reason="no Chromium is installed; install one, or name it in TEGULA_BROWSER",
)
PATIENCE_MS = 300_000
"""Only a failing test waits for so long: a machine may be busy with other things, too."""

expect.set_options(timeout=PATIENCE_MS)
_BY_LOOKS = ["color-contrast", "scrollable-region-focusable", "link-in-text-block"]
_WAYS_TO_LOOK: tuple[tuple[Literal["light", "dark"], int, list[str] | None], ...] = (
    ("light", 360, None),
    ("dark", 360, _BY_LOOKS),
    ("dark", 1600, None),
    ("light", 1600, _BY_LOOKS),
)
"""Colours, widths and the rules of axe, all if None: in half of them, those that see a change."""


@pytest.fixture(scope="session")
def workbench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server that runs the packaged model on the processor, which is loaded already.

    A busy machine takes longer to load it than a test would wait for a picture.
    """
    with live_server(tmp_path_factory.mktemp("server"), packaged_model=True) as server:
        first, end = ask(server, preset="fast"), time.monotonic() + 600
        while server.store.predictions.get(first).status is not State.SUCCEEDED:
            assert time.monotonic() < end, server.store.predictions.get(first)
            time.sleep(0.05)
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


@pytest.fixture(scope="module")
def tab(chromium: Browser) -> Iterator[Page]:
    """The tab that the tests of a module share.

    A tab of its own for each test would start processes and read all scripts anew, which took
    more processor time than most tests do.
    """
    context = chromium.new_context()
    context.set_default_timeout(PATIENCE_MS)
    yield context.new_page()
    context.close()


@pytest.fixture
def page(tab: Page) -> Iterator[Page]:
    """The tab, signed out and as good as new; a page that complains fails the test.

    Answers of 4xx and 5xx are no complaints: pages say them in sentences of their own. A test
    takes off the listeners that it puts on the tab, and detaches its DevTools sessions.
    """
    tab.set_viewport_size({"width": 1100, "height": 900})
    tab.emulate_media(color_scheme="light")
    said: list[str] = []

    def hear_error(error: Error) -> None:
        said.append(str(error))

    def hear_line(line: ConsoleMessage) -> None:
        if line.type == "error":
            said.append(line.text)

    tab.on("pageerror", hear_error)
    tab.on("console", hear_line)
    yield tab
    tab.evaluate("sessionStorage.clear()")
    tab.remove_listener("pageerror", hear_error)
    tab.remove_listener("console", hear_line)
    tab.unroute_all(behavior="ignoreErrors")
    for other in tab.context.pages:
        if other is not tab:
            other.close()
    tab.goto("about:blank")  # so that it asks no server any more
    tab.context.clear_cookies()
    said = [text for text in said if "Failed to load resource" not in text]
    assert not said, said


def open_signed_in(page: Page, live: Live, path: str = "/") -> None:
    """Open a page, signed in as ``tegula serve --demo`` does it."""
    page.goto(f"{live.url}/#token={live.token}")
    expect(page.locator("#sign-out")).to_be_visible()
    if path != "/":
        page.goto(f"{live.url}{path}")


def choose(page: Page, *files: tuple[str, bytes]) -> None:
    """Choose files on the form, by their names and contents."""
    expect(page.locator("#upscale-form")).to_be_visible()
    chosen: list[FilePayload] = [
        {"name": name, "mimeType": "", "buffer": content} for name, content in files
    ]
    page.locator("#file").set_input_files(chosen)


def open_form(page: Page, live: Live, picture: tuple[str, bytes]) -> Page:
    """Open the form with a picture and the preset that takes the least time."""
    open_signed_in(page, live)
    choose(page, picture)
    page.get_by_role("radio", name="fast").check()
    expect(page.locator("#go")).to_be_enabled()
    return page


def run(page: Page, live: Live) -> Prediction:
    """Press the button; return the prediction that came of it, once it is done."""
    page.locator("#go").click()
    page.wait_for_url("**/p/*")
    expect(page.locator("#state")).to_have_text("Done")
    return live.store.predictions.get(page.url.rsplit("/", 1)[1])


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind, compress_level=1)
    return file.getvalue()


def pattern(width: int, height: int) -> Image.Image:
    """Colours by which a pixel can be told from its neighbours."""
    across = Image.linear_gradient("L").rotate(90).resize((width, height))
    down = Image.linear_gradient("L").resize((width, height))
    dots = Image.effect_noise((64, 64), 80).resize((width, height), Image.Resampling.NEAREST)
    return Image.merge("RGB", (across, down, dots))


LOGS = """Expected to take about 12 s.
mini does not know and ignores: wombat.
 42%|####      | 42/100 [00:05<00:07]
"""


def done(live: Live, source: bytes, result: bytes, name: str = "holiday.png") -> str:
    """A prediction that is done, without any work; its id."""
    store, now = live.store, datetime.now(timezone.utc)
    account, made = store.accounts.ensure("ana").id, new_id(now)

    row = Prediction(
        made,
        account,
        "tegula/upscale",
        "0" * 64,
        {},
        now,
        status=State.SUCCEEDED,
        source="web",
        started_at=now,
        completed_at=now,
        predict_seconds=3.2,
        logs=LOGS,
    )
    with store.database.write() as session:
        session.add(row)

    # Files that come before their prediction would be those of one that is gone, and expire.
    def keep(name: str, data: bytes) -> dict[str, Any]:
        file: FileRecord = store.files.keep(account, name, data, prediction_id=made)
        return store.files.reference(file)

    image, output = keep(name, source), keep("out-0.png", result)
    with store.database.write() as session:
        row = session.get_one(Prediction, made)
        row.input = {"image": image, "scale": 2, "preset": "creative", "seed": 7}
        row.output = [output]
    return made


def ask(live: Live, prompt: str = "", **inputs: str) -> str:
    """A prediction that the engine works on; its id."""
    given = {"image": DATA_URI, "prompt": prompt, **inputs}
    body = {"version": "tegula/upscale", "input": given}
    headers = {"authorization": f"Bearer {live.token}", "origin": live.url}
    answer = httpx.post(f"{live.url}/v1/predictions", json=body, headers=headers, timeout=300)
    return str(answer.json()["id"])


class Held:
    """Requests of a page to an address that do not arrive before they are released."""

    def __init__(self, page: Page, address: str | re.Pattern[str]) -> None:
        self._page, self._released = page, False
        self._routes: list[Route] = []
        page.route(address, self._take)

    def _take(self, route: Route) -> None:
        if self._released:
            route.continue_()
        else:
            self._routes.append(route)

    def wait(self, count: int = 1) -> None:
        """Wait until so many are on their way."""
        while len(self._routes) < count:
            self._page.wait_for_timeout(20)

    def release(self) -> None:
        """Let them and all that follow arrive."""
        self._released = True
        for route in self._routes:
            route.continue_()


def seen(page: Page) -> dict[str, Any]:
    """What the viewer shows, once all of it is there."""
    expect(page.locator(".viewer[data-pending='0']")).to_be_visible()
    page.wait_for_function("() => new Promise((go) => requestAnimationFrame(() => go(true)))")
    data = page.locator(".viewer").evaluate("(one) => ({ ...one.dataset })")
    return {k: float(v) if k in ("zoom", "x", "y", "cut") else v for k, v in data.items()}


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
