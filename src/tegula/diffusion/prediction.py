"""One safe evaluation of the denoiser on many equal windows.

Half precision that yields NaN is run again in fp32, and a batch that does not fit into
memory is halved, so that neither ever shows in the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from tegula.errors import NumericalError, OutOfMemoryError
from tegula.models.bundle import Denoiser, SplitDenoiser, WindowBatch
from tegula.models.devices import is_out_of_memory
from tegula.tiling.windows import balanced_batch

Level = tuple[Tensor, slice]
"""The timestep of a noise level and rows of a batch."""


class SafeDenoiser:
    """A denoiser that answers in finite fp32 numbers or raises.

    Raises:
        NumericalError: NaN or infinity in fp32 too.
    """

    def __init__(self, denoiser: Denoiser, dtype: torch.dtype) -> None:
        self._denoiser = denoiser
        self._dtype = dtype
        self.reruns = 0

    @property
    def splits(self) -> bool:
        """Tell whether ``ahead`` can be called."""
        return isinstance(self._denoiser, SplitDenoiser)

    def __call__(self, batch: WindowBatch) -> Tensor:
        """Return the prediction for a batch, fp32, shaped like its latents."""
        return self._finite(lambda denoiser: [denoiser(batch)])[0]

    def ahead(self, batch: WindowBatch, levels: Sequence[Level]) -> Sequence[Tensor]:
        """Return the predictions at several noise levels from one run of the encoder.

        Args:
            batch: at the first of the levels.
            levels: timestep and the rows of the batch that are wanted there.
        """

        def run(denoiser: Denoiser) -> list[Tensor]:
            split = cast("SplitDenoiser", denoiser)
            features = split.encode(batch)
            return [
                split.decode(tuple(part[rows] for part in features), timestep, batch.text[rows])
                for timestep, rows in levels
            ]

        return self._finite(run)

    def _finite(self, run: Callable[[Denoiser], list[Tensor]]) -> list[Tensor]:
        predictions = [prediction.float() for prediction in run(self._denoiser)]
        if _are_finite(predictions):
            return predictions
        if self._dtype != torch.float32:
            self.reruns += 1
            whole = self._denoiser.to_dtype(torch.float32)
            predictions = [prediction.float() for prediction in run(whole)]
            if _are_finite(predictions):
                return predictions
        raise NumericalError(
            "The model returned NaN or infinity even in fp32; its weights are damaged, or a "
            "LoRA or the guidance scale is far too strong."
        )


def _are_finite(predictions: Sequence[Tensor]) -> bool:
    return all(bool(torch.isfinite(prediction).all()) for prediction in predictions)


class HalvingBatch:
    """A batch size that shrinks when memory runs out and never grows back."""

    def __init__(self, size: int) -> None:
        self.size = size

    def run(self, evaluate: Callable[[int, int], None], count: int) -> None:
        """Call ``evaluate(start, end)`` over ``count`` windows in equal runs of at most ``size``.

        Raises:
            OutOfMemoryError: a single window does not fit.
        """
        start = 0
        while start < count:
            end = start + balanced_batch(count - start, self.size)
            try:
                evaluate(start, end)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(end - start)
            else:
                start = end

    def _halve(self, failed: int) -> None:
        if failed == 1:
            raise OutOfMemoryError(
                "A single window does not fit into memory; choose a smaller window or a "
                "machine with more memory."
            )
        self.size = failed // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
