"""What is found in a picture by looking at it."""

import io
from dataclasses import replace

import cv2
import numpy as np
import pytest
from PIL import Image
from support import of_arrays, photograph
from support import options as resolved

from tegula.images.look import Damage, Look, find_damage, look_at
from tegula.options import PresetValues, UpscaleOptions
from tegula.pipeline import adjust, pictures
from tegula.pipeline import prepare as prepare_stage
from tegula.pipeline.choices import CLEAN_SHARE, choose, describe, share_of_tuning
from tegula.pipeline.prepare import prepare

hold_drawings = of_arrays(adjust.hold_drawings)
enlarge_lanczos = of_arrays(pictures.enlarge_lanczos)


def drawn_at(look, size, part):
    return of_arrays(prepare_stage.laid_over)(look.drawn, size, part)


def levels(name="astronaut", side=256):
    return np.rint(photograph(side, side, name) * 255).astype(np.uint8)


def compressed(picture, quality):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


def noisy(picture, deviation):
    noise = np.random.default_rng(4).normal(0, deviation, picture.shape)
    return np.rint((picture + noise).clip(0, 255)).astype(np.uint8)


def damage_of(picture, file_quality=None):
    return find_damage(picture.astype(np.float32) / 255, file_quality)


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
@pytest.mark.parametrize("quality", [15, 30, 50, 65, 80])
def test_a_picture_that_was_jpeg_shows_its_quality(name, quality):
    found = damage_of(compressed(levels(name), quality)).jpeg_quality
    assert found == pytest.approx(quality, abs=2)


@pytest.mark.parametrize(("down", "right"), [(3, 5), (0, 7), (4, 0)])
def test_a_jpeg_that_was_cropped_since_shows_its_quality(down, right):
    found = damage_of(compressed(levels(), 50)[down:, right:]).jpeg_quality
    assert found == pytest.approx(50, abs=2)


def test_a_jpeg_that_was_saved_again_at_a_better_quality_shows_the_worse():
    again = compressed(compressed(levels(), 40), 95)
    assert damage_of(again, 95).jpeg_quality == pytest.approx(40, abs=2)


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket"])
def test_a_picture_that_never_was_jpeg_shows_none(name):
    shrunk = levels(name, 200)
    assert damage_of(shrunk).jpeg_quality is None
    assert damage_of(noisy(shrunk, 8)).jpeg_quality is None


def test_drawings_and_tiny_pictures_show_none():
    drawn = np.full((160, 160, 3), 255, np.uint8)
    cv2.putText(drawn, "Tegula", (8, 90), cv2.FONT_HERSHEY_SIMPLEX, 1.2, (20, 20, 160), 2)
    drawn[100:140, 20:120] = 90, 160, 30
    assert damage_of(drawn) == Damage(None, 0.0)
    for height, width in ((1, 1), (3, 40), (17, 17)):
        assert damage_of(levels()[:height, :width]) == Damage(None, 0.0)


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
@pytest.mark.parametrize("deviation", [3, 6, 12])
def test_noise_is_measured_in_levels(name, deviation):
    # Shrunk, so that the photograph's own noise is small.
    picture = noisy(levels(name, 200), deviation)
    assert damage_of(picture).noise == pytest.approx(deviation, rel=0.2, abs=0.5)


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "gravel", "grass"])
def test_texture_is_not_taken_for_noise(name):
    if name in ("gravel", "grass"):
        from skimage import data

        grey = getattr(data, name)()
        picture = cv2.cvtColor(cv2.resize(grey, (200, 200), interpolation=3), cv2.COLOR_GRAY2RGB)
    else:
        picture = levels(name, 200)
    assert damage_of(picture).noise < 1.5


def test_a_crop_is_judged_by_the_whole_picture():
    file = io.BytesIO()
    Image.fromarray(noisy(levels(), 8)).save(file, "PNG")
    whole = prepare(file.getvalue(), UpscaleOptions())
    part = prepare(file.getvalue(), UpscaleOptions(crop=(0, 0, 20, 20)))
    assert part.look.damage == whole.look.damage
    assert whole.look.damage.noise > 6


