"""One safe evaluation of the denoiser on many equal windows.

Half precision that yields NaN is run again in fp32, and a batch that does not fit into
memory is halved, so that neither ever shows in the picture.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tegula.errors import NumericalError, OutOfMemoryError
from tegula.models.bundle import Denoiser, WindowBatch
from tegula.models.devices import is_out_of_memory
from tegula.tiling.windows import balanced_batch


class SafeDenoiser:
    """A denoiser that answers in finite fp32 numbers or raises.

    Raises:
        NumericalError: NaN or infinity in fp32 too.
    """

    def __init__(self, denoiser: Denoiser, dtype: torch.dtype) -> None:
        self._denoiser = denoiser
        self._dtype = dtype
        self.reruns = 0

    def __call__(self, batch: WindowBatch) -> Tensor:
        """Return the prediction for a batch, fp32, shaped like its latents."""
        prediction = self._denoiser(batch).float()
        if torch.isfinite(prediction).all():
            return prediction
        if self._dtype != torch.float32:
            self.reruns += 1
            prediction = self._denoiser.to_dtype(torch.float32)(batch).float()
            if torch.isfinite(prediction).all():
                return prediction
        raise NumericalError(
            "The model returned NaN or infinity even in fp32; its weights are damaged, or a "
            "LoRA or the guidance scale is far too strong."
        )


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
