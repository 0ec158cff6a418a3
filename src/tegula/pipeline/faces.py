"""Faces: every face is turned upright, restored by a net, and laid back over the result.

A face is brought onto the template that face models are trained on: the five landmarks of
the FFHQ photographs at 512 x 512 pixels, by the turn, scale and shift that fit best. What
the net returns takes its coarse tones from the face that went in, as the colour lock of
the picture says, and fades into the result over an eighth of its side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from tegula.images.pixels import Float, Size
from tegula.models.faces.networks import SIDE, Face, FaceDetector, FaceRestorer
from tegula.models.prescalers import Prescaler
from tegula.options import ResolvedOptions
from tegula.pipeline.adjust import lock_colour
from tegula.pipeline.pictures import Patch, on_device, on_host
from tegula.pipeline.prescale import prescale
from tegula.progress import SILENT, Cancel, StageProgress

Matrix = NDArray[np.float64]
Restore = Callable[[Float], Float]
"""Maps a face, float32 [512, 512, 3] in 0..1, to a square one of that or a larger side."""

FEATHER = 64
"""Pixels of the template over which a face fades out."""
TEMPLATE = np.array(
    [
        [192.98, 239.95],
        [318.90, 240.19],
        [256.63, 314.02],
        [201.26, 371.41],
        [313.09, 371.15],
    ]
)
"""Left eye, right eye, nose, left and right corner of the mouth."""
LEAST_EYE_DISTANCE = 5
"""Pixels of the source; what is smaller holds no face that could be restored."""
_MARGIN = 4
"""Pixels of the template around a face that warping may read."""
_HOST = torch.device("cpu")
"""Where faces are turned and warped: they are small."""
NONE_FOUND = "No face was found, so none was restored."


@dataclass(frozen=True)
class FaceWork:
    """What it takes to restore the faces of a picture.

    enlarger: makes restored faces larger where the result shows them larger than the
        restorer does; None leaves that to resampling.
    """

    detector: FaceDetector
    restorer: FaceRestorer
    enlarger: Prescaler | None
    options: ResolvedOptions

    def __call__(self, rgb: Float, cancel: Cancel) -> tuple[Patch, ...]:
        """Return what to lay over the result of a source, float32 [height, width, 3]."""
        size = self.options.width, self.options.height
        faces = self.detector.detect(rgb)
        return restored_faces(rgb, size, faces, self._restored, self._enlarge(cancel), cancel)

    def _restored(self, face: Float) -> Float:
        restored = self.restorer.restore(face, self.options.face_fidelity)
        result, origin = (on_device(each, _HOST) for each in (restored, face))
        return on_host(lock_colour(result, origin, self.options).clamp(0, 1))

    def _enlarge(self, cancel: Cancel) -> Restore | None:
        enlarger = self.enlarger
        if enlarger is None:
            return None
        progress = StageProgress(cancel=cancel)
        size = 2 * SIDE, 2 * SIDE
        return lambda face: on_host(
            prescale(on_device(face, _HOST), size, enlarger, progress=progress)
        )


def restored_faces(
    rgb: Float,
    target: Size,
    faces: Sequence[Face],
    restore: Restore,
    enlarge: Restore | None = None,
    cancel: Cancel = SILENT.cancel,
) -> tuple[Patch, ...]:
    """Restore the faces of a picture.

    Args:
        rgb: float32 [height, width, 3] in 0..1, in which the faces were found.
        target: width and height of the result.
        faces: where they are; those that are too small are left out.
        restore: applied to each aligned face.
        enlarge: applied to restored faces that the result shows larger than 512 pixels.
        cancel: checked before each face.

    Returns:
        What to lay over the result, the smallest face first.

    Raises:
        CancelledError: the caller wants to stop.
    """
    matrices = [matrix for face in faces if (matrix := alignment(face)) is not None]
    height, width = rgb.shape[:2]
    to_result = _scaling(target[0] / width, target[1] / height)
    patches = []
    for matrix in sorted(matrices, key=_scale, reverse=True):
        cancel.check()
        back = _times(to_result, _inverse(matrix))
        face = restore(aligned(rgb, matrix))
        if enlarge is not None and _scale(back) > 1:
            face = enlarge(face)
        patch = _placed(face, back, target)
        patches += [patch] if patch is not None else []
    return tuple(patches)


def alignment(face: Face) -> Matrix | None:
    """Return the 2 x 3 matrix from the picture to the template; None: there is none."""
    if np.hypot(*(face.points[1] - face.points[0])) < LEAST_EYE_DISTANCE:
        return None
    matrix: Matrix | None
    matrix, _ = cv2.estimateAffinePartial2D(
        face.points.astype(np.float64), TEMPLATE, method=cv2.LMEDS
    )
    if matrix is None or not np.isfinite(matrix).all() or _scale(matrix) < 1e-3:
        return None
    return matrix


def aligned(rgb: Float, matrix: Matrix) -> Float:
    """Return the face as float32 [512, 512, 3]; mirrored where it leaves the picture."""
    height, width = rgb.shape[:2]
    margin = round(_MARGIN / min(1.0, _scale(matrix)))
    left, top, right, bottom = _bounds(_inverse(matrix), (width, height), margin)
    if right <= left or bottom <= top:
        return np.full((SIDE, SIDE, 3), 0.5, np.float32)
    moved = _times(matrix, np.array([[1.0, 0, left], [0, 1, top]]))
    return _warped(rgb[top:bottom, left:right], moved, (SIDE, SIDE), cv2.BORDER_REFLECT_101)


def _placed(face: Float, back: Matrix, target: Size) -> Patch | None:
    """Bring a restored face to its place in the result."""
    left, top, right, bottom = _bounds(back, target)
    if right <= left or bottom <= top:
        return None
    back = _times(np.array([[1.0, 0, -left], [0, 1, -top]]), back)
    size = right - left, bottom - top
    smaller = SIDE / face.shape[0]
    pixels = _warped(face, _times(back, _scaling(smaller, smaller)), size)
    return Patch(left, top, pixels, _warped(_feather(), back, size, cv2.BORDER_CONSTANT))


def _feather() -> Float:
    """Return the weight of a face's pixels: 1 inside, falling to 0 at the edges."""
    distance = np.minimum(np.arange(SIDE), np.arange(SIDE)[::-1])
    edge = np.sin(np.clip(distance / FEATHER, 0, 1) * np.pi / 2) ** 2
    weight: Float = np.outer(edge, edge).astype(np.float32)
    return weight


