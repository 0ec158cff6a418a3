"""What is measured on one picture against its truth.

Pictures are float32 [height, width, 3], sRGB in 0..1; luma is Rec. 601. Measures of
many pictures together (Fréchet distance, naturalness) are in ``bench.quality.totals``.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tegula.images.pixels import LUMA

Picture = NDArray[np.float32]
Plane = NDArray[np.float32]
BANDS = {"low": (2, 4), "middle": (5, 8), "upper": (9, 14)}
_FLAT_WINDOW = 16
_FLAT_DEVIATION = 1.5 / 255
_FINE_BLUR = 5
"""Pixels of the mean beside which detail is fine; training's discriminator sees that alone."""
_GRID_WINDOW = 6
"""Pixels of the source a side over which a pattern has to repeat; edges and texture seldom do."""
_GRID_FLOOR = (0.5 / 255) ** 2
"""Half a level: fine energy below that of it cannot be seen."""


def luma_of(picture: Picture) -> Plane:
    """Return [h, w]."""
    return np.asarray(picture @ LUMA, np.float32)


def psnr(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Return the peak signal-to-noise ratio in dB."""
    error = float(np.square(a.astype(np.float64) - b).mean())
    return 10 * math.log10(1 / max(error, 1e-10))


def ssim(a: Plane, b: Plane) -> float:
    """Return the structural similarity (Wang et al., 2004), 11 px Gaussian windows."""
    x, y = a.astype(np.float64), b.astype(np.float64)

    def mean(plane: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(cv2.GaussianBlur(plane, (11, 11), 1.5)[5:-5, 5:-5])

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return float(score.mean())


def band_energies(luma: Plane) -> dict[str, float]:
    """Return the energy of each band of the 8x8 DCT, bands by the sum of both frequencies."""
    height, width = (side - side % 8 for side in luma.shape)
    blocks = luma[:height, :width].reshape(height // 8, 8, width // 8, 8).transpose(0, 2, 1, 3)
    basis = _dct_matrix()
    energy = np.square(basis @ blocks.astype(np.float64) @ basis.T).mean(axis=(0, 1))
    order = np.add.outer(np.arange(8), np.arange(8))
    return {
        name: float(energy[(order >= low) & (order <= high)].sum())
        for name, (low, high) in BANDS.items()
    }


def _dct_matrix() -> NDArray[np.float64]:
    k = np.arange(8)
    rows = np.cos(np.pi * (2 * k[None] + 1) * k[:, None] / 16) * 0.5
    rows[0] /= math.sqrt(2)
    return np.asarray(rows)


def flat_energies(luma: Plane, truth: Plane) -> tuple[float, float, int]:
    """Return fine energy of picture and truth summed over flat windows, and their count.

    A 16 px window is flat where the truth's fine deviation is below 1.5 levels of 255.
    """
    fine, true = _window_energy(luma), _window_energy(truth)
    flat = true < _FLAT_DEVIATION**2
    return float(fine[flat].sum()), float(true[flat].sum()), int(flat.sum())


def _window_energy(luma: Plane) -> Plane:
    fine = np.square(luma - cv2.GaussianBlur(luma, (0, 0), 2.0))
    side = _FLAT_WINDOW
    height, width = (s - s % side for s in luma.shape)
    windows = fine[:height, :width].reshape(height // side, side, width // side, side)
    return np.asarray(windows.mean(axis=(1, 3)))


def high_bands(planes: Tensor) -> Tensor:
    """Return what planes [n, 1, h, w] have beside their local mean."""
    edge = _FINE_BLUR // 2
    padded = functional.pad(planes, (edge, edge, edge, edge), "reflect")
    return planes - functional.avg_pool2d(padded, _FINE_BLUR, stride=1)


def grid_excess(planes: Tensor, truths: Tensor, times: int) -> Tensor:
    """Return how much more than their truths planes [n, 1, h, w] show the grid of their source.

    A net that makes ``times`` x ``times`` pixels of each pixel and does not know what to draw may
    draw the same again and again: combs and lattices, to which networks that judge are nearly
    blind. What repeats is the mean of fine detail over neighbouring pixels of the source, for each
    place within them; its energy, where it is above the truth's, is given as a share of that of
    all fine detail of the truth. One number a row, 0 at best; planes are luma in 0..1.
    """
    (grid, _), (true_grid, energy) = (_grid_energies(each, times) for each in (planes, truths))
    excess = functional.relu(grid - true_grid).flatten(1).mean(1)
    return excess / (energy.flatten(1).mean(1) + _GRID_FLOOR)


def _grid_energies(planes: Tensor, times: int) -> tuple[Tensor, Tensor]:
    fine = high_bands(planes)
    height, width = (side - side % times for side in fine.shape[-2:])
    places = functional.pixel_unshuffle(fine[..., :height, :width], times)
    repeated = functional.avg_pool2d(places, _GRID_WINDOW, stride=1)
    return repeated.square().mean(1), places.square().mean(1)


def grid(luma: Plane, truth: Plane, times: int) -> float:
    """Return ``grid_excess`` of one picture."""
    planes, truths = (torch.from_numpy(plane)[None, None] for plane in (luma, truth))
    return float(grid_excess(planes, truths, times))


def colour_shift(a: Picture, b: Picture) -> float:
    """Return the mean CIEDE2000 difference of the low-passed pictures (8 px)."""
    from skimage.color import deltaE_ciede2000, rgb2lab

    low = [cv2.GaussianBlur(p, (0, 0), 8.0)[::4, ::4] for p in (a, b)]
    return float(deltaE_ciede2000(rgb2lab(low[0]), rgb2lab(low[1])).mean())


def consistency(picture: Picture, small: NDArray[np.uint8]) -> float:
    """Return the PSNR of the picture, shrunk again, against what was enlarged."""
    size = (small.shape[1], small.shape[0])
    shrunk = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    return psnr(shrunk, small.astype(np.float32) / np.float32(255))


def border_energy(luma: Plane, columns: list[int], rows: list[int]) -> float:
    """Return the gradient energy across window borders over that of the whole picture.

    ``bench.seams`` compares a border with the lines beside it, which needs no second picture. Here
    it is divided by that of the same lines of a picture without borders there: 1 is no seam then.
    """
    across = np.square(np.diff(luma.astype(np.float64), axis=1)).mean(axis=0)
    down = np.square(np.diff(luma.astype(np.float64), axis=0)).mean(axis=1)
    border = [across[c - 1] for c in columns] + [down[r - 1] for r in rows]
    return float(np.mean(border) / np.mean(np.concatenate([across, down])))
