"""Losses of both stages; pictures are [n, 3 or 1, h, w] in 0..1, each loss one number a row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from bench.quality.judges import dists_terms
from tegula.models.mini.network import DEVIATIONS, dct_filters, to_blocks

_TEXTURE_CELL = 8
_ENERGY_CELL = 4
_ENERGY_FLOOR = 4e-6
_ENERGY_QUANTILE = 0.62
_FLAT_ENERGY = 16 * (1.5 / 255) ** 2
_DISTS_STABILITY = 1e-3
"""Features of EfficientNet are of order one, and those of its narrow layers around zero."""
_ARTEFACT_WINDOW = 7
_ARTEFACT_UNIT = 300
"""LDL weighs its loss a hundred times as much as plain pixels, which the first training of
``tegula-photo`` counts ten times with a weight of 0.3: so much is a weight of 1 here."""


def rows(loss: Tensor) -> Tensor:
    """Return the mean over everything but the rows."""
    return loss.flatten(1).mean(1)


def low_bands(predicted: Tensor, truth: Tensor) -> Tensor:
    """Return the squared error of the three lowest channels of the latents."""
    return rows((predicted[:, :3] - truth[:, :3]).square())


def perceptual(predicted: list[Tensor], truth: list[Tensor]) -> Tensor:
    """Return the distance of unit-normalised features, as LPIPS without learned weights.

    Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual
    Metric" (2018).
    """
    total = torch.zeros(predicted[0].shape[0], device=predicted[0].device)
    for a, b in zip(predicted, truth, strict=True):
        total = total + rows((_unit(a) - _unit(b)).square().sum(1, keepdim=True))
    return total / len(predicted)


def texture(predicted: list[Tensor], truth: list[Tensor]) -> Tensor:
    """Return how far local correlations of features are apart.

    The texture matching loss of Sajjadi et al., "EnhanceNet" (2017): Gram matrices of
    small neighbourhoods, so that texture has the right look without the right phase.
    """
    total = torch.zeros(predicted[0].shape[0], device=predicted[0].device)
    for a, b in zip(predicted, truth, strict=True):
        scale = b.float().square().mean() + 1e-4
        total = total + rows((_local_gram(a) - _local_gram(b)).abs()) / scale
    return total / len(predicted)


def dists(predicted: list[Tensor], truth: list[Tensor]) -> Tensor:
    """Return how unlike maps of features [n, c, h, w] are in texture and structure, 0 for equal.

    As DISTS (Ding et al., "Image Quality Assessment: Unifying Structure and Texture Similarity",
    2020): of every channel the means over the whole map are set side by side, and the covariance.
    All maps and both terms count the same; DISTS has learned weights, and features of VGG16.
    """
    total = torch.zeros(predicted[0].shape[0], device=predicted[0].device)
    for a, b in zip(predicted, truth, strict=True):
        look, structure = dists_terms(a.float(), b.float(), _DISTS_STABILITY)
        total = total + 1 - (look + structure) / 2
    return total / len(predicted)


def artefact_map(predicted: Tensor, average: Tensor, truth: Tensor) -> Tensor:
    """Return where a picture [n, 3, h, w] has artefacts, [n, 1, h, w], without gradients.

    The refined map of Liang et al., "Details or Artifacts: A Locally Discriminative Learning
    Approach to Realistic Image Super-Resolution" (LDL, 2022): the local variance of what is
    amiss, times the fifth root of its variance over the picture; zero where the picture is
    nearer to its truth than ``average`` is, which the averaged weights made: artefacts come and
    go from step to step, and details stay.
    """
    with torch.no_grad():
        amiss, usual = (
            (truth - each).float().abs().sum(1, keepdim=True) for each in (predicted, average)
        )
        edge = _ARTEFACT_WINDOW // 2
        padded = functional.pad(amiss, (edge, edge, edge, edge), "reflect")
        mean, power = (
            functional.avg_pool2d(each, _ARTEFACT_WINDOW, stride=1)
            for each in (padded, padded.square())
        )
        # A difference of two means; rounding may leave it a little below zero.
        local = (power - mean.square()).clamp(min=0)
        whole = amiss.var((1, 2, 3), keepdim=True).pow(0.2)
        return torch.where(amiss < usual, 0.0, local * whole)


def artefacts(predicted: Tensor, average: Tensor, truth: Tensor) -> Tensor:
    """Return how far pictures are from their truths, weighed by ``artefact_map``."""
    found = rows((predicted - truth).abs() * artefact_map(predicted, average, truth))
    return found * _ARTEFACT_UNIT


def source_kept(shrunk: Tensor, small: Tensor, true_shrunk: Tensor) -> Tensor:
    """Return how much farther from the source a result is, shrunk again, than its truth is.

    All are [n, 3, h, w] at the size of the source. A source without damage is what the truth
    shrinks to, and so must be the result; noise and JPEG's blocks are not asked for again.
    """
    allowed = (true_shrunk - small).abs()
    return rows(functional.relu((shrunk - small).abs() - allowed))


def statistics(predicted: list[Tensor], truth: list[Tensor]) -> Tensor:
    """Return how far the features of all rows together are from the truth's, one number.

    The Fréchet distance between the positions of both, to second order: with B the
    truth's covariance and D the difference, the squared norm of B^(-1/4) D B^(-1/4), over
    four times its trace. Unlike every other loss it does not compare row by row, so
    nothing is gained by staying below a texture that cannot be foreseen.
    """
    total = torch.zeros((), device=predicted[0].device)
    for a, b in zip(predicted, truth, strict=True):
        (mean_a, cov_a), (mean_b, cov_b) = _moments(a), _moments(b)
        values, vectors = torch.linalg.eigh(cov_b)
        power = values.clamp(min=1e-4 * float(values[-1])) ** -0.25
        whitening = (vectors * power) @ vectors.T
        change = (whitening @ (cov_a - cov_b) @ whitening).square().sum() / 4
        total = total + (change + (mean_a - mean_b).square().sum()) / values.sum()
    return total / len(predicted)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    positions = features.float().permute(1, 0, 2, 3).flatten(1)
    mean = positions.mean(1)
    centred = positions - mean[:, None]
    return mean, centred @ centred.T / positions.shape[1]


def band_energy(predicted: Tensor, truth: Tensor) -> Tensor:
    """Return the difference of log energies per 16 px window and DCT band of two planes.

    Keeps texture as strong as the truth's and flat areas as flat, wherever its crests
    lie. ``_ENERGY_FLOOR`` is half an 8-bit level: what lies below it cannot be seen. Too
    little costs more than too much, because what is uncertain would settle on the median
    of the logarithms, which is far below the mean of the energies.
    """
    a, b = (_log_energies(plane) for plane in (predicted, truth))
    price = torch.where(a < b, 2 * _ENERGY_QUANTILE, 2 * (1 - _ENERGY_QUANTILE))
    return rows((a - b).abs() * price)


def flat_excess(predicted: Tensor, truth: Tensor) -> Tensor:
    """Return the energy that windows with a flat truth have too much.

    In units of ``_FLAT_ENERGY``, and in proportion: a speck in a sky is seen at once.
    """
    a, b = (
        functional.avg_pool2d(to_blocks(plane)[:, 1:].square().sum(1, keepdim=True), _ENERGY_CELL)
        for plane in (predicted, truth)
    )
    excess = functional.relu(a - b) / _FLAT_ENERGY
    return rows(torch.where(b < _FLAT_ENERGY, excess, 0.0))


def _log_energies(plane: Tensor) -> Tensor:
    energy = functional.avg_pool2d(to_blocks(plane)[:, 1:].square(), _ENERGY_CELL)
    return torch.log(energy + _ENERGY_FLOOR)


def _unit(features: Tensor) -> Tensor:
    features = features.float()
    return features / (features.square().sum(1, keepdim=True) + 1e-4).sqrt()


def _local_gram(features: Tensor) -> Tensor:
    n, c, h, w = features.shape
    cell = min(_TEXTURE_CELL, h, w)
    cells = features.float().unfold(2, cell, cell).unfold(3, cell, cell)
    cells = cells.permute(0, 2, 3, 1, 4, 5).reshape(n, -1, c, cell * cell)
    return cells @ cells.transpose(2, 3) / (cell * cell)


def pictures_from(latents: Tensor, base: Tensor) -> Tensor:
    """Return base luma [n, 1, h, w] plus the difference that scaled latents hold."""
    weights = torch.tensor(DEVIATIONS, device=latents.device).view(1, -1, 1, 1)
    filters = dct_filters(device=latents.device)
    return base + functional.conv_transpose2d(latents.float() * weights, filters, stride=4)
