"""No seam on real photographs, with the packaged bundle."""

import numpy as np
import pytest
import torch
from support import options, photograph, refine_canvas

from bench.seams import seam_score
from tegula.models.bundle import ControlImage
from tegula.models.mini.bundle import load_mini
from tegula.pipeline.refine import RefineJob
from tegula.pipeline.windows import canvas_piece

SIDE, WINDOW = 512, 128


@pytest.fixture(scope="module")
def mini():
    return load_mini(torch.device("cpu"), torch.float32)


def borders(bundle):
    factor = bundle.facts.latent_factor
    grid = canvas_piece(bundle.facts, SIDE, SIDE, WINDOW, 0.125).grid
    edges = {x * factor for x in grid.columns} | {x * factor + WINDOW for x in grid.columns}
    return sorted(edges - {0, SIDE})


def refined(bundle, picture, window):
    chosen = options(
        width=SIDE,
        height=SIDE,
        creativity=1.0,
        steps=2,
        scheduler="lcm",
        window=window,
        overlap=0.125,
        window_batch=8,
    )
    return refine_canvas(RefineJob(bundle, picture, picture, chosen))


@pytest.mark.parametrize("name", ["astronaut", "coffee", "rocket"])
def test_window_borders_have_the_gradients_of_their_surroundings(mini, name):
    picture = photograph(SIDE, SIDE, name)
    at = borders(mini)
    # A photograph has edges of its own on these lines, so the untiled result is the measure.
    untiled = seam_score(refined(mini, picture, SIDE), at, at)
    tiled = seam_score(refined(mini, picture, WINDOW), at, at)
    assert abs(tiled / untiled - 1) < 0.02


def test_the_measure_sees_a_seam_of_one_percent_of_the_range(mini):
    picture = photograph(SIDE, SIDE, "rocket")
    at = borders(mini)
    seamed = picture.copy()
    for number, edge in enumerate(at):
        seamed[:, edge:] += 0.01 if number % 2 == 0 else -0.01
    assert seam_score(seamed, at, []) / seam_score(picture, at, []) > 1.02


def test_the_packaged_autoencoder_decodes_tiles_as_it_decodes_the_whole(mini):
    picture = torch.tensor(photograph(256, 128).transpose(2, 0, 1)[None])
    control = ControlImage(picture, picture)
    latents = torch.randn(1, 16, 32, 64, generator=torch.Generator().manual_seed(0))
    whole = mini.autoencoder.decode(latents, control)
    halves = [
        mini.autoencoder.decode(
            latents[..., columns],
            ControlImage(picture[..., pixels], picture[..., pixels]),
        )
        for columns, pixels in (
            (slice(0, 32), slice(0, 128)),
            (slice(32, 64), slice(128, 256)),
        )
    ]
    np.testing.assert_allclose(torch.cat(halves, -1), whole, atol=1 / 255)
