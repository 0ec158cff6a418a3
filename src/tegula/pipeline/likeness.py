"""Likeness: people stay recognisable in their faces.

In faces the denoise strength falls and the control scale rises, the more the smaller they are: of
a face of a few pixels diffusion makes another. The finished face is compared with that of the
source by what dlib sees in both; where it is too far, it is blended with the prescaled face,
softly and only as far as it takes; where that is too far itself, as small faces often are, with
the source's own face, resampled. That of a net which had to guess it goes back without diffusion,
too. Without dlib faces are found by the detector of the restorers,
and only strength and control change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tegula.errors import MissingExtraError
from tegula.images.pixels import Float, Size
from tegula.models.faces.likeness import (
    FACE,
    VIEW,
    Description,
    FaceDescriber,
    can_describe,
    load_describer,
)
from tegula.models.faces.networks import Face, load_detector
from tegula.models.prescalers import LANCZOS, find_packaged
from tegula.options import ResolvedOptions
from tegula.pipeline.pictures import (
    extend,
    on_device,
    on_host,
    resample_box,
    resize_area,
    resize_cubic,
)
from tegula.pipeline.prepare import Placed, Prepared, SpatialControl

USUAL_LIKENESS = 0.5
"""Where the caller leaves it open and faces can be compared."""

SAME_PERSON = 0.6
"""dlib's distance below which two faces are of one person; likeness takes its share off."""

_LOOSER = 7 / 6
"""Times the limit, to which a face whose prescaled one is too far goes towards the source's own:
0.35 at the usual likeness. Further would cost it more sharpness than likeness is worth."""

_LEFT_ALONE, _LARGE = 24, 128
"""Pixels of the source: faces below the one are not refined, from the other on most freely."""
_SMALL_SHARE, _LARGE_SHARE = 0.3, 0.7
"""Shares of the denoise strength at the usual likeness, in small faces and in large ones."""

_HOST = torch.device("cpu")
_MOST_FACES = 64
_BISECTIONS = 6
_POINTS_TO_SIDE = 2.4
"""Side of dlib's box over the distance of the eyes, or of the eyes to the mouth."""


@dataclass(frozen=True)
class FoundFace:
    """A face of the source: a square from the brows to the chin, in whole pixels."""

    left: int
    top: int
    side: int


@dataclass(frozen=True)
class FaceReport:
    """How like its source a finished face is.

    left, top, side: of the face, in pixels of the source.
    before, after: dlib's distance without and with the guard; below 0.6 it is the same person.
    """

    left: int
    top: int
    side: int
    before: float
    after: float


def find_faces(rgb: Float) -> tuple[FoundFace, ...]:
    """Return the faces of a source, the largest first; none where nothing can find them.

    dlib sees faces from the front, the restorers' detector also those that are turned.

    Args:
        rgb: float32 [height, width, 3] in 0..1.
    """
    boxes: list[tuple[float, float, float]] = []
    if can_describe():
        boxes += [(left, top, side) for left, top, side in load_describer().detect(rgb)]
    with contextlib.suppress(MissingExtraError):
        boxes += [_square(face) for face in load_detector().detect(rgb)]
    found: list[FoundFace] = []
    for left, top, side in boxes:
        face = FoundFace(round(left), round(top), max(1, round(side)))
        if not any(_overlap(face, other) for other in found):
            found.append(face)
    return tuple(sorted(found, key=lambda face: -face.side)[:_MOST_FACES])


def control_by_faces(
    source: Placed, options: ResolvedOptions, control: SpatialControl
) -> tuple[Sequence[FoundFace], SpatialControl]:
    """Return the faces that are to stay alike, and how much less the picture changes in them.

    Args:
        source: in which they are looked for, if anything is to change at all.
        options: resolved for it.
        control: without regard to faces.
    """
    prepared, size = source.prepared, (options.width, options.height)
    changes = options.refines or options.faces or _bends_faces(options, prepared.size)
    if options.likeness == 0 or not changes:
        return (), control
    faces = find_faces(prepared.rgb)
    if not options.refines:
        return faces, control
    share = strength_in_faces(faces, prepared.size, size, options.likeness, source.rgb.device)
    if share is None:
        return faces, control
    weight = control_in_faces(share)
    if control.strength_map is not None:
        share = share * control.strength_map
    return faces, dataclasses.replace(control, strength_map=share, weight=weight)


