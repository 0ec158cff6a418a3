"""The drawings of the quality bench: they repeat, and what is read off them is right."""

from __future__ import annotations

import numpy as np
import pytest

from bench.quality import drawings, kinds, recipes, report
from bench.quality.cache import Cache
from bench.quality.drawings import DRAWINGS
from bench.quality.methods import Result, find_method
from bench.quality.run import Bench
from bench.quality.scores import Jury

try:
    for face in drawings._FONTS:
        drawings._font(face, 8)
except SystemExit as fault:
    pytest.skip(str(fault), allow_module_level=True)


def test_there_are_twenty_and_their_kinds():
    kinds = [one.kind for one in DRAWINGS]
    assert len(DRAWINGS) == len({one.name for one in DRAWINGS}) == 20
    assert set(kinds) == {"text", "screen", "lines", "icons", "map", "houses"}
    assert all(one.background[3:] == (0,) for one in DRAWINGS if one.kind == "icons")


@pytest.mark.parametrize("name", ["page serif", "icons", "town map"])
def test_a_drawing_repeats_and_is_the_same_at_both_scales(name):
    one = next(d for d in DRAWINGS if d.name == name)
    (half, lines), (again, _), (full, more) = one.at(2), one.at(2), one.at(4)
    np.testing.assert_array_equal(half, again)
    assert lines == more
    assert half.shape[:2] == (2 * drawings.HEIGHT, 2 * drawings.WIDTH)
    size = (drawings.WIDTH, drawings.HEIGHT)
    small, other = (recipes.shrink(p, size) for p in (half, full))
    assert (
        np.abs(recipes.on_white(small) - recipes.on_white(other)).mean() < 0.05
    )  # letters are hinted by size


def test_transparent_colour_does_not_bleed_and_jpeg_sees_white():
    picture = np.zeros((8, 8, 4), np.float32)
    picture[:, 4:] = (1, 0.5, 0, 1)
    small = recipes.shrink(picture, (1, 1))
    np.testing.assert_allclose(small[0, 0], (1, 0.5, 0, 0.5), atol=1e-6)
    damaged = recipes.degrade(picture, 4, "jpeg", "x")
    assert damaged.shape == (2, 2, 3)
    assert damaged[0, 0].min() > 100  # and not black


def test_characters_are_counted_in_their_order():
    assert drawings.right_characters("the river\n", ["the river"]) == 8
    assert drawings.right_characters("the rver", ["the river"]) == 7
    assert drawings.right_characters("tbe river and much more", ["the river"]) == 0
    assert drawings.right_characters("", ["the river"]) == 0
    assert drawings.right_characters("ab", ["ba"]) == 1


def test_white_and_black_are_counted_away_from_edges():
    truth = np.ones((16, 16, 3), np.float32)
    truth[:, :8] = 0
    picture = truth.copy()
    picture[0, :] = 0.5
    kept = drawings.kept_extremes(picture, truth, 2)
    assert kept == {"white": (15 * 6, 16 * 6), "black": (15 * 6, 16 * 6)}


@pytest.mark.skipif(not drawings.can_read(), reason="no tesseract")
def test_tesseract_reads_a_page_of_the_truth():
    page, lines = DRAWINGS[0].at(4)
    count = sum(len(line.replace(" ", "")) for line in lines)
    assert drawings.right_characters(drawings.read_text(page), lines) > 0.95 * count


def test_shares_are_of_all_pictures_and_text_is_apart(monkeypatch):
    monkeypatch.setattr("bench.quality.run.can_read", lambda: True)
    monkeypatch.setattr("bench.quality.report.can_read", lambda: True)
    monkeypatch.setattr("bench.quality.run.read_text", lambda picture: "x")
    monkeypatch.setattr("bench.quality.run.right_characters", lambda found, lines: 10)

    class Enlarged:
        def run(self, file, scale, method):
            small = recipes.read_levels(file)
            picture = recipes.on_white(small.astype(np.float32) / np.float32(255))
            return Result(np.repeat(np.repeat(picture, scale, 0), scale, 1))

    bench = Bench(Enlarged(), Jury([]), Cache(None), lambda line: None)
    chosen = [DRAWINGS[0], DRAWINGS[1], DRAWINGS[14]]
    outcome = bench.run_drawings(chosen, [2], ["clean"], [find_method("bicubic")])
    row = outcome.tables[2]["clean"]["bicubic"]
    letters = sum(len("".join(d.at(2)[1]).replace(" ", "")) for d in chosen[:2])
    assert row["read"] == pytest.approx(20 / letters)
    assert row["white"] == 1
    assert row["text_ssim"] != row["ssim"]
    assert f"| bicubic | {20 / letters:.1%} |" in report.drawings_markdown(outcome)


def test_there_are_twelve_kinds_of_source_each_a_quarter_of_its_truth():
    found = kinds.sources({})
    assert len({source.kind for source in found}) == len(found) == 12
    for source in found:
        height, width = source.small.shape[:2]
        assert source.truth.shape[:2] == (height * kinds.SCALE, width * kinds.SCALE)
    by_kind = {source.kind: source for source in found}
    assert by_kind["icon with alpha"].small.shape[2] == 4
    assert by_kind["text"].lines
    assert np.ptp(by_kind["old scan"].small.astype(int), axis=2).max() == 0


def test_auto_is_behind_where_a_fixed_setting_is_better():
    rows = {
        "text": {
            "auto": {"dists": 0.11, "read": 0.99},
            "one": {"dists": 0.10, "read": 0.90},
            "two": {"dists": 0.20, "read": 0.95},
        }
    }
    assert kinds.table(rows, ["auto", "one", "two"]).splitlines()[2:] == [
        "| text | DISTS | 0.110 | 0.100 | one | **10%** |",
        "| text | characters read | 0.990 | 0.950 | two | -4% |",
    ]
