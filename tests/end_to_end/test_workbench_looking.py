"""Looking at a picture: as it grows, and closely beside its source."""

from __future__ import annotations

from typing import Any

import pytest
from api_support import PNG
from live_server import Live, live_server
from playwright.sync_api import Page, expect
from workbench import (
    ask,
    check_accessible,
    done,
    encoded,
    findings,
    needs_browser,
    open_signed_in,
    pattern,
    seen,
)

from tegula.server.tables import State

pytestmark = [pytest.mark.slow, needs_browser]


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    with live_server(tmp_path_factory.mktemp("server")) as server:
        yield server


def colours(page: Page, x: int, y: int, width: int, height: int) -> list[list[int]]:
    """Pixels of the viewer, row by row."""
    flat = page.locator(".viewer canvas").evaluate(
        "(one, box) => [...one.getContext('2d').getImageData(...box).data]", [x, y, width, height]
    )
    return [flat[start : start + 3] for start in range(0, len(flat), 4)]


def test_source_and_result_share_one_zoom_and_place_by_mouse_and_keys(page: Page, live: Live):
    result = pattern(1600, 1200)
    made = done(live, encoded(result.resize((800, 600))), encoded(result))
    open_signed_in(page, live, f"/p/{made}")
    fitted = seen(page)
    assert (fitted["mode"], fitted["x"], fitted["y"]) == ("slider", 800, 600)
    assert fitted["zoom"] < 1
    stage = page.locator(".viewer .stage")
    box = stage.bounding_box()
    assert box is not None
    stage.focus()
    page.keyboard.press("1")
    assert seen(page)["zoom"] == 1
    page.keyboard.press("4")
    close = seen(page)
    assert close["zoom"] == 4
    page.keyboard.press("ArrowRight")
    assert seen(page)["x"] == close["x"] + 16
    page.keyboard.press("f")
    page.keyboard.press("f")
    assert seen(page)["shows"] == "after"
    # At 400 % a pixel is a square of one colour, and exactly the file's.
    left = (close["x"] + 16) - box["width"] / 8
    top = close["y"] - box["height"] / 8
    across, down = 40, 40
    offset = (round((int(left) + across - left) * 4), round((int(top) + down - top) * 4))
    square = colours(page, *offset, 4, 4)
    assert square == [list(result.getpixel((int(left) + across, int(top) + down)))] * 16
    page.keyboard.press("f")
    flipped = seen(page)
    assert (flipped["shows"], flipped["zoom"], flipped["x"]) == ("before", 4, close["x"] + 16)
    check_accessible(page)
    page.keyboard.press("s")
    assert seen(page)["mode"] == "sides"
    check_accessible(page)
    page.keyboard.press("c")
    page.mouse.move(box["x"] + 300, box["y"] + 200)
    page.mouse.wheel(0, -400)
    assert seen(page)["zoom"] > 4
    before = seen(page)
    page.mouse.move(box["x"] + 200, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 100, box["y"] + 60, steps=3)
    page.mouse.up()
    moved = seen(page)
    assert moved["x"] == pytest.approx(before["x"] + 100 / before["zoom"], abs=0.5)
    stage.focus()
    page.keyboard.press("0")
    assert seen(page)["zoom"] == fitted["zoom"]
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 50)
    page.mouse.down()
    page.mouse.up()
    assert seen(page)["cut"] < 0.5
    facts = page.locator("#facts").inner_text()
    for words in (
        "1600 \u00d7 1200 px, PNG",
        "holiday.png, 800 \u00d7 600 px",
        "3.2 s",
        "7",
        "creative",
    ):
        assert words in facts
    check_accessible(page)


def test_a_small_result_is_shown_at_its_own_size(page: Page, live: Live):
    result = pattern(60, 40)
    open_signed_in(
        page, live, f"/p/{done(live, encoded(result.resize((30, 20))), encoded(result))}"
    )
    assert seen(page)["zoom"] == 1
    notes = page.get_by_role("list", name="What the model says of it").get_by_role("listitem")
    expect(notes).to_have_text(["mini does not know and ignores: wombat."])


