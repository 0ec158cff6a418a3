"""At which noise levels a denoiser runs whole, and where half of it is enough.

Encoder propagation, "Faster Diffusion" (Li et al., 2023): the features of the encoder and
of the ControlNet change slowly from level to level, so the levels between two key levels
run the decoder alone on the features of the key level before them. A ControlNet is part
of what is saved.

What the decoder answers there depends on those features and on the noise level, and not
on the latents of the level itself. So it is asked for all levels up to the next key level
at once, and what has to be remembered is predictions, never features.
"""

from __future__ import annotations

from dataclasses import dataclass

from tegula.diffusion.guidance import Guidance


def key_levels(guidance: Guidance, levels: int, every: int) -> tuple[bool, ...]:
    """Return for every noise level whether the denoiser runs whole.

    It does at the first two levels, where features change most, at the last one, which
    decides on the finest detail, and at every ``every``-th between; besides wherever
    guidance sets in or control is switched, since older features lack it.

    Args:
        guidance: how prompt and control steer the run.
        levels: of the run.
        every: 1 makes all levels key levels.
    """
    return tuple(
        level in (0, levels - 1)
        or (level - 1) % every == 0
        or _is_steered_anew(guidance, level, levels)
        for level in range(levels)
    )


def _is_steered_anew(guidance: Guidance, level: int, levels: int) -> bool:
    sets_in = guidance.guided(level, levels) and not guidance.guided(level - 1, levels)
    switched = guidance.control_at(level, levels) != guidance.control_at(level - 1, levels)
    return sets_in or switched


@dataclass(frozen=True)
class Rows:
    """Rows of one window over a whole run, for each half of the denoiser.

    Guidance makes two rows of a window. The ControlNet belongs to the encoder.
    """

    encoder: int
    decoder: int


def rows_of(guidance: Guidance, levels: int, every: int) -> Rows:
    """Count what one window takes that changes from the first level on."""
    rows = [2 if guidance.guided(level, levels) else 1 for level in range(levels)]
    keys = key_levels(guidance, levels, every)
    return Rows(sum(n for n, key in zip(rows, keys, strict=True) if key), sum(rows))