def text_page(ink=(20, 20, 20), paper=(255, 255, 255), height=256, width=256, seed=1):
    page = np.full((height, width, 3), paper, np.uint8)
    rng = np.random.default_rng(seed)
    for line in range(16, height, 18):
        words = "".join(
            chr(97 + rng.integers(26)) if rng.random() > 0.2 else " " for _ in range(60)
        )
        cv2.putText(page, words, (6, line), cv2.FONT_HERSHEY_SIMPLEX, 0.4, ink, 1, cv2.LINE_AA)
    return page


def screenshot():
    picture = np.full((256, 320, 3), (238, 238, 242), np.uint8)
    cv2.rectangle(picture, (0, 0), (320, 24), (60, 90, 150), -1)
    for row in range(6):
        cv2.rectangle(picture, (16, 40 + 34 * row), (140, 62 + 34 * row), (250, 250, 250), -1)
        cv2.rectangle(picture, (16, 40 + 34 * row), (140, 62 + 34 * row), (130, 130, 140), 1)
        at = (22, 56 + 34 * row)
        cv2.putText(picture, f"Button {row}", at, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (10, 10, 10), 1)
        at = (160, 56 + 34 * row)
        cv2.putText(picture, "some label", at, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (90, 20, 20), 1)
    return picture


def line_art():
    picture = np.full((256, 256, 3), 255, np.uint8)
    rng = np.random.default_rng(3)
    for _ in range(40):
        points = rng.integers(0, 256, (4, 2))
        cv2.polylines(picture, [points], False, (0, 0, 0), 2, cv2.LINE_AA)
    return picture


def magazine_page():
    page = text_page(height=384, width=384)
    page[64:320, :192] = levels("astronaut", 256)[:, 32:224]
    return page


def scan():
    grey = cv2.cvtColor(levels("coffee"), cv2.COLOR_RGB2GRAY)
    grain = np.random.default_rng(1).normal(0, 5, grey.shape)
    return cv2.cvtColor((grey + grain).clip(0, 255).astype(np.uint8), cv2.COLOR_GRAY2RGB)


def shrunk_astronaut():
    return cv2.resize(levels("astronaut", 512), (128, 128), interpolation=cv2.INTER_AREA)