def test_fingers_pinch_and_a_long_touch_opens_the_loupe(chromium: Any, live: Live):
    result = pattern(1600, 1200)
    made = done(live, encoded(result.resize((800, 600))), encoded(result))
    context = chromium.new_context(
        viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True
    )
    page = context.new_page()
    open_signed_in(page, live, f"/p/{made}")
    start = seen(page)
    page.locator(".viewer .stage").scroll_into_view_if_needed()
    box = page.locator(".viewer .stage").bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    touch = context.new_cdp_session(page)

    def send(kind: str, *points: tuple[float, float]) -> None:
        shown = [{"x": px, "y": py, "id": number} for number, (px, py) in enumerate(points)]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": shown})

    send("touchStart", (x - 20, y), (x + 20, y))
    for apart in (30, 45, 60):
        send("touchMove", (x - apart, y), (x + apart, y))
    send("touchEnd")
    assert seen(page)["zoom"] > 2 * start["zoom"]
    send("touchStart", (x, y))
    expect(page.locator(".viewer[data-loupe=true]")).to_be_visible()
    send("touchMove", (x + 20, y + 5))
    expect(page.locator(".viewer[data-loupe=true]")).to_be_visible()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert findings(page) == [], scheme
    expect(page.locator(".viewer[data-loupe=true]")).to_be_visible()
    send("touchEnd")
    expect(page.locator(".viewer[data-loupe=false]")).to_be_visible()
    context.close()


def work_of_moving(page: Page, live: Live, side: int) -> float:
    """The seconds that the page computes while a result of so many pixels a side moves.

    They are of its thread's own clock, which stands still while other programs run. The longest
    task, by the clock on the wall, is printed.
    """
    made = done(live, encoded(pattern(side // 8, side // 8)), encoded(pattern(side, side)))
    page.goto(f"{live.url}/p/{made}")
    if side > 4096:
        expect(page.locator("#output")).to_contain_text("prepared")
    expect(page.locator(".viewer")).to_be_visible()
    seen(page)
    box = page.locator(".viewer .stage").bounding_box()
    assert box is not None
    page.locator(".viewer .stage").focus()
    page.keyboard.press("1")
    page.mouse.move(box["x"] + 700, box["y"] + 400)
    seen(page)
    tab = page.context.new_cdp_session(page)
    tab.send("Performance.enable", {"timeDomain": "threadTicks"})

    def worked() -> float:
        metrics = tab.send("Performance.getMetrics")["metrics"]
        return next(one["value"] for one in metrics if one["name"] == "TaskDuration")

    page.evaluate(
        """() => { window.tasks = [0]; new PerformanceObserver((list) => {
        for (const one of list.getEntries()) window.tasks.push(one.duration); })
        .observe({ entryTypes: ['longtask'] }); }"""
    )
    before = worked()
    for _ in range(3):
        page.mouse.down()
        page.mouse.move(box["x"] + 100, box["y"] + 100, steps=20)
        page.mouse.up()
        page.mouse.move(box["x"] + 700, box["y"] + 400)
    assert seen(page)["x"] > side / 2
    page.mouse.wheel(0, 900)
    seen(page)
    work, longest = worked() - before, page.evaluate("Math.max(...window.tasks)")
    tab.detach()
    print(f"{side} x {side} moves: longest task {longest:.0f} ms, {work:.2f} s of work")  # noqa: T201
    return float(work)


def test_a_picture_of_67_megapixels_moves_as_smoothly_as_a_small_one(page: Page, live: Live):
    open_signed_in(page, live)
    small, large = (work_of_moving(page, live, side) for side in (2048, 8192))
    assert large < 3 * small


def test_a_picture_grows_while_it_runs_and_others_are_seen_and_cancelled(page: Page, live: Live):
    first, second, third = (ask(live, "gated") for _ in range(3))
    open_signed_in(page, live, f"/p/{first}")
    expect(page.get_by_alt_text("The picture so far")).to_be_visible()
    expect(page.locator("#preview-words")).to_have_text("So far; it becomes sharper.")
    assert page.locator("#logs").is_hidden()
    others = page.locator("#others-list > li")
    expect(others).to_have_count(2)
    expect(others.first).to_contain_text("One is before it; it starts")
    expect(others.last).to_contain_text("2 are before it")
    check_accessible(page)
    others.last.get_by_role("button", name="Cancel").click()
    expect(others).to_have_count(1)
    assert live.store.predictions.get(third).status is State.CANCELED
    other = page.context.new_page()
    other.goto(f"{live.url}/p/{second}")
    expect(other.locator("#status")).to_contain_text("One is before it")
    page.get_by_role("button", name="Cancel", exact=True).first.click()
    expect(page.locator("#state")).to_have_text("Cancelled")
    expect(page.get_by_alt_text("The picture so far")).to_be_hidden()
    expect(other.locator("#state")).to_have_text("Running")
    live.gate.set()
    expect(other.locator("#state")).to_have_text("Done")
    expect(other.locator(".viewer")).to_be_visible()
    live.gate.clear()


def test_a_result_that_nothing_decodes_can_still_be_downloaded(page: Page, live: Live):
    made = done(live, PNG, b"\x89PNG\r\n\x1a\nnothing")
    open_signed_in(page, live, f"/p/{made}")
    expect(page.locator("#output .error")).to_contain_text("picture")
    expect(page.get_by_role("link", name="Download")).to_be_visible()
