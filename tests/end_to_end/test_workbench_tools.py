"""Drawing on the picture, trying on a crop, and several files, as a person does it in a browser.

With the packaged model, but for what a server rarely does: it breaks, is busy, or takes its time.
"""

from __future__ import annotations

import io
import re
import zipfile

import pytest
from api_support import PNG, png
from live_server import Live, live_server
from PIL import Image
from playwright.sync_api import FloatRect, Page, expect
from workbench import (
    Held,
    check_accessible,
    choose,
    encoded,
    needs_browser,
    open_form,
    open_signed_in,
    pattern,
    run,
)

pytestmark = [pytest.mark.slow, needs_browser]
CREATE = "**/v1/models/*/*/predictions"


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    with live_server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def quick(page: Page, live: Live) -> Page:
    """The form of a server with an engine of a few lines, with a picture chosen."""
    return open_form(page, live, ("photo.png", png(64, 48)))


@pytest.fixture
def form(page: Page, workbench: Live) -> Page:
    """The form of a server with the packaged model, with a picture chosen."""
    return open_form(page, workbench, ("photo.png", encoded(pattern(64, 48))))


def file_of(live: Live, prediction, name: str) -> Image.Image:
    """The picture that a prediction got for an input."""
    found = re.search(r"/files/(\w+)", str(prediction.input[name])) or re.search(
        r"'id': '(\w+)'|\"id\": \"(\w+)\"|(\w{20,})", str(prediction.input[name])
    )
    assert found, prediction.input[name]
    file = live.store.files.get(next(one for one in found.groups() if one))
    return Image.open(io.BytesIO(live.store.files.path(file).read_bytes())).convert("L")


def at_rest(page: Page, locator: str) -> FloatRect:
    """Where an element is, once it has a size and stays where it is."""
    before = None
    while (box := page.locator(locator).bounding_box()) != before or not (box and box["height"]):
        before = box
        page.wait_for_function("() => new Promise((go) => setTimeout(() => go(true), 100))")
    return box


