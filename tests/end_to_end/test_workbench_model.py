"""What a person does with the packaged model, from signing in to the closest look and the history.

Drawing, crops and several files are in ``test_workbench_tools``, code in ``test_workbench_forms``.
"""

# ruff: noqa: RUF001 - the pages write sizes with a multiplication sign

from __future__ import annotations

from pathlib import Path

import pytest
from api_support import png
from live_server import Live
from PIL import Image
from playwright.sync_api import Page, expect
from workbench import (
    check_accessible,
    choose,
    encoded,
    needs_browser,
    open_form,
    open_signed_in,
    pattern,
    run,
    seen,
)

from tegula.server.tables import State

pytestmark = [pytest.mark.slow, needs_browser]


@pytest.fixture
def form(page: Page, workbench: Live) -> Page:
    """The form with a picture and the quickest preset."""
    return open_form(page, workbench, ("holiday.png", encoded(pattern(72, 48))))


def test_a_picture_grows_while_others_wait_and_each_can_be_cancelled(form: Page, workbench: Live):
    tabs = [form.context.new_page() for _ in range(2)]
    for tab, name in zip(tabs, ("second.png", "third.png"), strict=True):
        open_form(tab, workbench, (name, encoded(pattern(48, 48))))
    # Large enough to run until it is cancelled, on whatever machine.
    choose(form, ("large.png", encoded(pattern(512, 512))))
    form.get_by_role("button", name="8×").click()
    for tab in (form, *tabs):
        tab.locator("#go").click()
        tab.wait_for_url("**/p/*")
    first = form.url.rsplit("/", 1)[1]
    second, third = tabs
    expect(second.locator("#status")).to_contain_text("One is before it; it starts")
    expect(third.locator("#status")).to_contain_text("2 are before it; it starts")
    words = form.locator("#preview-words")
    expect(words).to_have_text("So far; it becomes sharper.", timeout=600_000)
    expect(form.get_by_alt_text("The picture so far")).to_have_js_property("complete", True)
    expect(form.locator("#logs")).to_be_hidden()
    expect(form.locator("#others-list > li")).to_have_count(2)
    form.get_by_role("button", name="Cancel third.png").click()
    expect(third.locator("#state")).to_have_text("Cancelled")
    form.reload()  # in the middle
    expect(form.locator("#state")).to_have_text("Running")
    form.locator("#cancel").click()
    expect(form.locator("#state")).to_have_text("Cancelled")
    expect(second.locator("#state")).to_have_text("Done")
    assert seen(second)["zoom"] == 1
    assert workbench.store.predictions.get(first).status is State.CANCELED


def test_a_result_is_looked_at_closely_and_saved(form: Page, workbench: Live):
    run(form, workbench)
    assert seen(form)["zoom"] == 1
    facts = form.locator("#facts")
    for words in ("144 × 96 px, PNG", "holiday.png, 72 × 48 px", "mini (tegula/upscale)", "fast"):
        expect(facts).to_contain_text(words)
    stage = form.locator(".viewer .stage")
    stage.focus()
    for key, shown in (
        ("4", {"zoom": 4}),
        ("f", {"mode": "flip", "shows": "before"}),
        ("f", {"shows": "after"}),
        ("s", {"mode": "sides"}),
        ("0", {"zoom": 1}),
    ):
        form.keyboard.press(key)
        assert shown.items() <= seen(form).items()
    check_accessible(form)
    with form.expect_download() as saved:
        form.get_by_role("link", name="Download").click()
    with Image.open(saved.value.path()) as result:
        assert result.size == (144, 96)


def test_a_result_leads_on_with_its_settings_and_as_the_next_picture(
    form: Page, workbench: Live, tmp_path: Path
):
    form.get_by_label("Prompt", exact=True).fill("a “cat”")
    form.locator("summary", has_text="More settings").click()
    form.get_by_label("Seed").fill("11")
    first = run(form, workbench)
    with form.expect_download() as saved:
        form.get_by_role("link", name="Download").click()
    saved.value.save_as(tmp_path / "result.png")
    form.go_back()
    expect(form.locator("#chosen")).to_contain_text("holiday.png · 72 × 48")
    expect(form.locator("#field-prompt")).to_have_value("a “cat”")
    form.go_forward()
    form.get_by_role("link", name="Again with other settings").click()
    expect(form.locator("#chosen")).to_contain_text("holiday.png · 72 × 48")
    form.locator("#field-scale").fill("1.5")
    again = run(form, workbench)
    changed = {name: first.input[name] for name in first.input if name not in ("image", "scale")}
    assert changed.items() <= again.input.items()
    expect(form.locator("#facts")).to_contain_text("108 × 72 px")
    form.get_by_role("link", name="Enlarge the result further").click()
    expect(form.locator("#chosen")).to_contain_text("108 × 72")
    expect(form.locator("#result-size")).to_have_text("The result has 216 × 144 pixels.")
    choose(form, ("result.png", (tmp_path / "result.png").read_bytes()))
    form.get_by_role("button", name="Use its settings").click()
    expect(form.locator("#field-prompt")).to_have_value("a “cat”")
    expect(form.locator("#field-seed")).to_have_value("11")
    expect(form.get_by_role("radio", name="fast")).to_be_checked()


