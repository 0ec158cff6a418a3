"""The form of the start page as a person uses it: inputs of all models, checks, coming back."""

# ruff: noqa: RUF001 - the pages write sizes with a multiplication sign

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from api_support import DATA_URI, png
from live_server import Live, eventually, live_server
from PIL import Image
from playwright.sync_api import Page, expect
from workbench import check_accessible, choose, needs_browser, open_form, open_signed_in

from tegula.catalog import find, models
from tegula.images.encode import save
from tegula.server.tables import State

pytestmark = [pytest.mark.slow, needs_browser]


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A quick engine, and limits that small pictures reach."""
    folder = tmp_path_factory.mktemp("server")
    limits = {"max_pixels": 40_000, "max_upload_bytes": 20_000}
    with live_server(folder, max_waiting=50, **limits) as server:
        yield server


@pytest.fixture
def form(page: Page, live: Live) -> Page:
    open_signed_in(page, live)
    expect(page.locator("#upscale-form")).to_be_visible()
    return page


DROP = """([files, texts]) => {
  const all = new DataTransfer();
  for (const [name, kind, base64] of files) {
    const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    all.items.add(new File([bytes], name, { type: kind }));
  }
  for (const [kind, text] of texts) all.setData(kind, text);
  document.dispatchEvent(new DragEvent("drop", { dataTransfer: all, cancelable: true }));
}"""
PASTE = DROP.replace(
    'new DragEvent("drop", { dataTransfer: all, cancelable: true })',
    'new ClipboardEvent("paste", { clipboardData: all, bubbles: true })',
)


def transfer(page: Page, script: str, files=(), texts=()) -> None:
    encoded = [(name, kind, base64.b64encode(data).decode()) for name, kind, data in files]
    page.evaluate(script, [encoded, list(texts)])


def sent(page: Page, live: Live):
    """Press the button; return the prediction that came of it."""
    page.locator("#go").click()
    page.wait_for_url("**/p/*")
    return live.store.predictions.get(page.url.rsplit("/", 1)[1])


# All inputs of every model.


def test_every_input_of_every_model_is_on_its_form_or_said_to_be_without_effect(
    form: Page, live: Live
):
    offered = form.locator("#model option").all_text_contents()
    expected = {
        model.reference: {one.name for one in model.latest.fields} - {model.latest.image}
        for model in models()
    }
    assert set(offered) <= set(expected)
    assert "jingyunliang/swinir" not in offered  # its weights are not here
    form.locator("summary", has_text="More settings").first.click()
    for name in offered:
        form.locator("#model").select_option(name)
        controls = form.locator("#fields [name]").evaluate_all("all => all.map(one => one.name)")
        without = form.locator("#fields li code").all_text_contents()
        assert set(controls) | set(without) == expected[name], name
        texts = form.locator("#fields").inner_text()
        for field in find(name).fields:
            if field.name in controls:
                assert field.description.split(".")[0] in texts
    check_accessible(form)


def test_what_is_set_is_sent_and_the_rest_is_left_to_the_model(form: Page, live: Live):
    choose(form, ("photo.png", png(30, 20)))
    form.get_by_role("button", name="4×").click()
    expect(form.locator("#result-size")).to_have_text("The result has 120 × 80 pixels.")
    check_accessible(form)
    form.get_by_role("radio", name="fast").check()
    form.get_by_label("Prompt", exact=True).fill("a lighthouse")
    form.locator("summary", has_text="More settings").click()
    form.get_by_label("Seed").fill("7")
    form.get_by_label("Seamless").check()
    prediction = sent(form, live)
    image = prediction.input.pop("image")
    assert image
    assert prediction.input == {
        "scale": 4, "preset": "fast", "prompt": "a lighthouse", "seed": 7, "seamless": True,
        "format": "png",
    }  # fmt: skip


def test_a_number_out_of_bounds_is_shown_where_it_is_and_not_sent(form: Page):
    choose(form, ("photo.png", png(30, 20)))
    form.locator("summary", has_text="More settings").click()
    form.get_by_label("Hdr", exact=True).fill("3")
    form.locator("summary", has_text="More settings").click()
    form.locator("#go").click()
    expect(form.locator("#more")).to_have_attribute("open", "")
    assert form.evaluate("document.activeElement.name") == "hdr"
    assert "/p/" not in form.url
    form.get_by_role("button", name="Back to the defaults").click()
    expect(form.get_by_label("Hdr", exact=True)).to_have_value("0")


def test_the_form_works_by_keys_alone(form: Page, live: Live):
    choose(form, ("photo.png", png(30, 20)))
    form.locator("#field-scale").focus()
    form.keyboard.press("Tab")
    assert form.evaluate("document.activeElement.type") == "range"
    form.keyboard.press("End")
    assert form.locator("#field-scale").input_value() == "8"
    form.locator("#field-prompt").focus()
    form.keyboard.type("a cat")
    form.locator("#go").focus()
    form.keyboard.press("Enter")
    form.wait_for_url("**/p/*")


# Checked before anything is sent.


def test_what_the_server_would_refuse_is_said_before_it_is_sent(form: Page):
    problem = form.locator("#problem")
    choose(form, ("wide.png", png(150, 100)))
    expect(problem).to_contain_text("wide.png would become 300 × 200 pixels")
    expect(problem).to_contain_text("more than the 40000 pixels that this server makes")
    expect(problem).to_contain_text("at 1.63× it fits")
    expect(form.locator("#go")).to_be_disabled()
    check_accessible(form)
    form.get_by_role("button", name="Use 1.63×").click()
    expect(problem).to_be_empty()
    expect(form.locator("#result-size")).to_have_text("The result has 244 × 163 pixels.")
    expect(form.locator("#go")).to_be_enabled()
    choose(form, ("huge.png", png(300, 200)))
    expect(problem).to_contain_text("huge.png has 300 × 200 pixels")
    expect(problem).to_contain_text("244 × 163 would fit")
    noise = Image.frombytes("RGB", (100, 100), os.urandom(30_000))
    written = io.BytesIO()
    noise.save(written, "PNG")
    choose(form, ("noise.png", written.getvalue()))
    expect(problem).to_contain_text(
        "noise.png has 30 kB, and this server takes files of up to 20 kB"
    )
    choose(form, ("letter.txt", b"Dear Ana"))
    expect(problem).to_contain_text("letter.txt is not a picture that this server reads")
    choose(form, ("empty.png", b""))
    expect(problem).to_have_text("empty.png is empty.")
    expect(form.locator("#go")).to_be_disabled()
    choose(form, ("photo.png", png(30, 20)))
    expect(problem).to_be_empty()
    expect(form.locator("#go")).to_be_enabled()


def heic(width: int, height: int) -> bytes:
    """The head of a HEIC picture, as far as it tells the size."""
    ispe = (
        b"\x00\x00\x00\x14ispe\x00\x00\x00\x00"
        + width.to_bytes(4, "big")
        + height.to_bytes(4, "big")
    )
    return b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + ispe + bytes(64)


def test_pictures_that_browsers_cannot_show_are_taken_with_their_size(form: Page):
    choose(form, ("IMG_1.HEIC", heic(40, 30)))
    readable = form.evaluate("fetch('v1/web/workbench').then(one => one.json())")["reads_heic"]
    if readable:
        expect(form.locator("#chosen")).to_contain_text("IMG_1.HEIC · 40 × 30 · no preview")
        expect(form.locator("#go")).to_be_enabled()
    else:
        expect(form.locator("#problem")).to_contain_text("IMG_1.HEIC is a HEIC picture")
        expect(form.locator("#problem")).to_contain_text("save it as JPEG or PNG")
    written = io.BytesIO()
    Image.new("RGB", (40, 30)).save(written, "TIFF")
    choose(form, ("scan.tif", written.getvalue()))
    expect(form.locator("#chosen")).to_contain_text("scan.tif · 40 × 30")
    expect(form.locator("#preview")).to_be_hidden()
    expect(form.locator("#result-size")).to_have_text("The result has 80 × 60 pixels.")


def test_files_and_addresses_are_taken_however_they_come(form: Page, live: Live):
    chosen, error = form.locator("#chosen"), form.locator("#page-error")
    picture = png(30, 20)
    transfer(form, DROP, [("a.png", "image/png", picture), ("b.png", "image/png", picture)])
    expect(chosen).to_have_text("2 pictures")
    expect(form.locator("#go")).to_have_text("Make 2 pictures larger")
    form.get_by_role("button", name="Remove a.png").click()
    expect(chosen).to_contain_text("b.png · 30 × 20")
    transfer(form, PASTE, [("image.png", "image/png", picture)])
    expect(chosen).to_contain_text("image.png")
    transfer(form, DROP, texts=[("text/uri-list", "https://example.com/cat.jpg")])
    expect(chosen).to_have_text("cat.jpg · fetched by the server")
    expect(form.locator("#go")).to_be_enabled()
    transfer(form, PASTE, texts=[("text/plain", "https://example.com/dog.jpg")])
    expect(chosen).to_have_text("dog.jpg · fetched by the server")
    transfer(form, DROP, texts=[("text/uri-list", "file:///pictures/cat.jpg")])
    expect(error).to_contain_text("cat.jpg is a file on your machine: drop the file itself")
    transfer(form, DROP, texts=[("text/plain", "just words")])
    expect(error).to_contain_text("“just words” is not an address")
    transfer(form, DROP)
    expect(error).to_contain_text("neither a file nor an address")
    transfer(form, DROP, texts=[("text/uri-list", DATA_URI)])
    expect(chosen).to_contain_text("dropped.png")
    form.get_by_label("Address of a picture").fill("ftp://example.com/cat.jpg")
    form.get_by_role("button", name="Take it").click()
    expect(error).to_contain_text("begin with https://")
    check_accessible(form)


def test_an_address_is_fetched_by_the_server(form: Page, live: Live):
    headers = {"authorization": f"Bearer {live.token}"}
    parts = {"content": ("there.png", png(30, 20))}
    file = httpx.post(f"{live.url}/v1/files", files=parts, headers=headers, timeout=300).json()
    form.get_by_label("Address of a picture").fill(file["urls"]["download"])
    form.keyboard.press("Enter")
    prediction = sent(form, live)
    expect(form.locator("#state")).to_have_text("Done")
    assert prediction.model == "tegula/upscale"


# Coming back.


def predicted(live: Live, **inputs) -> str:
    body = {"version": "tegula/upscale", "input": {"image": DATA_URI, **inputs}}
    headers = {"authorization": f"Bearer {live.token}", "prefer": "wait=60"}
    answer = httpx.post(f"{live.url}/v1/predictions", json=body, headers=headers, timeout=300)
    return answer.json()["id"]


def test_again_comes_back_with_the_picture_and_every_input(form: Page, live: Live):
    made = predicted(live, scale=3, preset="fast", prompt="a cat", seed=5, hdr=0.25, mask=DATA_URI)
    form.goto(f"{live.url}/p/{made}")
    form.get_by_role("link", name="Again with other settings").click()
    expect(form.locator("#go")).to_be_enabled()
    expect(form.locator("#preview")).to_be_visible()
    expect(form.locator("#more")).to_have_attribute("open", "")
    prediction = sent(form, live)
    earlier = live.store.predictions.get(made)
    changed = {"image", "mask"}
    before = {name: value for name, value in earlier.input.items() if name not in changed}
    after = {name: value for name, value in prediction.input.items() if name not in changed}
    assert after == {**before, "format": "png"}
    assert {"image", "mask"} <= set(prediction.input)
    expect(form.locator("#state")).to_have_text("Done")


def test_a_result_is_the_next_picture(form: Page, live: Live):
    form.goto(f"{live.url}/p/{predicted(live)}")
    form.get_by_role("link", name="Enlarge the result further").click()
    expect(form.locator("#chosen")).to_contain_text("result.png")
    expect(form.locator("#go")).to_be_enabled()
    expect(form).not_to_have_url(re.compile("from"))
    sent(form, live)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_the_settings_of_a_dropped_result_are_offered(form: Page, ending: str, tmp_path: Path):
    settings = {
        "version": "0.2.0", "preset": "fast", "prompt": "a “cat” & <dog>", "creativity": 0.4,
        "resemblance": 0.5, "seed": 11, "steps": 20, "hdr": 0.0, "negative_prompt": "",
        "asked": {"scale": 3.0, "preset": "fast", "prompt": "a “cat” & <dog>", "steps": 20},
    }  # fmt: skip
    path = tmp_path / f"holiday_3x.{ending}"
    save(Image.new("RGB", (30, 20)), path, settings=settings)
    choose(form, (path.name, path.read_bytes()))
    expect(form.locator("#offer-text")).to_contain_text(
        f"holiday_3x.{ending} is a result of tegula"
    )
    if ending == "png":
        check_accessible(form)
    form.get_by_role("button", name="Use its settings").click()
    expect(form.locator("#field-scale")).to_have_value("3")
    expect(form.locator("#field-prompt")).to_have_value("a “cat” & <dog>")
    expect(form.get_by_role("radio", name="fast")).to_be_checked()
    expect(form.locator("#field-seed")).to_have_value("11")
    expect(form.locator("#field-creativity")).to_have_value("0.4")
    expect(form.locator("#status")).to_contain_text("but for steps")


# Code.


def shown_code(page: Page, kind: str) -> str:
    if not page.locator("#code-text").is_visible():
        page.locator("summary", has_text="The same as code").click()
    page.get_by_role("radio", name=kind).check()
    return page.locator("#code-text").inner_text()


def fill_for_code(page: Page, folder: Path) -> None:
    picture = png(30, 20)
    (folder / "it's a $HOME.png").write_bytes(picture)
    choose(page, ("it's a $HOME.png", picture))
    page.get_by_label("Prompt", exact=True).fill('a "cat" \\ `x` $HOME, it\'s')
    page.get_by_role("button", name="4×").click()


PROMPT = 'a "cat" \\ `x` $HOME, it\'s'


@pytest.mark.parametrize("kind", ["curl", "Python", "JavaScript", "tegula run"])
def test_the_code_runs_as_it_stands(page: Page, workbench: Live, tmp_path: Path, kind: str):
    open_form(page, workbench, ("photo.png", png(30, 20)))
    fill_for_code(page, tmp_path)
    text = shown_code(page, kind)
    programs = {"Python": sys.executable, "JavaScript": "node"}
    script = tmp_path / ("code.mjs" if kind == "JavaScript" else "code")
    script.write_text(text)
    folders = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # has tegula
    environment = {**os.environ, "TEGULA_TOKEN": workbench.token, "PATH": folders}
    earlier = set(tmp_path.iterdir())
    done = subprocess.run(
        [programs.get(kind, "bash"), script], cwd=tmp_path, env=environment, capture_output=True,
        text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    headers = {"authorization": f"Bearer {workbench.token}"}
    url = f"{workbench.url}/v1/predictions"
    last = httpx.get(url, headers=headers, timeout=300).json()["results"][0]
    assert (last["input"]["prompt"], last["input"]["scale"]) == (PROMPT, 4)
    if kind == "curl":
        made = json.loads(done.stdout)
        assert made["id"] == last["id"]
        eventually(lambda: workbench.store.predictions.get(last["id"]).status is State.SUCCEEDED)
        return
    (result,) = set(tmp_path.iterdir()) - earlier
    assert (
        result.name == done.stdout.strip() if kind != "tegula run" else result.name in done.stderr
    )
    with Image.open(result) as picture:
        assert picture.size == (120, 80)
    if kind == "tegula run":
        check_accessible(page)
