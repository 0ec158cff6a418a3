"""A picture as a screen shows it: in tiles, of which a screen needs but a few, and small.

Level 0 has the picture's own pixels, without loss, so that single ones can be looked at; each
further level is half as large as the one before, until one tile holds it all.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from tegula.images.decode import decode
from tegula.images.open import check_size, open_image
from tegula.images.pixels import to_image
from tegula.images.xmp import settings_of

TILE = 512
"""Side of a tile in pixels."""

THUMBNAIL = 320
"""Longest side of a thumbnail in pixels, at most."""

MANIFEST = "manifest.json"
_QUALITY = 90
_PLAIN_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA"})


def cut_tiles(source: Path, folder: Path, max_pixels: int) -> None:
    """Cut a picture into tiles, level by level, and write what there is beside them.

    Raises:
        ImageError: it cannot be decoded.
    """
    image, settings = _opened(source, max_pixels)
    width, height = image.size
    building = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        levels: list[dict[str, Any]] = []
        while True:
            number = len(levels)
            kind = "png" if number == 0 or image.mode == "RGBA" else "jpg"
            levels.append({"width": image.width, "height": image.height, "kind": kind})
            (building / str(number)).mkdir()
            for top in range(0, image.height, TILE):
                for left in range(0, image.width, TILE):
                    box = (left, top, min(left + TILE, image.width), min(top + TILE, image.height))
                    path = building / str(number) / f"{left // TILE}-{top // TILE}.{kind}"
                    # The first level is exact, so that single pixels can be looked at.
                    if kind == "png":
                        image.crop(box).save(path, compress_level=1)
                    else:
                        image.crop(box).save(path, quality=_QUALITY, subsampling=0)
            if max(image.size) <= TILE:
                break
            image = image.resize(
                (-(-image.width // 2), -(-image.height // 2)), Image.Resampling.BOX, reducing_gap=2
            )
        manifest = {
            "width": width,
            "height": height,
            "tile": TILE,
            "levels": levels,
            "settings": settings,
        }
        (building / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def draw_thumbnail(source: Path, path: Path, max_pixels: int) -> None:
    """Write a small JPEG of a picture; what is transparent becomes white.

    Raises:
        ImageError: it cannot be decoded.
    """
    image, _ = _opened(source, max_pixels, small=True)
    image.thumbnail((THUMBNAIL, THUMBNAIL), reducing_gap=2)
    if image.mode == "RGBA":
        flat = Image.new("RGB", image.size, "white")
        flat.paste(image, mask=image.getchannel("A"))
        image = flat
    building = path.with_suffix(".new")
    image.save(building, "JPEG", quality=_QUALITY)
    building.replace(path)


def _opened(
    source: Path, max_pixels: int, *, small: bool = False
) -> tuple[Image.Image, dict[str, Any] | None]:
    """Return a picture as a screen shows it, RGB or RGBA, and the settings that it carries.

    Eight bits without a profile, as nearly all results have them, are taken as they are: the way
    over floating point that ``decode`` takes would need four times the memory.
    """
    settings = None
    with source.open("rb") as file:
        image = open_image(file, "The picture")
        if image is not None:
            check_size(*image.size, max_pixels, "The picture")
            settings = settings_of(image)
            if image.mode in _PLAIN_MODES and "icc_profile" not in image.info:
                if small:
                    image.draft(None, (2 * THUMBNAIL, 2 * THUMBNAIL))
                try:
                    upright = ImageOps.exif_transpose(image)
                    has_alpha = image.has_transparency_data
                    return upright.convert("RGBA" if has_alpha else "RGB"), settings
                except (OSError, ValueError, SyntaxError):
                    pass  # ``decode`` repairs what is damaged
    picture = decode(source, max_pixels=max_pixels)
    return to_image(picture.rgb, picture.alpha), settings