def test_the_history_has_what_was_made_in_all_tabs(form: Page, workbench: Live):
    choose(form, ("harbour.png", encoded(pattern(64, 48))))
    run(form, workbench)
    form.goto(workbench.url)
    last = form.locator("#list > li").first
    expect(last.get_by_role("link")).to_have_text("harbour.png")
    expect(last).to_contain_text("done, 2×, fast")
    tabs = [form, form.context.new_page()]
    for tab in tabs:
        tab.goto(f"{workbench.url}/history")
        tab.get_by_label("Name").fill("harbour")
        expect(tab.locator("#predictions > li")).to_have_count(1)
    card = form.locator("#predictions > li")
    expect(card.locator("img")).not_to_have_js_property("naturalWidth", 0)
    expect(card).to_contain_text("done, 2×, fast")
    expect(card).to_contain_text("its data goes in")
    form.once("dialog", lambda dialog: dialog.accept())
    form.get_by_role("button", name="Remove harbour.png").click()
    for tab in tabs:
        expect(tab.locator("#predictions > li")).to_have_count(0)


def test_a_model_is_chosen_from_its_card_and_runs(page: Page, workbench: Live):
    open_signed_in(page, workbench, "/catalog")
    page.get_by_role("link", name="Use nightmareai/real-esrgan").click()
    page.wait_for_url("**/?model=*")
    choose(page, ("holiday.png", encoded(pattern(48, 32))))
    page.locator("#field-scale").fill("3")
    made = run(page, workbench)
    assert (made.model, made.input["scale"]) == ("nightmareai/real-esrgan", 3)
    expect(page.locator("#facts")).to_contain_text("144 × 96 px")


def test_what_does_not_fit_is_said_first_and_what_is_damaged_afterwards(
    form: Page, workbench: Live
):
    problem = form.locator("#problem")
    form.get_by_role("button", name="8×").click()
    choose(form, ("wall.png", png(4000, 3000)))
    expect(problem).to_contain_text("wall.png would become 32000 × 24000 pixels")
    expect(form.locator("#go")).to_be_disabled()
    form.get_by_role("button", name="Use ").click()
    expect(problem).to_be_empty()
    choose(form, ("letter.txt", b"Dear Ana"))
    expect(problem).to_contain_text("letter.txt is not a picture")
    choose(form, ("torn.png", encoded(pattern(64, 48))[:2000]))
    form.locator("#go").click()
    expect(form.locator("#state")).to_have_text("Failed")
    expect(form.locator("#error")).not_to_be_empty()
    form.get_by_role("link", name="Again with other settings").click()
    expect(form.locator("#chosen")).to_contain_text("torn.png")
    choose(form, ("holiday.png", encoded(pattern(48, 32))))
    form.locator("#field-scale").fill("2")
    run(form, workbench)


def test_a_browser_that_signed_in_once_makes_a_picture_in_any_tab(page: Page, workbench: Live):
    page.goto(workbench.url)
    page.get_by_label("Token").fill(workbench.token)
    page.get_by_role("button", name="Sign in").click()
    expect(page.locator("#upscale-form")).to_be_visible()
    tab = page.context.new_page()
    tab.goto(workbench.url)
    choose(tab, ("holiday.png", encoded(pattern(48, 32))))
    tab.get_by_role("radio", name="fast").check()
    run(tab, workbench)
    address = tab.url
    tab.get_by_role("button", name="Sign out").click()
    expect(tab.get_by_label("Token")).to_be_visible()
    page.goto(address)
    expect(page.get_by_label("Token")).to_be_visible()
    expect(page.locator("#shown")).to_be_hidden()
