"""Pictures as tensors: what numpy made of them, also where Pillow and OpenCV do not reach."""

import contextlib
import types

import golden
import numpy as np
import pytest
import torch
from support import finish_arrays, of_arrays

from tegula.models.prescalers.load import load_prescaler
from tegula.options import UpscaleOptions
from tegula.pipeline import adjust, exact, pictures, prepare, prescale

HOST = torch.device("cpu")


@contextlib.contextmanager
def fused_at(pixels):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adjust, "_LARGEST_FUSED", pixels)
        yield


@pytest.fixture(params=["on the host", "by torch"])
def functions(request, monkeypatch):
    if request.param == "by torch":
        for module in (pictures, adjust):
            monkeypatch.setattr(module, "lies_on_host", lambda _: False)
    found = types.SimpleNamespace(
        prepare=lambda source: prepare.prepare(source, UpscaleOptions()),
        finish=finish_arrays,
        net=load_prescaler("tegula-swift", HOST, torch.float32),
        fused_at=fused_at,
    )
    for module in (pictures, adjust, exact, prescale):
        for name, each in vars(module).items():
            if isinstance(each, types.FunctionType) and not name.startswith("_"):
                setattr(found, name, of_arrays(each))
    found.read_mask = of_arrays(prepare.read_mask)
    return found


def test_pictures_become_what_numpy_and_opencv_made_of_them(functions):
    seen, every = set(), golden.EVERY
    with np.load(golden.GOLDEN) as kept:
        for name, result in golden.results(functions):
            expected = kept[name]
            assert result.dtype == expected.dtype
            found = result[::every, ::every] if result.ndim > 1 else result
            off = np.abs(found.astype(np.float64) - expected).max()
            # Weights of fused exposures are near zero in places, where rounding decides.
            near = {"fused": 1e-3, "consistency": 1e-4}.get(name.split(",")[0].split()[0], 1e-5)
            assert off <= (near if expected.dtype == np.float32 else 1), name
            seen.add(name)
        assert seen == set(kept.files)