KINDS = {
    "text": (text_page, "drawing"),
    "light text on dark": (lambda: text_page((230, 230, 220), (30, 30, 34)), "drawing"),
    "screenshot": (screenshot, "drawing"),
    "line art": (line_art, "drawing"),
    "photograph": (lambda: levels("coffee"), "photograph"),
    "noisy photograph": (lambda: noisy(levels("chelsea"), 8), "photograph"),
    "small noisy photograph": (lambda: noisy(shrunk_astronaut(), 8), "photograph"),
    "noisy page": (lambda: noisy(text_page(), 8), "drawing"),
    "photograph that was JPEG": (lambda: compressed(levels("coffee"), 50), "photograph"),
    "scan in grey": (scan, "photograph"),
    "magazine page": (magazine_page, "mixed"),
    "blank": (lambda: np.full((64, 64, 3), 255, np.uint8), "photograph"),
    "one pixel": (lambda: np.zeros((1, 1, 3), np.uint8), "photograph"),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_a_picture_is_is_seen(name):
    make, kind = KINDS[name]
    assert look_at(make().astype(np.float32) / 255).kind == kind


def test_the_parts_of_a_mixed_picture_are_told_apart():
    look = look_at(magazine_page().astype(np.float32) / 255)
    drawn = drawn_at(look, (768, 768), (0, 0, 1, 1))
    assert drawn.shape == (768, 768)
    assert drawn[200:560, 60:300].mean() < 0.2
    assert drawn[200:560, 460:].mean() > 0.8
    right = drawn_at(look, (384, 768), (0.5, 0, 0.5, 1))
    assert np.abs(right - drawn[:, 384:]).mean() < 0.05


def coloured_map():
    """Thin pale borders between tinted areas: all differences are weak, and none is noise."""
    picture = np.full((256, 256, 3), (242, 239, 233), np.uint8)
    rng = np.random.default_rng(2)
    for x, y in rng.integers(0, 236, (60, 2)):
        cv2.rectangle(picture, (x, y), (x + 14, y + 10), (222, 212, 200), -1)
        cv2.rectangle(picture, (x, y), (x + 14, y + 10), (200, 188, 175), 1)
    for line in range(20, 256, 60):
        cv2.line(picture, (0, line), (255, line + 30), (120, 110, 70), 2, cv2.LINE_AA)
    return picture


def test_a_map_of_pale_colours_is_drawn_as_its_neighbours_are_equal():
    assert look_at(coloured_map().astype(np.float32) / 255).kind == "drawing"


@pytest.mark.parametrize("make", [text_page, screenshot, line_art, coloured_map])
def test_what_is_drawn_is_crisp_until_it_was_compressed(make):
    picture = make()
    assert look_at(picture.astype(np.float32) / 255).crisp > 0.9
    assert look_at(compressed(picture, 90).astype(np.float32) / 255, 90).crisp < 0.3


def seen(kind, quality=None, noise=0.0):
    drawn = np.zeros((1, 1), np.float32)
    return Look(Damage(quality, noise), kind, drawn)


def preset(**named):
    values = {
        "creativity": 0.4,
        "resemblance": 1.0,
        "guidance_scale": 1.0,
        "steps": 18,
        "scheduler": "ddim",
        "prescaler": "tegula-photo",
    }
    return PresetValues(**{**values, **named})


def test_nothing_is_invented_in_drawings_unless_it_is_wanted():
    look = seen("drawing")
    size = 900, 900
    assert choose(look, UpscaleOptions(), preset(), size)["creativity"] == 0
    assert "creativity" not in choose(look, UpscaleOptions(preset="creative"), preset(), size)
    assert "creativity" not in choose(look, UpscaleOptions(auto=False), preset(), size)
    assert "creativity" not in choose(seen("mixed"), UpscaleOptions(), preset(), size)


@pytest.mark.parametrize(
    ("found", "size", "creativity", "resemblance"),
    [
        ({}, (900, 900), None, None),
        ({"blur": 1.3}, (900, 900), 0.5, 0.8),
        ({}, (300, 900), 0.5, 0.8),
        ({"on_white": 0.4, "blur": 1.3}, (900, 900), 0.2, 2.0),
    ],
)
def test_soft_and_small_photographs_get_more_and_products_less(
    found, size, creativity, resemblance
):
    look = replace(seen("photograph"), **found)
    chosen = choose(look, UpscaleOptions(), preset(), size)
    assert chosen.get("creativity") == creativity
    assert chosen.get("resemblance") == resemblance
    # A model of one step has no other creativity than the one it was trained at.
    asked = UpscaleOptions(prompt="moss")
    assert "creativity" not in choose(look, asked, preset(steps=1), size)


def test_a_grey_source_stays_grey_unless_a_prompt_may_ask_for_colour():
    look = replace(seen("photograph"), is_grey=True)
    assert choose(look, UpscaleOptions(), preset(), (900, 900))["keep_grey"]
    for given in ({"prompt": "a red rose"}, {"auto": False}):
        assert "keep_grey" not in choose(look, UpscaleOptions(**given), preset(), (900, 900))
    done = resolved(prescaler="tegula-photo")
    assert describe(look, done).startswith("grey photograph;")


def test_grey_is_what_has_no_pixel_of_colour():
    picture = scan()
    assert look_at(picture.astype(np.float32) / 255).is_grey
    picture[255, 255, 0] ^= 8
    assert not look_at(picture.astype(np.float32) / 255).is_grey


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket"])
def test_softness_is_told_in_octaves(name):
    sharp = levels(name, 200)
    sharp = cv2.resize(sharp, (100, 100), interpolation=cv2.INTER_AREA)
    found = []
    for factor in (1, 2, 4):
        larger = cv2.resize(sharp, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
        found.append(look_at(larger.astype(np.float32) / 255).blur)
    assert found[0] < 0.7
    assert found == sorted(found)
    assert found[2] >= 1
    assert look_at(np.full((64, 64, 3), 0.5, np.float32)).blur == 0


def test_a_thing_on_white_is_seen():
    picture = np.full((256, 256, 3), 255, np.uint8)
    picture[60:200, 70:190] = levels("coffee", 140)[:, :120]
    look = look_at(picture.astype(np.float32) / 255)
    assert look.on_white == pytest.approx(1 - 140 * 120 / 256**2, abs=0.03)
    assert look.flat > 0.4
    drawn = drawn_at(look, (256, 256), (0, 0, 1, 1))
    assert drawn[:20].min() == 1
    chosen = choose(replace(look, kind="photograph"), UpscaleOptions(), preset(), (256, 256))
    assert chosen["hold_drawings"]
    assert "drawing_prescaler" not in chosen
    picture[:, 200:] = 90
    assert look_at(picture.astype(np.float32) / 255).on_white == 0


def test_what_is_drawn_is_enlarged_by_the_net_for_drawings():
    """Alone where all is drawn, else blended into the net for photographs."""
    page, mixed = (look_at(make().astype(np.float32) / 255) for make in (text_page, magazine_page))
    size, usual = (900, 900), preset()
    assert choose(page, UpscaleOptions(), usual, size)["prescaler"] == "tegula-line"
    chosen = choose(mixed, UpscaleOptions(), usual, size)
    assert chosen["drawing_prescaler"] == "tegula-line"
    assert chosen["hold_drawings"]
    assert "prescaler" not in chosen
    quick = preset(prescaler="tegula-swift")
    assert choose(page, UpscaleOptions(), quick, size)["prescaler"] == "tegula-line"
    # A preset that begins from another net goes on doing so, and is held to the source.
    other = choose(page, UpscaleOptions(), preset(prescaler="lanczos"), size)
    assert "prescaler" not in other
    assert other["hold_drawings"]


def test_one_odd_cell_is_no_photograph_in_a_drawing():
    drawn = np.ones((4, 7), np.float32)
    drawn[0, 0] = 0
    look = replace(seen("drawing"), drawn=drawn)
    assert choose(look, UpscaleOptions(), preset(), (900, 900))["prescaler"] == "tegula-line"
    drawn[0, 1] = 0
    assert "prescaler" not in choose(look, UpscaleOptions(), preset(), (900, 900))


def test_creative_may_redraw_what_is_drawn():
    chosen = choose(seen("mixed"), UpscaleOptions(preset="creative"), preset(), (900, 900))
    assert chosen["drawing_prescaler"] == "tegula-line"
    assert not chosen["hold_drawings"]


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("photograph", {}),
        ("drawing", {"auto": False}),
        ("mixed", {"prescaler": "tegula-photo"}),
    ],
)
def test_photographs_and_named_nets_are_left_alone(kind, given):
    chosen = choose(seen(kind), UpscaleOptions(**given), preset(), (900, 900))
    assert set(chosen) == {"tuning"}