def _bends_faces(options: ResolvedOptions, source: Size) -> bool:
    """Return whether the prescaler alone may make another of a small face.

    An exact result is held to its source anyway, and a drawn face is not a person's.
    """
    entry = find_packaged(options.prescaler)
    draws = entry is not None and entry.facts.draws
    is_larger = options.width > source[0] or options.height > source[1]
    return options.prescaler != LANCZOS and is_larger and not (draws or options.exact)


@torch.inference_mode()
def strength_in_faces(
    faces: Sequence[FoundFace], source: Size, target: Size, likeness: float, device: torch.device
) -> Tensor | None:
    """Return the share of the denoise strength at each pixel of the result; None is all of it.

    Args:
        faces: of the source.
        source: its width and height.
        target: those of the result.
        likeness: 0..1.
        device: where the answer is to lie.
    """
    if not faces or likeness == 0:
        return None
    share = torch.ones((target[1], target[0]), device=device)
    for face in faces:
        rows, columns, weight = _soft(face, source, target, device)
        part = share[rows, columns]
        torch.minimum(part, 1 - weight * (1 - _share(face.side, likeness)), out=part)
    return share


def control_in_faces(share: Tensor) -> Tensor:
    """Return what the control scale is multiplied by, for a share of the denoise strength.

    It rises by half of what the strength falls by: to 1.5 in faces that are left alone, beyond
    which a ControlNet draws hard edges.
    """
    return 1 + (1 - share) / 2


@dataclass(frozen=True)
class LikenessGuard:
    """Compares finished faces with those of the source, and takes back what is too far.

    rgb: the source, float32 [height, width, 3] in 0..1, in which the faces were found.
    """

    describer: FaceDescriber
    rgb: Float
    faces: Sequence[FoundFace]
    likeness: float

    @classmethod
    def of(
        cls, prepared: Prepared, faces: Sequence[FoundFace], likeness: float
    ) -> LikenessGuard | None:
        """Return the guard of the faces of a source; None where nothing can compare them."""
        if not faces or not can_describe():
            return None
        return cls(load_describer(), prepared.rgb, faces, likeness)

    @torch.inference_mode()
    def hold(self, done: Tensor, prescaled: Tensor) -> tuple[Tensor, tuple[FaceReport, ...]]:
        """Return a finished picture whose faces are near enough, and how near each is.

        Args:
            done: float32 [height, width, 3]; comes back itself where nothing had to change.
            prescaled: of the same shape.
        """
        limit, reports, held = SAME_PERSON * (1 - self.likeness), [], done
        source, own_picture = (self.rgb.shape[1], self.rgb.shape[0]), on_device(self.rgb, _HOST)
        target = done.shape[1], done.shape[0]
        for face in self.faces:
            distance = self._distance_from(face)
            view, prescaled_view, own = (
                _view(each, face, source) for each in (held, prescaled, own_picture)
            )
            inside = _view(_mask(face, source), face, source)
            rows, columns, weight = _soft(face, source, target, done.device)
            after = before = distance(view)
            for anchor, most in ((prescaled_view, limit), (own, _LOOSER * limit)):
                share, after = _least_share(view, anchor, inside, distance, after, most)
                if share == 0:
                    continue
                held = held.clone() if held is done else held
                view = view + (anchor - view) * (inside * np.float32(share))
                towards = prescaled[rows, columns]
                if anchor is own:
                    resampled = _resampled(own_picture, rows, columns, target)
                    towards = resampled.to(done.device)
                held[rows, columns].lerp_(towards, (weight * share)[..., None])
            reports.append(FaceReport(face.left, face.top, face.side, before, after))
        return held, tuple(reports)

    def _distance_from(self, face: FoundFace) -> Callable[[Float], float]:
        """Return what measures how far the face in a view is from that of the source."""
        own = _view(on_device(self.rgb, _HOST), face, (self.rgb.shape[1], self.rgb.shape[0]))
        # Places of the source for both: what is compared is the face, not where it is found.
        landmarks = self.describer.place(own)
        description: Description = self.describer.describe(own, landmarks)

        def distance(view: Float) -> float:
            seen = self.describer.describe(view, landmarks)
            return float(np.linalg.norm(seen - description))

        return distance


def _least_share(
    view: Float,
    anchor: Float,
    inside: Float,
    distance: Callable[[Float], float],
    before: float,
    limit: float,
) -> tuple[float, float]:
    """Return the least share of an anchor with which a face is near enough, and its distance then.

    Where not even the anchor is near enough, it is taken whole if it is nearer.
    """
    if before <= limit:
        return 0.0, before
    at_full = distance(view + (anchor - view) * inside)
    if at_full >= before:
        return 0.0, before
    low, high, after = 0.0, 1.0, at_full
    for _ in range(_BISECTIONS if at_full < limit else 0):
        middle = (low + high) / 2
        found = distance(view + (anchor - view) * (inside * np.float32(middle)))
        if found <= limit:
            high, after = middle, found
        else:
            low = middle
    return high, after