def drag(page: Page, locator: str, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Drag over an element, from and to shares of it."""
    box = at_rest(page, locator)
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)]
    page.mouse.move(*places[0])
    page.mouse.down()
    page.mouse.move(*places[1], steps=3)
    page.mouse.up()


def test_a_mask_is_painted_by_the_brush_and_by_keys(form: Page, workbench: Live):
    form.locator("summary", has_text="More settings").click()
    form.locator("[data-input=mask]").click()
    expect(form.locator("#painting")).to_be_visible()
    check_accessible(form)
    form.locator("#brush-size").fill("10")
    drag(form, "#painting canvas", (0.1, 0.25), (0.9, 0.25))
    form.locator("#brush-strength").fill("50")
    drag(form, "#painting canvas", (0.1, 0.75), (0.9, 0.75))
    form.locator("#painting canvas").focus()
    for _ in range(20):
        form.keyboard.press("ArrowLeft")
    for _ in range(4):
        form.keyboard.press("ArrowUp")
    form.get_by_role("button", name="Undo").click()
    form.locator("#brush-strength").fill("50")
    drag(form, "#painting canvas", (0.1, 0.75), (0.9, 0.75))
    form.locator("#brush-strength").fill("100")
    form.locator("#painting canvas").focus()
    for _ in range(30):
        form.keyboard.press("ArrowLeft")
    form.keyboard.press("Space")
    form.get_by_role("button", name="Done").click()
    expect(form.locator("#fields")).to_contain_text("mask.png")
    mask = file_of(workbench, run(form, workbench), "mask")
    assert mask.size == (64, 48)
    assert mask.getpixel((32, 12)) == 255
    assert mask.getpixel((32, 36)) in (127, 128)
    assert mask.getpixel((32, 24)) == 0
    assert mask.getpixel((1, 36)) == 255  # by keys


def test_how_much_may_change_is_painted_by_the_brush(form: Page, workbench: Live):
    form.get_by_label("Creativity", exact=True).fill("0.8")
    form.locator("summary", has_text="More settings").click()
    form.locator("[data-input=strength_map]").click()
    expect(form.locator("#painting")).to_contain_text("a weaker brush lets it change less")
    check_accessible(form)
    form.locator("#brush-size").fill("16")
    drag(form, "#painting canvas", (0.1, 0.25), (0.9, 0.25))
    form.locator("#brush-strength").fill("30")
    drag(form, "#painting canvas", (0.1, 0.75), (0.9, 0.75))
    form.get_by_role("button", name="Invert").click()
    form.get_by_role("button", name="Undo").click()
    form.get_by_role("button", name="Done").click()
    expect(form.locator("#fields")).to_contain_text("strength_map.png")
    strength = file_of(workbench, run(form, workbench), "strength_map")
    places = ((32, 12), (32, 36), (32, 24), (1, 1))
    assert [strength.getpixel(place) for place in places] == [255, pytest.approx(76, abs=1), 0, 0]
    form.get_by_role("link", name="Again with other settings").click()
    expect(form.locator("#fields")).to_contain_text("the one of that prediction")


def test_regions_are_drawn_with_their_prompts(form: Page, workbench: Live):
    form.locator("summary", has_text="More settings").click()
    form.locator("[data-input=regions]").click()
    form.get_by_role("button", name="Add the region").click()
    expect(form.locator("#regions")).to_contain_text("Write what this part of the picture shows.")
    drag(form, "#regions .stage", (0.02, 0.02), (0.2, 0.2))  # outside of the first rectangle
    form.get_by_label("What this part shows").fill("a bird: small")
    form.keyboard.press("Enter")
    expect(form.get_by_role("button", name="Remove region 1")).to_be_visible()
    form.locator("#regions .box").focus()
    form.keyboard.press("ArrowRight")
    form.keyboard.press("Shift+ArrowDown")
    form.get_by_label("What this part shows").fill("grass")
    check_accessible(form)
    form.get_by_role("button", name="Done").click()
    lines = form.locator("#field-regions").input_value().split("\n")
    boxes = [[int(number) for number in line.split(":")[0].split(",")] for line in lines]
    assert boxes[0] == pytest.approx([1, 1, 12, 9], abs=2)
    assert boxes[1] == [boxes[0][0] + 1, boxes[0][1], boxes[0][2], boxes[0][3] + 1]
    assert [line.split(":", 1)[1] for line in lines] == ["a bird: small", "grass"]
    assert run(form, workbench).input["regions"] == "\n".join(lines)


def test_settings_are_tried_on_a_crop_and_a_cell_makes_the_whole(form: Page, workbench: Live):
    form.get_by_role("button", name="Try on a crop").click()
    drag(form, "dialog .stage", (0.5, 0.0), (0.5, 0.0))
    drag(form, "dialog .stage", (0.5, 0.5), (0.3, 0.3))
    form.locator("#try-kind").select_option("settings")
    form.locator("#try-2").select_option("")
    form.locator("#try-1-values").fill("0.3, 2")
    form.get_by_role("button", name="Make the grid").click()
    expect(form.locator("#try-error")).to_have_text("creativity lies between 0 and 1; 2 does not.")
    form.locator("#try-1-values").fill("0.3, 0.6")
    form.get_by_role("button", name="Make the grid").click()
    expect(form.locator("#try-status")).to_contain_text("2 of 2 done; choose one")
    check_accessible(form)
    sizes = form.locator("#grid img").evaluate_all("all => all.map(one => one.naturalWidth)")
    assert sizes[0] == sizes[1] < 128
    form.get_by_role("button", name="creativity 0.6").click()
    form.wait_for_url("**/p/*")
    expect(form.locator("#state")).to_have_text("Done")
    prediction = workbench.store.predictions.get(form.url.rsplit("/", 1)[1])
    assert prediction.input["creativity"] == 0.6
    assert "seed" not in prediction.input


def test_several_files_become_one_zip_under_the_names_of_their_sources(form: Page, tmp_path):
    folder = tmp_path / "holiday"
    (folder / "beach").mkdir(parents=True)
    (folder / "holiday.png").write_bytes(png(20, 20))
    (folder / "beach" / "holiday.png").write_bytes(png(16, 16))
    (folder / "notes.txt").write_text("no picture")
    form.locator("#folder").set_input_files(folder)
    expect(form.locator("#problem")).to_have_text("1 of 3 files will be left out.")
    check_accessible(form)
    form.get_by_role("button", name="Make 2 pictures larger").click()
    status = form.locator("#batch-status")
    expect(status).to_have_text("2 of 2 done.")
    form.reload()
    expect(status).to_have_text("2 of 2 done.")
    check_accessible(form)
    with form.expect_download() as saved:
        form.get_by_role("button", name="Download 2 as one zip").click()
    with zipfile.ZipFile(saved.value.path()) as archive:
        assert archive.testzip() is None
        sizes = {one: Image.open(archive.open(one)).size for one in archive.namelist()}
        assert sizes == {"holiday_2x-2.png": (40, 40), "holiday_2x.png": (32, 32)} or sizes == {
            "holiday_2x-2.png": (32, 32), "holiday_2x.png": (40, 40),
        }  # fmt: skip
    form.locator("#zip-format").select_option("jpg")
    form.locator("#zip-quality").fill("60")
    with form.expect_download() as saved:
        form.get_by_role("button", name="Download 2 as one zip").click()
    with zipfile.ZipFile(saved.value.path()) as archive:
        assert sorted(archive.namelist()) == ["holiday_2x-2.jpg", "holiday_2x.jpg"]
        assert {Image.open(archive.open(name)).format for name in archive.namelist()} == {"JPEG"}
    form.get_by_role("button", name="Close").click()
    expect(form.locator("#batch")).to_be_hidden()


def test_one_of_several_pictures_is_cancelled_and_the_others_go_on(quick: Page, live: Live):
    names = ("beach.png", "harbour.png", "hills.png")
    quick.locator("#file").set_input_files(
        [{"name": name, "mimeType": "", "buffer": png(20, 20)} for name in names]
    )
    quick.locator("#field-prompt").fill("gated")
    quick.get_by_role("button", name="Make 3 pictures larger").click()
    cancel = quick.get_by_role("button", name="Cancel harbour.png")
    expect(quick.locator("#batch li", has_text="harbour.png").get_by_role("link")).to_be_visible()
    check_accessible(quick)
    cancel.click()
    expect(quick.locator("#batch li", has_text="harbour.png")).to_contain_text("Cancelled")
    expect(cancel).to_be_hidden()
    live.gate.set()
    try:
        expect(quick.locator("#batch-status")).to_have_text("2 of 3 done, 1 cancelled.")
    finally:
        live.gate.clear()


def test_pictures_that_wait_for_a_busy_server_are_cancelled_at_once(quick: Page, live: Live):
    headers = {"retry-after": "600"}
    quick.route(CREATE, lambda route: route.fulfill(status=429, json={}, headers=headers))
    choose(quick, ("beach.png", PNG), ("harbour.png", PNG), ("hills.png", PNG))
    quick.get_by_role("button", name="Make 3 pictures larger").click()
    harbour = quick.locator("#batch li", has_text="harbour.png")
    expect(harbour).to_contain_text("The server is busy; trying again in 10 min")
    quick.get_by_role("button", name="Cancel harbour.png").click()
    expect(harbour).to_contain_text("Cancelled")
    quick.get_by_role("button", name="Cancel the rest").click()
    expect(quick.locator("#batch-status")).to_have_text("0 of 3 done, 3 cancelled.")
    quick.get_by_role("button", name="Close").click()
    expect(quick.locator("#batch")).to_be_hidden()


def test_those_of_several_pictures_that_fail_lead_on(quick: Page, live: Live):
    status = quick.locator("#batch-status")
    quick.route(CREATE, lambda route: route.abort())
    quick.locator("#field-prompt").fill("fail")
    choose(quick, ("beach.png", PNG), ("hills.png", PNG))
    quick.locator("#go").click()
    expect(status).to_have_text("0 of 2 done, 2 failed.")
    expect(quick.locator("#batch li").first).to_contain_text("The server does not answer")
    check_accessible(quick)
    quick.unroute(CREATE)
    quick.get_by_role("button", name="Send 2 again").click()
    look = quick.get_by_role("link", name="Look at hills.png, which failed")
    expect(look).to_be_visible()
    expect(quick.locator("#batch li").last).to_contain_text("The model broke.")
    expect(quick.get_by_role("button", name="Send 2 again")).to_be_hidden()
    check_accessible(quick)
    look.click()
    expect(quick.locator("#error")).to_have_text("The model broke.")
    quick.get_by_role("link", name="Again with other settings").click()
    expect(quick.locator("#field-prompt")).to_have_value("fail")


def test_more_pictures_join_those_on_their_way_with_settings_of_their_own(quick: Page, live: Live):
    held = Held(quick, CREATE)
    quick.locator("#field-prompt").fill("first")
    choose(quick, ("beach.png", PNG), ("harbour.png", PNG), ("hills.png", PNG))
    quick.locator("#go").click()
    held.wait(2)  # which are sent at once
    quick.locator("#field-prompt").fill("second")
    choose(quick, ("inn.png", PNG), ("lane.png", PNG))
    quick.locator("#go").click()
    held.release()
    expect(quick.locator("#batch-status")).to_have_text("5 of 5 done.")
    links = quick.locator("#batch li").evaluate_all(
        "all => all.map((one) => one.querySelector('a').href.split('/').pop())"
    )
    prompts = [live.store.predictions.get(one).input["prompt"] for one in links]
    assert prompts == ["first"] * 3 + ["second"] * 2


def test_models_are_shown_with_what_they_lack(page: Page, live: Live):
    open_signed_in(page, live, "/catalog")
    card = page.locator("[data-model='jingyunliang/swinir']")
    expect(card).to_contain_text("Cannot run here")
    expect(card).to_contain_text("into prescalers/ of the models folder")
    expect(card.get_by_role("link", name="Use")).to_have_count(0)
    page.locator("[data-model='tegula/upscale'] summary").click()
    expect(page.locator("[data-model='tegula/upscale'] table").first).to_contain_text("creativity")
    pictures = page.locator(".cards img").evaluate_all(
        "async all => { for (const one of all) { one.loading = 'eager'; await one.decode(); }"
        " return all.map(one => one.naturalWidth) }"
    )
    assert len(pictures) == page.get_by_role("link", name="Use").count() == 6
    assert all(pictures)
    check_accessible(page)
    page.get_by_role("link", name="Use nightmareai/real-esrgan").click()
    expect(page.locator("#model")).to_have_value("nightmareai/real-esrgan")