def pristine(**found):
    return replace(seen("photograph"), **{"softness": 0.05, **found})


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"scale": 1.5},
        {"size": (1800, 1600)},
        {"resolution": 1800},
        {"preset": "best"},
        {"preset": "faithful"},
        {"preset": "exact"},
        {"crop": (100, 100, 300, 300)},
    ],
)
@pytest.mark.parametrize(
    "found", [{}, {"damage": Damage(None, 1.2)}, {"is_grey": True}, {"softness": 0.6}]
)
def test_a_clean_photograph_gets_the_quick_net_up_to_twice_its_size(given, found):
    chosen = choose(pristine(**found), UpscaleOptions(**given), preset(), (900, 900))
    assert chosen["prescaler"] == "tegula-swift"


def test_on_a_card_the_large_net_stays_wherever_the_quick_one_is_not_the_nearer_one():
    def net(quality=None, usual="tegula-photo"):
        look, values = pristine(damage=Damage(quality, 0.0)), preset(prescaler=usual)
        chosen = choose(look, UpscaleOptions(), values, (900, 900), on_processor=False)
        return chosen.get("prescaler")

    assert (net(), net(quality=95)) == ("tegula-swift", None)
    assert net(quality=95, usual="tegula-swift") == "tegula-swift-jpeg"


@pytest.mark.parametrize("usual", ["tegula-photo", "tegula-swift"])
@pytest.mark.parametrize("quality", [80, 95])
def test_a_photograph_of_good_jpeg_gets_the_quick_net_for_it_sharpened(usual, quality):
    look = pristine(damage=Damage(quality, 0.5), softness=0.413)
    chosen = choose(look, UpscaleOptions(), preset(prescaler=usual), (900, 900))
    assert (chosen["prescaler"], chosen["mend_blur"]) == ("tegula-swift-jpeg", 0.41)


