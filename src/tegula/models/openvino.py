"""Denoisers converted to OpenVINO, for processors.

UNet and ControlNet become one model with fixed shapes, for each of a few batch sizes. What
was converted is kept in the cache folder. Everything but the denoiser stays with torch.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
import warnings
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tegula.errors import MissingExtraError, OptionError
from tegula.folders import cache_folder
from tegula.models.bundle import Bundle, ControlImage, Denoiser, WindowBatch
from tegula.models.compiled import CompilableDenoiser, ControlKind, Evaluation
from tegula.models.static_batches import StaticDenoiser

BATCH_SIZES = (2, 1)
"""Larger batches gain nothing on a processor, and each size takes memory of its own."""


def convert_bundle(bundle: Bundle) -> Bundle:
    """Return a bundle whose denoiser runs on OpenVINO; shapes are converted as they come.

    Raises:
        MissingExtraError: OpenVINO is not installed.
        OptionError: the bundle does not say which networks it runs.
    """
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "The backend openvino is not installed: pip install 'tegula[openvino]'"
        ) from error
    if not isinstance(bundle.denoiser, CompilableDenoiser):
        raise OptionError(f"The networks of {bundle.facts.name} cannot be converted.")
    denoiser = OpenVinoDenoiser(bundle.denoiser, bundle.facts.fingerprint, bundle.dtype)
    static = StaticDenoiser(denoiser, bundle.denoiser, BATCH_SIZES)
    return replace(bundle, denoiser=static, with_loras=None)


class OpenVinoDenoiser:
    """Runs a denoiser as OpenVINO models, one for each shape of batch.

    Args:
        denoiser: what is converted; it embeds the control windows itself.
        fingerprint: of its weights, part of the names of cached files.
        dtype: what the models compute in: float32, or bfloat16 for anything shorter.
    """

    def __init__(self, denoiser: Denoiser, fingerprint: str, dtype: torch.dtype) -> None:
        self._denoiser = denoiser
        self._fingerprint = fingerprint
        self._dtype = dtype
        self._models: dict[str, Any] = {}
        self._lock = threading.Lock()

    def embed_control(self, control: ControlImage) -> Tensor:
        """Embed the control windows with torch."""
        return self._denoiser.embed_control(control)

    def __call__(self, batch: WindowBatch) -> Tensor:
        """Return the prediction, float32; guess mode runs on torch."""
        scale = batch.control_scale
        # diffusers fades the blocks of guess mode with logspace, which OpenVINO lacks.
        if scale is not None and scale.guess_mode:
            return self._denoiser(batch)
        inputs = _inputs(batch)
        with self._lock:
            model = self._model(batch, inputs)
            result = model([each.numpy() for each in inputs.values()])[0]
            return torch.from_numpy(result.copy())

    def to_dtype(self, dtype: torch.dtype) -> Denoiser:
        """Return the original denoiser, which runs on torch, in another precision."""
        return self._denoiser.to_dtype(dtype)

    def _model(self, batch: WindowBatch, inputs: dict[str, Tensor]) -> Any:
        name = self._cache_name(batch, inputs)
        if name not in self._models:
            import openvino

            path = cache_folder() / "openvino" / f"{name}.xml"
            if not path.is_file():
                self._convert(batch, inputs, path)
            settings = {
                "INFERENCE_PRECISION_HINT": "f32" if self._dtype == torch.float32 else "bf16",
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "PERFORMANCE_HINT": "LATENCY",
            }
            self._models[name] = openvino.Core().compile_model(str(path), "CPU", settings)
        return self._models[name]

    def _cache_name(self, batch: WindowBatch, inputs: dict[str, Tensor]) -> str:
        scale, shapes = batch.control_scale, [tuple(each.shape) for each in inputs.values()]
        parts = (metadata.version("openvino"), metadata.version("tegula"), self._dtype)
        key = repr((self._fingerprint, *parts, shapes, scale is not None))
        return hashlib.sha256(key.encode()).hexdigest()[:24]

    def _convert(self, batch: WindowBatch, inputs: dict[str, Tensor], path: Path) -> None:
        import openvino

        denoiser = self._denoiser.to_dtype(torch.float32)
        assert isinstance(denoiser, CompilableDenoiser)  # noqa: S101 - convert_bundle saw to it
        with warnings.catch_warnings(), torch.inference_mode(mode=False), torch.no_grad():
            warnings.simplefilter("ignore")
            model = openvino.convert_model(
                Evaluation(denoiser, ControlKind.of(batch)),
                example_input=tuple(each.clone() for each in inputs.values()),
                input=[tuple(each.shape) for each in inputs.values()],
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as part:
            whole_file = Path(part, path.name)
            openvino.save_model(
                model, str(whole_file), compress_to_fp16=self._dtype != torch.float32
            )
            # The weights first: a model counts as converted when its .xml is there.
            for suffix in (".bin", ".xml"):
                whole_file.with_suffix(suffix).replace(path.with_suffix(suffix))


def _inputs(batch: WindowBatch) -> dict[str, Tensor]:
    scale = 1.0 if batch.control_scale is None else batch.control_scale.scale
    inputs = {
        "latents": batch.latents,
        "timestep": batch.timestep,
        "text": batch.text,
        "control": batch.control,
        "scale": torch.tensor(scale),
    }
    return {name: each.float().contiguous() for name, each in inputs.items()}
