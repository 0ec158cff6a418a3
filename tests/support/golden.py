"""What the stages made of seeded pictures before they ran by torch, to compare with.

``results`` runs them; the files in tests/unit/golden keep every fifth pixel of what numpy and
OpenCV made. They are not to be made anew: they are what the results must stay.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import colour_profiles
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from support import DEFAULTS

from tegula.images.pixels import Float

GOLDEN = Path(__file__).parents[1] / "unit" / "golden" / "pictures.npz"
EVERY = 5


def picture(height: int, width: int, seed: int = 0) -> Float:
    """Waves with grain, a flat patch and some hard lines, float32 [height, width, 3] in 0..1."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    rgb = np.stack(
        [0.5 + 0.4 * np.sin(x / (5 + c) + seed) * np.cos(y / (7 - c)) for c in range(3)], 2
    )
    rgb += rng.normal(0, 0.03, rgb.shape)
    rgb[height // 2 :, width // 2 :] = (0.9, 0.85, 0.8)
    rgb[height // 2 + 2 :: 4, width // 2 + 3 : -2] = 0.1
    return np.asarray(np.clip(rgb, 0, 1), np.float32)


def disc(height: int, width: int, soft: float) -> Float:
    y, x = np.mgrid[:height, :width].astype(np.float32)
    far = np.hypot(y - height / 2, x - width / 2) - min(height, width) / 3
    return np.asarray(np.clip(0.5 - far / soft, 0, 1), np.float32)


def file_of(rgb: Float, mode: str = "RGB", **parameters: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.rint(rgb * 255).astype(np.uint8)).convert(mode).save(
        buffer, "PNG", **parameters
    )
    return buffer.getvalue()


SOURCE, SIZE = picture(30, 40), (90, 72)
PRESCALED, REFINED = picture(72, 90, 1), picture(72, 90, 2)
DRAWN = disc(72, 90, 30.0)


def results(f: Any) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the name and the array of each result; ``f`` has the functions, for arrays."""
    large = picture(150, 200, 3)
    yield "lanczos", f.enlarge_lanczos(SOURCE, SIZE)
    yield "smaller", f.enlarge_lanczos(SOURCE, (17, 23))
    yield "box", f.resample_box(SOURCE, (33, 21), (3.3, 2.5, 31.75, 19.2))
    yield "wavelet", f.wavelet_lock(REFINED, PRESCALED)
    yield "adain", f.adain_lock(REFINED, PRESCALED)
    yield "adain by window", f.adain_lock(REFINED, PRESCALED, window=32)
    yield "drawings", f.hold_drawings(PRESCALED.copy(), SOURCE, DRAWN, 0.7)
    yield "detail", f.scale_detail(REFINED, PRESCALED, -0.4)
    yield "sharpened", f.sharpen(PRESCALED, 0.6)
    yield "fused", f.fuse_exposures(large, 0.5)
    with f.fused_at(10_000):
        yield "fused smaller", f.fuse_exposures(large, 0.8)
    yield "flatness", f.flatness(np.concatenate([large, np.full_like(large, 0.4)]))
    yield "cut-out", f.enlarge_alpha(np.rint(disc(30, 40, 1)), *SIZE)
    yield "soft alpha", f.enlarge_alpha(disc(30, 40, 3.0), *SIZE)
    for name, size in (("whole", (80, 60)), ("fraction", (67, 49))):
        held = f.enlarge_lanczos(SOURCE[::-1], size)
        f.hold_to_source(held, SOURCE)
        yield f"held {name}", held
    ceiling = f.enlarge_alpha(disc(30, 40, 3.0), 80, 60)[..., None]
    held = f.enlarge_lanczos(SOURCE[::-1], (80, 60)) * ceiling
    f.hold_to_source(held, SOURCE * disc(30, 40, 3.0)[..., None], ceiling)
    yield "held below alpha", held
    yield "mask", f.read_mask(file_of(SOURCE), (71, 53), 10**6, (0.1, 0.2, 0.7, 0.5))
    yield "net", f.prescale(SOURCE, (75, 60), f.net)
    yield "two passes", f.prescale(SOURCE, (220, 170), f.net)
    yield "mixed", f.prescale_mixed(SOURCE, SIZE, (f.net, f.net), DRAWN)
    yield "net's alpha", f.prescale_alpha(disc(30, 40, 1.5), SIZE, f.net)
    yield from finished(f)


def finished(f: Any) -> Iterator[tuple[str, NDArray[Any]]]:
    wide: dict[str, Any] = {"icc_profile": colour_profiles.wide_rgb()}
    alpha = Image.fromarray(np.rint(disc(30, 40, 3.0) * 255).astype(np.uint8))
    cut_out = Image.open(io.BytesIO(file_of(SOURCE)))
    cut_out.putalpha(alpha)
    deep = np.rint(SOURCE * 65535).astype(np.uint16)
    usual = {"detail": 0.3, "sharpen": 0.2, "colour_lock": "wavelet"}
    for name, source, changes, named in (
        ("plain", file_of(SOURCE), {}, {}),
        ("grey", file_of(SOURCE, "L"), {}, {}),
        ("kept grey", file_of(SOURCE), {"keep_grey": True}, {}),
        ("wide", file_of(SOURCE, **wide), {}, {}),
        ("wide and exact", file_of(SOURCE, **wide), {"exact": True}, {}),
        ("exact", file_of(SOURCE), {"exact": True}, {}),
        ("alpha", cut_out, {}, {}),
        ("exact alpha", cut_out, {"exact": True}, {}),
        ("deep", deep, {}, {}),
        ("masked", file_of(SOURCE), {"detail": 0.5}, {"mask": DRAWN}),
        ("drawn", file_of(SOURCE), {}, {"drawn": DRAWN}),
    ):
        done = f.finish(
            REFINED, PRESCALED, f.prepare(source), DEFAULTS.replaced(**usual | changes), **named
        )
        yield f"finished, {name}", np.asarray(done.image)
        if done.deep is not None:
            yield f"finished, {name}, 16 bits", done.deep.samples
        found = done.consistency
        yield f"consistency, {name}", np.array([found.mean, found.worst], np.float32)