def test_where_compression_was_coarse_only_a_quick_preset_gets_the_quick_net_for_it():
    look = pristine(damage=Damage(50, 0.5))
    for usual, net in (("tegula-photo", None), ("tegula-swift", "tegula-swift-jpeg")):
        chosen = choose(look, UpscaleOptions(), preset(prescaler=usual), (900, 900))
        assert chosen.get("prescaler") == net


@pytest.mark.parametrize(
    ("found", "given", "usual"),
    [
        ({"softness": None}, {}, {}),
        ({"damage": Damage(79, 0.0)}, {}, {}),
        ({"damage": Damage(97, 2.0)}, {}, {}),
        ({"damage": Damage(None, 2.0)}, {}, {}),
        ({"kind": "mixed"}, {}, {}),
        ({}, {"scale": 2.1}, {}),
        ({}, {"size": (1800, 1900)}, {}),
        ({}, {"resolution": 1900}, {}),
        ({"damage": Damage(95, 0.0)}, {"preset": "best"}, {}),
        ({}, {"auto": False}, {}),
        ({}, {"prescaler": "tegula-photo"}, {}),
        ({}, {"tuning": 0.5}, {}),
        ({}, {"preset": "creative"}, {}),
        ({}, {}, {"prescaler": "realesrgan-x4plus"}),
    ],
)
def test_each_condition_alone_keeps_the_net_of_the_preset(found, given, usual):
    look = replace(pristine(), **found)
    chosen = choose(look, UpscaleOptions(**given), preset(**usual), (900, 900))
    assert "prescaler" not in chosen


def test_what_is_a_little_soft_is_mended_by_what_was_measured_before_the_quick_net():
    def blur(given, usual="tegula-photo", **found):
        look = pristine(**{"softness": 0.413, **found})
        return choose(look, UpscaleOptions(**given), preset(prescaler=usual), (900, 900)).get(
            "mend_blur"
        )

    for given, usual in (
        ({}, "tegula-photo"),
        ({}, "tegula-swift"),
        ({"prescaler": "tegula-swift"}, "tegula-photo"),
        ({"prescaler": "tegula-swift", "preset": "creative"}, "tegula-photo"),
        ({"scale": 4}, "tegula-swift"),
    ):
        assert blur(given, usual) == 0.41
    for given, found in (
        ({"scale": 2.1}, {}),
        ({"exact": True}, {}),
        ({"preset": "exact"}, {}),
        ({"auto": False}, {}),
        ({"tuning": 0.5}, {}),
        ({"prescaler": "tegula-photo"}, {}),
        ({"preset": "creative"}, {}),
        ({}, {"softness": 0.1}),
        ({}, {"softness": None}),
        ({}, {"damage": Damage(79, 0.0)}),
        ({"prescaler": "tegula-swift"}, {"damage": Damage(90, 0.0)}),
        ({"prescaler": "tegula-swift-jpeg", "scale": 4}, {"damage": Damage(90, 0.0)}),
        ({}, {"damage": Damage(None, 2.0)}),
    ):
        assert blur(given, **found) is None


def test_a_model_of_one_step_leaves_photographs_alone_unless_something_is_asked_for():
    def taken(given, steps=1, look=None, **usual):
        values = preset(steps=steps, **usual)
        chosen = choose(look or pristine(), UpscaleOptions(**given), values, (900, 900))
        return chosen.get("creativity"), chosen.get("resemblance")

    nothing, usual = (0, None), (None, None)
    for given in (
        {},
        {"preset": "faithful"},
        {"scale": 4},
        {"prescaler": "tegula-photo"},
        {"prescaler": "tegula-swift"},
    ):
        assert taken(given) == nothing
    assert taken({}, prescaler="tegula-swift") == nothing
    for found in (
        {"softness": 0.5},
        {"softness": None},
        {"damage": Damage(80, 0.0)},
        {"damage": Damage(None, 5.0)},
    ):
        assert taken({}, look=pristine(**found)) == taken({"scale": 4}, look=pristine(**found))
        assert taken({}, look=pristine(**found)) == nothing
    for given in (
        {"prompt": "moss"},
        {"regions": ("0,0,10,10:moss",)},
        {"resemblance": 1.0},
        {"detail": 0.5},
        {"preset": "creative"},
        {"prescaler": "realesrgan-x4plus"},
        {"auto": False},
    ):
        assert taken(given) == taken({"scale": 4, **given}) == usual
    assert taken({}, steps=18) == usual


