"""Pictures of the pages in each of their states: ``python -m docs.screenshots [FOLDER]``.

It starts ``tegula serve --demo`` with the packaged model, does what a person does in the Chromium
of this system, and writes each state in light and dark, 360 and 1600 pixels wide, into a folder
(``build/screenshots``). The few that the documentation shows are then written to ``docs/pictures``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import socket

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).parents[1]
SHOWN = {"result-1600-light": "page-result.jpg", "history-1600-dark": "page-history.jpg"}
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_WIDTHS = (360, 1600)
_PATIENCE_MS = 300_000


@contextmanager
def demo() -> Iterator[str]:
    """Serve; yield the address that signs a browser in."""
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tegula", "serve", "--demo", "--port", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)  # noqa: S603 - our own
    try:
        if server.stderr is None:
            raise SystemExit("The server has no output.")
        for line in server.stderr:
            if found := re.search(r"http://\S+#token=\S+", line):
                yield found[0]
                return
        raise SystemExit("The server did not start.")
    finally:
        server.terminate()
        server.communicate()


def look(page: Page, folder: Path, state: str) -> None:
    """Write a state as it is now, in all ways to look."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        for width in _WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(300)
            page.screenshot(path=folder / f"{state}-{width}-{scheme}.png", full_page=True)
    page.emulate_media(color_scheme="light")


def walk(page: Page, address: str, folder: Path) -> None:
    """Do what a person does, and look at each state."""
    base = address.partition("/#")[0]
    page.goto(base)
    expect(page.get_by_label("Token")).to_be_visible()
    look(page, folder, "sign-in")
    page.goto(address)  # the page sees that the address has a token now
    expect(page.locator("#go")).to_be_visible()
    look(page, folder, "home")
    with tempfile.TemporaryDirectory() as temporary:
        picture = Path(temporary) / "cat.jpg"
        Image.open(ROOT / "examples" / "cat.jpg").resize((480, 360)).save(picture, quality=92)
        page.locator("input[type=file]").first.set_input_files(picture)
        look(page, folder, "chosen")
        page.locator("#go").click()
        expect(page.locator("#preview-words")).to_contain_text("sharper")
        look(page, folder, "running")
        expect(page.locator(".viewer[data-pending='0']")).to_be_visible()
        look(page, folder, "result")
        stage = page.locator(".viewer .stage")
        for key, state in (("4", "close"), ("s", "sides")):
            stage.focus()
            page.keyboard.press(key)
            expect(page.locator(".viewer[data-pending='0']")).to_be_visible()
            look(page, folder, state)
        loupe(page, folder)
    page.goto(f"{base}/p/nothing")
    expect(page.locator("#page-error")).not_to_be_empty()
    look(page, folder, "missing")
    for name in ("history", "catalog", "docs"):
        page.goto(f"{base}/{name}", wait_until="networkidle")
        look(page, folder, name)
    failed(page, base, folder)
    several(page, base, folder)


def failed(page: Page, base: str, folder: Path) -> None:
    """Ask for a picture that is nowhere."""
    page.goto(base)
    page.get_by_label("Address of a picture").fill("https://nowhere.invalid/holiday.jpg")
    page.get_by_role("button", name="Take it").click()
    page.locator("#go").click()
    expect(page.locator("#state")).to_have_text("Failed")
    look(page, folder, "failed")


def loupe(page: Page, folder: Path) -> None:
    """Hold a finger on the picture."""
    page.keyboard.press("c")
    page.keyboard.press("0")
    stage = page.locator(".viewer .stage")
    page.set_viewport_size({"width": _WIDTHS[0], "height": 900})
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    if box is None:
        raise SystemExit("The viewer is not shown.")
    touch = page.context.new_cdp_session(page)
    touch.send("Emulation.setTouchEmulationEnabled", {"enabled": True})
    points = [{"x": box["x"] + 260, "y": box["y"] + 120}]
    touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": points})
    expect(page.locator(".viewer[data-loupe=true]")).to_be_visible()
    look(page, folder, "loupe")
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    touch.send("Emulation.setTouchEmulationEnabled", {"enabled": False})


def several(page: Page, base: str, folder: Path) -> None:
    """Send several pictures; look at all of them, and at one that is cancelled."""
    page.goto(base)
    expect(page.locator("#upscale-form")).to_be_visible()
    with tempfile.TemporaryDirectory() as temporary:
        pictures = [Path(temporary) / f"{name}.jpg" for name in ("beach", "harbour", "holiday")]
        source = Image.open(ROOT / "examples" / "cat.jpg").resize((480, 360))
        for picture in pictures:
            source.save(picture, quality=92)
        page.locator("#file").set_input_files(pictures)
        page.locator("#go").click()
        links = page.locator("#batch a[href*='/p/']")
        expect(links).to_have_count(len(pictures))
        look(page, folder, "several")
        page.goto(str(links.last.evaluate("(link) => link.href")))
    page.locator("#cancel").click()
    expect(page.locator("#state")).to_have_text("Cancelled")
    look(page, folder, "cancelled")


def main(words: list[str]) -> None:
    """Write all states, and those of the documentation."""
    folder = Path(words[0]) if words else ROOT / "build" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    found = (shutil.which(name) for name in (os.environ.get("TEGULA_BROWSER", ""), *_BROWSERS))
    browser = next((path for path in found if path), None)
    if browser is None:
        raise SystemExit("No Chromium is installed; install one, or name it in TEGULA_BROWSER.")
    with demo() as address, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        context = chromium.new_context(locale="en-GB", timezone_id="Europe/London")
        context.set_default_timeout(_PATIENCE_MS)
        expect.set_options(timeout=_PATIENCE_MS)
        walk(context.new_page(), address, folder)
        chromium.close()
    for state, name in SHOWN.items():
        picture = Image.open(folder / f"{state}.png").convert("RGB")
        picture.crop((0, 0, picture.width, min(picture.height, 1300))).resize(
            (1000, round(1000 * min(picture.height, 1300) / picture.width))
        ).save(ROOT / "docs" / "pictures" / name, quality=88)


if __name__ == "__main__":
    main(sys.argv[1:])
