"""Reads every file of a folder as tegula does: `python -m tests.corpus FOLDER`.

It prints how many files were read, the refusals by sentence with their number and an example,
what warnings say, headers that tell another size than the pixels have, and, where pyvips can be
imported, the pictures whose colours differ from those of libvips. The exit status is 1 when
anything but a sentence came of a file.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tegula.errors import TegulaError
from tegula.images.decode import Picture, decode
from tegula.images.open import upright_size

MAX_PIXELS = 2**27
TOLERANCE = 3.0
"""Of 255: pictures are as good as equal whose nearly worst pixel differs by no more."""
NEARLY_ALL = 99

Reader = Callable[[Path], "np.ndarray[Any, np.dtype[np.uint8]] | None"]


@dataclass
class Findings:
    """What came of the files, each by its sentence.

    read: how many became pictures.
    refused, warned, crashed: files by sentence.
    headers: files whose header tells another size.
    differing: files and the difference of their nearly worst pixel, of 255.
    compared: how many libvips read, too.
    own: files whose colour is told without a profile, which libvips does not follow.
    """

    read: int = 0
    compared: int = 0
    refused: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    warned: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    crashed: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    own: list[Path] = field(default_factory=list)
    headers: list[Path] = field(default_factory=list)
    differing: dict[Path, float] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """Yield what is printed."""
        groups = {"crashed": self.crashed, "refused": self.refused, "warned of": self.warned}
        total = self.read + sum(
            len(files) for files in [*self.refused.values(), *self.crashed.values()]
        )
        yield f"{total} files: {self.read} read"
        for what, by_sentence in groups.items():
            if by_sentence:
                yield f"{what}: {sum(map(len, by_sentence.values()))}"
            for sentence, files in sorted(by_sentence.items(), key=lambda each: -len(each[1])):
                yield f"  {len(files):5} {sentence}  ({files[0]})"
        for file in self.headers:
            yield f"header and pixels differ in size: {file}"
        if self.compared:
            yield f"compared with libvips: {self.compared}, of which {len(self.differing)} differ"
        if self.own:
            yield f"not compared, for libvips follows no gAMA, cHRM or cICP: {len(self.own)}"
        for file, difference in sorted(self.differing.items(), key=lambda each: -each[1]):
            yield f"  {difference:5.1f} of 255  {file}"


def examine(files: Sequence[Path], other: Reader | None = None) -> Findings:
    """Read the files and compare those that were read with what another reader makes of them."""
    found = Findings()
    for file in files:
        try:
            picture = decode(file, max_pixels=MAX_PIXELS)
            if upright_size(file, max_pixels=MAX_PIXELS) != picture.facts.size:
                found.headers.append(file)
        except TegulaError as error:
            found.refused[_sentence(error, file)].append(file)
            continue
        except Exception as error:  # noqa: BLE001, RUF100 - what is looked for
            found.crashed[f"{type(error).__name__}: {_sentence(error, file)}"].append(file)
            continue
        found.read += 1
        for warning in picture.facts.warnings:
            found.warned[warning].append(file)
        if other is not None and _has_own_colour(file):
            found.own.append(file)
            continue
        expected = None if other is None else other(file)
        if expected is not None:
            found.compared += 1
            difference = difference_of(picture, expected)
            if difference > TOLERANCE:
                found.differing[file] = difference
    return found


def _has_own_colour(file: Path) -> bool:
    """Tell whether a PNG file tells its colour by numbers, and not by a profile or as sRGB."""
    with file.open("rb") as opened:
        head = opened.read(2**16).partition(b"IDAT")[0]
    if not head.startswith(b"\x89PNG") or b"iCCP" in head:
        return False
    is_srgb = b"sRGB" in head
    return b"cICP" in head or (not is_srgb and (b"gAMA" in head or b"cHRM" in head))


def _sentence(error: Exception, file: Path) -> str:
    text = str(error).replace(str(file), "FILE")
    return re.sub(r"\d+(\.\d+)?", "N", text)


def difference_of(picture: Picture, expected: np.ndarray[Any, np.dtype[np.uint8]]) -> float:
    """Return how far the nearly worst pixel is off, of 255; 255 for another size.

    Colours under full transparency do not count.
    """
    rgb = picture.rgb if picture.beyond is None else picture.rgb + picture.beyond
    if expected.shape[:2] != rgb.shape[:2]:
        return 255.0
    off = np.abs(np.clip(rgb, 0, 1) * 255 - expected[..., :3]).max(axis=2)
    if picture.alpha is not None:
        off = off[picture.alpha > 0]
    return float(np.percentile(off, NEARLY_ALL)) if off.size else 0.0


def vips_reader() -> Reader | None:
    """Return what reads a file by libvips, upright and as sRGB of eight bits; None without it."""
    try:
        import pyvips
    except (ImportError, OSError):
        return None

    def read(file: Path) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
        try:
            image = pyvips.Image.new_from_file(str(file)).autorot()
            if "icc-profile-data" in image.get_fields():
                image = image.icc_transform("srgb", embedded=True, intent="relative")
            image = image.colourspace("srgb").cast("uchar")
            values = np.asarray(image.numpy())
        except pyvips.Error:
            return None
        values = values.reshape(*values.shape[:2], -1)
        return values if values.shape[2] >= 3 else np.repeat(values[..., :1], 3, axis=2)

    return read


def main(words: Sequence[str]) -> int:
    """Examine the files of a folder and those below it."""
    parser = argparse.ArgumentParser(prog="python -m tests.corpus", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(words).folder
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    other = vips_reader()
    found = examine(files, other)
    for line in found.lines():
        print(line)
    if other is None:
        print("not compared: pip install pyvips pyvips-binary")
    return 1 if found.crashed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