def test_a_model_of_one_step_adds_twice_as_much_where_compression_was_coarse():
    """Above twice the size; up to that it does no good there, either."""

    def taken(**given):
        coarse = pristine(damage=Damage(79, 0.0))
        chosen = choose(coarse, UpscaleOptions(**given), preset(steps=1), (900, 900))
        return chosen.get("creativity"), chosen.get("resemblance")

    assert taken(scale=4) == taken(scale=2.5) == (None, 0.5)
    assert taken(scale=2) == (0, None)
    assert taken(scale=2, prompt="moss") == (None, 0.5)
    for given in ({"preset": "creative"}, {"auto": False}):
        assert taken(scale=4, **given) == (None, None)


def test_flat_places_are_calmed_by_the_damage_the_more_the_larger_a_photograph_becomes():
    def noise(given, net="tegula-photo", **found):
        look = pristine(**found)
        return choose(look, UpscaleOptions(**given), preset(prescaler=net), (900, 900)).get(
            "mend_flat", 0
        )

    four, heavy = {"scale": 4}, {"damage": Damage(50, 0.0)}
    assert noise(four) == noise(four, damage=Damage(97, 1.0)) == 0
    assert noise(four, **heavy) == noise(four, "tegula-swift", **heavy) == 1
    assert noise({"scale": 3}, **heavy) == 0.5
    assert noise({"scale": 2}, **heavy) == 0
    assert noise(four, damage=Damage(80, 4.0)) == 0.8
    assert noise({"scale": 8}, damage=Damage(None, 9.0)) == 0.8
    for given in ({"auto": False}, {"exact": True}, {"prescaler": "realesrgan-x4plus"}):
        assert noise({**four, **given}, **heavy) == 0
    assert noise(four, "realesrgan-x4plus", **heavy) == 0
    assert noise(four, kind="mixed", **heavy) == 0


def test_a_drawing_that_is_sharp_gets_the_net_for_drawings():
    look = replace(pristine(), kind="drawing", drawn=np.ones((4, 4), np.float32))
    assert choose(look, UpscaleOptions(), preset(), (900, 900))["prescaler"] == "tegula-line"


def test_the_line_says_that_the_source_is_sharp_and_which_net_runs():
    done = resolved(prescaler="tegula-swift")
    assert describe(pristine(), done) == "sharp photograph; net tegula-swift"
    assert describe(pristine(is_grey=True), done).startswith("sharp grey photograph;")
    mended = done.replaced(mend_blur=0.4)
    expected = "photograph, soft by 0.4 px, sharpened; net tegula-swift"
    assert describe(pristine(softness=0.4), mended) == expected
    # Noise passes for detail, and a compressed source is not called sharp.
    for damage in (Damage(60, 0.0), Damage(None, 6.0)):
        assert describe(pristine(damage=damage), done).startswith("photograph,")


def test_a_second_net_that_is_named_is_taken_whole():
    chosen = choose(
        seen("drawing"), UpscaleOptions(drawing_prescaler="second"), preset(), (900, 900)
    )
    assert "prescaler" not in chosen
    assert "drawing_share" not in chosen


def hazy(page, scale):
    """A page enlarged with haze on its paper, and letters that are paler than their source."""
    large = enlarge_lanczos(page, (page.shape[1] * scale, page.shape[0] * scale))
    haze = np.random.default_rng(3).normal(-0.02, 0.01, large.shape).astype(np.float32)
    return (large * 0.9 + 0.08 + haze).astype(np.float32)


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("crisp", [0.0, 1.0])
def test_white_paper_stays_white_and_ink_stays_solid(scale, crisp):
    page = np.rint(text_page((0, 0, 0))[:64, :96]).astype(np.float32) / 255
    page[40:56, 8:60] = 0
    made = hazy(page, scale)
    drawn = np.ones(made.shape[:2], np.float32)
    found = hold_drawings(made.copy(), page, drawn, crisp)
    clear = np.ones((2, 2), np.uint8).repeat(scale + 1, 0).repeat(scale + 1, 1)
    large = page.repeat(scale, 0).repeat(scale, 1)
    paper = cv2.erode((large.min(2) == 1).astype(np.uint8), clear).astype(bool)
    ink = cv2.erode((large.max(2) == 0).astype(np.uint8), clear).astype(bool)
    assert paper.sum() > 200
    assert ink.sum() > 200
    assert found[paper].min() == 1
    assert found[ink].max() == 0
    shrunk = cv2.resize(found, (96, 64), interpolation=cv2.INTER_AREA)
    before = cv2.resize(made, (96, 64), interpolation=cv2.INTER_AREA)
    if crisp:
        assert np.abs(shrunk - page).mean() < 0.25 * np.abs(before - page).mean()


