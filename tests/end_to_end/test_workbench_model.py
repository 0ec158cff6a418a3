"""What a person does with the packaged model, from the file to the closest look."""

from __future__ import annotations

import pytest
from live_server import Live
from playwright.sync_api import Page, expect
from workbench import encoded, needs_browser, open_signed_in, pattern, seen

pytestmark = [pytest.mark.slow, needs_browser]
_NOTE_PREVIEWS = """
window.grown = [];
new MutationObserver((list) => list.forEach(({ target }) =>
  target.id === "preview" && window.grown.push(target.src.slice(0, 15)))
).observe(document, { subtree: true, attributes: true, attributeFilter: ["src"] });
"""


def test_a_picture_is_sent_grows_and_is_looked_at_closely(page: Page, workbench: Live):
    page.add_init_script(_NOTE_PREVIEWS)
    open_signed_in(page, workbench)
    grown = _sent(page, 96, 64)
    assert seen(page)["zoom"] == 1
    facts = page.locator("#facts")
    expect(facts).to_contain_text("192 \u00d7 128 px, PNG")
    expect(facts).to_contain_text("holiday.png, 96 \u00d7 64 px")
    expect(facts).to_contain_text("mini (tegula/upscale)")
    # A busy machine may be done with a small picture before its page is there.
    for width, height in ((240, 160), (480, 320)):
        if "data:image/jpeg" not in grown:
            page.goto(workbench.url)
            grown = _sent(page, width, height)
    assert "data:image/jpeg" in grown, grown


def _sent(page: Page, width: int, height: int) -> list[str]:
    """Send a picture, wait for its result; return how the addresses of its previews began."""
    picture = encoded(pattern(width, height))
    page.locator("input[type=file]").first.set_input_files(
        {"name": "holiday.png", "mimeType": "image/png", "buffer": picture}
    )
    page.locator("#go").click()
    expect(page.locator("#state")).to_have_text("Done", timeout=600_000)
    grown: list[str] = page.evaluate("window.grown")
    return grown