def _bounds(back: Matrix, size: Size, margin: int = 0) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of a placed template within a picture."""
    corners = np.array([[0, 0], [SIDE, 0], [0, SIDE], [SIDE, SIDE]], np.float64) - 0.5
    placed = corners @ back[:, :2].T + back[:, 2]
    low = np.clip(np.floor(placed.min(0)) - margin, 0, size).astype(int)
    high = np.clip(np.ceil(placed.max(0)) + 1 + margin, 0, size).astype(int)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def _warped(
    picture: Float, matrix: Matrix, size: Size, border: int = cv2.BORDER_REPLICATE
) -> Float:
    """Warp a picture; where it shrinks, its pixels are averaged first."""
    shrink = _scale(matrix)
    if shrink < 1:
        height, width = (max(1, round(side * shrink)) for side in picture.shape[:2])
        smaller = _scaling(picture.shape[1] / width, picture.shape[0] / height)
        picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
        matrix = _times(matrix, smaller)
    warped: Float = cv2.warpAffine(picture, matrix, size, flags=cv2.INTER_CUBIC, borderMode=border)
    return warped.clip(0, 1)


def _scale(matrix: Matrix) -> float:
    return float(np.sqrt(abs(np.linalg.det(matrix[:, :2]))))


def _scaling(x: float, y: float) -> Matrix:
    """Return the enlargement of pixels that lie at whole numbers, not at halves."""
    return np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2]])


def _inverse(matrix: Matrix) -> Matrix:
    inverse: Matrix = cv2.invertAffineTransform(matrix)
    return inverse


def _times(later: Matrix, earlier: Matrix) -> Matrix:
    product: Matrix = later @ np.vstack([earlier, [0, 0, 1]])
    return product