def test_what_is_not_drawn_is_not_held():
    page = text_page()[:64, :96].astype(np.float32) / 255
    made = hazy(page, 2)
    drawn = np.zeros(made.shape[:2], np.float32)
    drawn[:, 100:] = 1
    found = hold_drawings(made.copy(), page, drawn, 1.0)
    assert np.array_equal(found[:, :96], made[:, :96])
    assert not np.array_equal(found[:, 104:], made[:, 104:])
    smaller = made[:40]
    assert np.array_equal(hold_drawings(smaller.copy(), page, drawn[:40], 1.0), smaller)


@pytest.mark.parametrize(
    ("look", "share"),
    [
        (("photograph",), CLEAN_SHARE),
        (("photograph", 97, 0.4), CLEAN_SHARE),
        (("photograph", 80), 0.5),
        (("photograph", 40), 0.35),
        (("photograph", 40, 9.0), 0.35),
        (("photograph", None, 9.0), 0.65),
        (("drawing",), 0.35),
        (("mixed", 90), 0.35),
    ],
)
def test_the_share_of_tuning_falls_with_damage(look, share):
    assert share_of_tuning(seen(*look)) == share


def test_the_share_falls_steadily():
    shares = [share_of_tuning(seen("photograph", quality)) for quality in range(5, 101)]
    assert shares == sorted(shares)
    shares = [share_of_tuning(seen("photograph", None, noise)) for noise in np.arange(0, 9, 0.2)]
    assert shares == sorted(shares, reverse=True)


def test_one_line_says_what_was_found_and_done():
    done = resolved(prescaler="tegula-photo", tuning=0.35, mend_jpeg=True)
    line = describe(seen("photograph", 12, 6.2), done)
    assert line == (
        "photograph, JPEG quality about 12, mended, noise of about 6 levels; net tegula-photo, "
        "0.35 of its tuning"
    )
    mixed = resolved(prescaler="lanczos", drawing_prescaler="second")
    assert describe(seen("mixed"), mixed) == (
        "photograph with drawing or text; net lanczos; second where it is drawn"
    )
    held = mixed.replaced(drawing_share=0.5, hold_drawings=True)
    assert describe(seen("mixed"), held).endswith(
        "; 0.5 of second where it is drawn, held to the source"
    )
    line = mixed.replaced(drawing_prescaler="tegula-line", hold_drawings=True)
    assert describe(seen("mixed"), line).endswith("; tegula-line where it is drawn")
    alone = held.replaced(drawing_prescaler="")
    assert describe(seen("mixed"), alone).endswith("; drawn parts held to the source")


def test_a_png_that_was_a_bad_jpeg_is_mended():
    file = io.BytesIO()
    Image.fromarray(compressed(levels(), 10)).save(file, "PNG")
    assert prepare(file.getvalue(), UpscaleOptions()).mended
    assert not prepare(file.getvalue(), UpscaleOptions(auto=False)).mended
    assert not prepare(file.getvalue(), UpscaleOptions(mend_jpeg=False)).mended
    file = io.BytesIO()
    Image.fromarray(compressed(levels(), 40)).save(file, "PNG")
    assert not prepare(file.getvalue(), UpscaleOptions()).mended
    assert prepare(file.getvalue(), UpscaleOptions(mend_jpeg=True)).mended


@pytest.mark.parametrize("colour", [(9, 100, 200), (255, 255, 255)])
def test_a_picture_without_detail_is_not_refined(colour):
    look = look_at(np.full((64, 64, 3), colour, np.float32) / 255)
    values = preset()
    assert choose(look, UpscaleOptions(), values, (64, 64))["creativity"] == 0
    said = describe(look, resolved(creativity=0.0))
    assert "without detail; " in said
    assert said.endswith("no diffusion")
