"""Finding faces and describing them by 128 numbers, with dlib.

Two pictures of one person are less than 0.6 apart in these numbers (dlib's own limit, at which it
tells the people of "Labeled Faces in the Wild" apart 99.4% right), two enlargements of one
photograph much less. dlib comes as ``dlib-bin``; its weights (MIT and CC0) are read where
``face-recognition-models`` put them, whose own code asks for a module that Python has dropped.
"""

from __future__ import annotations

import functools
import importlib.util
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from tegula.errors import MissingExtraError
from tegula.images.pixels import Float, to_bytes

Description = NDArray[np.float64]
"""[128], of a face; the Euclidean distance of two says how alike they are."""

VIEW, FACE = 224, 128
"""Pixels a side of the view of a face that is described, and of the face in its middle."""

_WEIGHTS = "face_recognition_models"
_LARGEST, _MOST_ENLARGED = 1_500_000, 4.0
"""Pixels at which faces are looked for, and how much a picture is enlarged to that at most."""
_CERTAIN = 0.25
"""dlib's score from which a find is a face; 0 takes badges and patterns for faces, too."""


@dataclass(frozen=True)
class FaceDescriber:
    """dlib's detector, landmarks and network; several threads may share them."""

    detector: Any
    landmarks: Any
    network: Any
    lock: threading.Lock = field(default_factory=threading.Lock)

    def detect(self, rgb: Float) -> NDArray[np.float64]:
        """Return left, top and side of each face as [n, 3], in pixels of the picture.

        Args:
            rgb: float32 [height, width, 3] in 0..1.
        """
        height, width = rgb.shape[:2]
        factor = min(_MOST_ENLARGED, (_LARGEST / (height * width)) ** 0.5)
        size = max(1, round(width * factor)), max(1, round(height * factor))
        kernel = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
        pixels = to_bytes(cv2.resize(rgb, size, interpolation=kernel))
        with self.lock:
            boxes, _, _ = self.detector.run(pixels, 0, _CERTAIN)
        found = [(box.left(), box.top(), box.width()) for box in boxes]
        squares: NDArray[np.float64] = np.array(found, np.float64).reshape(-1, 3) / factor
        return squares

    def place(self, view: Float) -> Any:
        """Return the landmarks of the face in a view, float32 [VIEW, VIEW, 3], for ``describe``."""
        import dlib

        start = (VIEW - FACE) // 2
        with self.lock:
            box = dlib.rectangle(start, start, start + FACE, start + FACE)
            return self.landmarks(to_bytes(view), box)

    def describe(self, view: Float, landmarks: Any) -> Description:
        """Describe the face in a view whose landmarks are known."""
        with self.lock:
            found = self.network.compute_face_descriptor(to_bytes(view), landmarks)
        return np.array(found, np.float64)


def can_describe() -> bool:
    """Tell whether dlib and its weights are installed, without importing either."""
    return importlib.util.find_spec("dlib") is not None and _weights() is not None


@functools.cache
def load_describer() -> FaceDescriber:
    """Load dlib's networks, once for all upscalers.

    Raises:
        MissingExtraError: dlib or its weights are not installed.
    """
    folder = _weights()
    if folder is None or not can_describe():
        raise MissingExtraError(
            "Comparing faces needs dlib-bin and face-recognition-models; run: "
            'pip install "tegula[faces]"'
        )
    import dlib

    return FaceDescriber(
        dlib.get_frontal_face_detector(),
        dlib.shape_predictor(str(folder / "shape_predictor_5_face_landmarks.dat")),
        dlib.face_recognition_model_v1(str(folder / "dlib_face_recognition_resnet_model_v1.dat")),
    )


def _weights() -> Path | None:
    spec = importlib.util.find_spec(_WEIGHTS)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / "models" / "dlib_face_recognition_resnet_model_v1.dat").is_file():
            return Path(folder) / "models"
    return None
