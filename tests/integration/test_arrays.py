"""Arrays and tensors in place of files: the same picture, the same result."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from support import photograph

from tegula.errors import ImageError
from tegula.images.decode import decode
from tegula.images.pixels import to_bytes
from tegula.options import UpscaleOptions
from tegula.upscaler import Upscaler
from tests.tiny.networks import tiny_bundle

PIXELS = to_bytes(photograph(48, 40))
TENSOR = torch.from_numpy(PIXELS).permute(2, 0, 1)
FLOATS = TENSOR.float() / 255
MASK = np.repeat(np.linspace(0, 255, 24, dtype=np.uint8)[None], 20, axis=0)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def read(source):
    return decode(source, max_pixels=10_000)


@pytest.mark.parametrize(
    ("tensor", "tolerance"),
    [
        (TENSOR, 0),
        (TENSOR[None], 0),
        (FLOATS, 1e-6),
        (FLOATS[None], 1e-6),
        (FLOATS.double(), 1e-6),
        (FLOATS.half(), 5e-4),
        (FLOATS.bfloat16(), 4e-3),
        (FLOATS.clone().requires_grad_(), 1e-6),
    ],
)
def test_a_tensor_is_the_same_picture_as_a_file_of_its_pixels(tensor, tolerance):
    picture = read(tensor)
    np.testing.assert_allclose(picture.rgb, read(png(PIXELS)).rgb, rtol=0, atol=tolerance)
    assert picture.facts.size == (48, 40)


def test_a_tensor_may_be_grey_or_have_alpha():
    rgba = np.dstack([PIXELS, PIXELS[..., 0]])
    picture, file = read(torch.from_numpy(rgba).permute(2, 0, 1)), read(png(rgba))
    assert np.array_equal(picture.rgb, file.rgb)
    assert np.array_equal(picture.alpha, file.alpha)
    for grey in (TENSOR[0], TENSOR[:1], TENSOR[:1][None]):
        assert np.array_equal(read(grey).rgb, read(png(PIXELS[..., 0])).rgb)
        assert read(grey).facts.greyscale


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        (TENSOR.permute(1, 2, 0), "has the shape [40, 48, 3]; give a tensor [channels, height"),
        (TENSOR[None].repeat(2, 1, 1, 1), "has the shape [2, 3, 40, 48]; give a tensor"),
        (TENSOR.long(), "holds int64; give uint8, uint16, or floats from 0 to 1"),
        (FLOATS * 255, "give floats from 0 to 1, or uint8"),
        (FLOATS * 2 - 1, "give floats from 0 to 1, or uint8"),
    ],
)
def test_other_tensors_are_refused_in_one_sentence(tensor, sentence):
    with pytest.raises(ImageError) as caught:
        read(tensor)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("source", [PIXELS, TENSOR, FLOATS[None], PIXELS.astype(np.float32) / 255])
def test_an_upscale_of_arrays_is_that_of_files(source):
    upscaler = Upscaler(tiny_bundle())
    chosen = UpscaleOptions(prescaler="lanczos", steps=2, window=64, seed=1, creativity=0.5)
    result, expected = (
        upscaler.upscale(given, chosen, mask=where, strength_map=share)
        for given, where, share in (
            (source, MASK, torch.from_numpy(MASK.copy())[None]),
            (png(PIXELS), png(MASK), png(MASK)),
        )
    )
    difference = np.asarray(result.image, int) - np.asarray(expected.image, int)
    assert np.abs(difference).max() <= 1
    assert result.image.size == (96, 80)