def _resampled(rgb: Tensor, rows: slice, columns: slice, target: Size) -> Tensor:
    """Return a part of a result as plain resampling of the source makes it."""
    across, down = rgb.shape[1] / target[0], rgb.shape[0] / target[1]
    box = columns.start * across, rows.start * down, columns.stop * across, rows.stop * down
    return resample_box(rgb, (columns.stop - columns.start, rows.stop - rows.start), box)


def _share(side: int, likeness: float) -> float:
    """Return the share of the denoise strength in a face of this side."""
    if side < _LEFT_ALONE:
        return 0.0
    sizes, shares = (_LEFT_ALONE, _LARGE), (_SMALL_SHARE, _LARGE_SHARE)
    usual = float(np.interp(side, sizes, shares))
    return max(0.0, 1 - (1 - usual) * likeness / USUAL_LIKENESS)


def _square(face: Face) -> tuple[float, float, float]:
    """Return left, top and side of a face by its landmarks, as dlib would draw it."""
    eyes, mouth = face.points[:2].mean(0), face.points[3:].mean(0)
    apart = max(np.hypot(*(face.points[1] - face.points[0])), np.hypot(*(mouth - eyes)))
    side, middle = _POINTS_TO_SIDE * float(apart), (eyes + mouth) / 2
    return float(middle[0]) - side / 2, float(middle[1]) - side / 2, side


def _overlap(face: FoundFace, other: FoundFace) -> bool:
    apart = max(
        abs((a + face.side / 2) - (b + other.side / 2))
        for a, b in ((face.left, other.left), (face.top, other.top))
    )
    return apart < max(face.side, other.side) / 2


def _view(picture: Tensor, face: FoundFace, source: Size) -> Float:
    """Return a square around a face, float32 [VIEW, VIEW, channels], continued at the edges.

    It is made small where the picture lies, and describers look at it on the host.

    Args:
        picture: the source, or what it became at any size.
        face: in pixels of the source.
        source: width and height of the source.
    """
    around = face.side * (VIEW - FACE) / (2 * FACE)
    ends, borders = [], []
    for start, length, own in (
        (face.top, picture.shape[0], source[1]),
        (face.left, picture.shape[1], source[0]),
    ):
        first = round((start - around) * length / own)
        last = max(first + 1, round((start + face.side + around) * length / own))
        inside = min(max(first, 0), length - 1), min(max(last, 1), length)
        ends.append(slice(*inside))
        borders += [inside[0] - first, last - inside[1]]
    above, below, left, right = borders
    part = extend(picture[ends[0], ends[1]], (above, below), (left, right), "edge")
    resized = (resize_area if part.shape[0] > VIEW else resize_cubic)(part, (VIEW, VIEW))
    return on_host(resized.clamp(0, 1))


def _mask(face: FoundFace, source: Size) -> Tensor:
    """Return the soft weight of a face over its source, [height, width, 1]."""
    mask = torch.zeros((source[1], source[0], 1))
    rows, columns, weight = _soft(face, source, source, _HOST)
    mask[rows, columns, 0] = weight
    return mask


def _soft(
    face: FoundFace, source: Size, target: Size, device: torch.device
) -> tuple[slice, slice, Tensor]:
    """Return the rows and columns that a face takes in a result, and its soft weight there.

    It is 1 over the face with hair and chin, and falls to 0 at a distance of its side.
    """
    slices, offsets = [], []
    for start, length, own in ((face.top, target[1], source[1]), (face.left, target[0], source[0])):
        half = face.side / 2
        low, high = (start + half + way * 2 * half for way in (-1, 1))
        first = min(max(0, int(low * length / own)), length)
        last = max(first, min(length, int(np.ceil(high * length / own))))
        slices.append(slice(first, last))
        places = (np.arange(first, last) + 0.5) * own / length
        offsets.append(on_device(((places - (start + half)) / half).astype(np.float32), device))
    far = torch.hypot(offsets[0][:, None], offsets[1][None])
    fall = (2 - far).clamp_(0, 1)
    weight = torch.sin((fall / 0.8).clamp_(max=1) * (math.pi / 2)).square_()
    return slices[0], slices[1], weight
