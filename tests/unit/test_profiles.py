"""Colour beyond sRGB, by the side of Little CMS, and depth beyond eight bits."""

from __future__ import annotations

import io

import colour_profiles
import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image
from support import finish_arrays, of_arrays
from support import options as resolved

from tegula.images import profiles
from tegula.images.decode import decode, reopened
from tegula.images.deep import DeepPixels
from tegula.images.encode import encode, read_settings
from tegula.images.metadata import Metadata
from tegula.options import UpscaleOptions
from tegula.pipeline.pictures import enlarge_lanczos
from tegula.pipeline.prepare import prepare

_WIDE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))


def _wide(*curve):
    return colour_profiles.matrix_rgb(_WIDE, [colour_profiles.parametric(*curve)] * 3)


COLOURS = np.array([(10, 20, 30), (250, 90, 20), (64, 200, 30)]) / 255

# By littleCMS 2.14: `transicc -t1 -c0 -i PROFILE -o *Lab`, and `-i *sRGB -o PROFILE`.
# fmt: off
BY_LITTLE_CMS = {
    "display p3": (
        colour_profiles.p3(),
        [[5.82, -2.27, -9.04], [61.81, 72.48, 90.19], [70.39, -77.83, 79.65]],
        [[12.2, 19.7, 29.1], [231.7, 101.2, 48.5], [106.2, 197.3, 66.0]],
    ),
    "a foot that is cut": (
        _wide(1, 1.8, 1.1, -0.1),
        [[0.1, 0.62, -2.29], [66.96, 71.21, 80.51], [69.33, -97.05, 74.47]],
        [[34.2, 37.9, 43.7], [215.2, 88.5, 42.0], [118.3, 194.1, 59.9]],
    ),
    "a foot that is raised": (
        _wide(2, 1.8, 0.9, -0.05, 0.02),
        [[15.97, 0.28, -3.43], [61.83, 59.93, 63.21], [63.9, -79.81, 59.21]],
        [[14.2, 14.2, 14.2], [245.2, 84.9, 14.2], [123.9, 219.0, 42.9]],
    ),
    "seven parameters": (
        _wide(4, 2.4, 0.94, 0.06, 0.08, 0.04, 0.0, 0.0),
        [[6.22, -3.82, -9.44], [66.83, 71.27, 75.82], [68.08, -91.08, 67.98]],
        [[11.4, 18.0, 27.8], [219.3, 88.6, 25.0], [122.8, 199.5, 51.8]],
    ),
    "samples": (
        colour_profiles.matrix_rgb(
            _WIDE, [colour_profiles.sampled([(i / 20) ** 1.7 for i in range(21)])] * 3
        ),
        [[10.52, -5.93, -13.11], [70.06, 62.18, 75.69], [72.6, -86.87, 68.26]],
        [[8.7, 13.5, 18.8], [208.9, 66.5, 17.2], [99.2, 184.6, 36.0]],
    ),
    "tables of 8 bits": (
        colour_profiles.table_rgb("mft1"),
        [[3.92, -112.98, -98.0], [98.04, -72.86, -108.0], [25.1, -12.67, -98.0]],
        [[14.9, 126.5, 119.7], [154.2, 188.3, 194.9], [181.8, 69.1, 192.3]],
    ),
    "tables of 16 bits": (
        colour_profiles.table_rgb("mft2"),
        [[3.94, -117.96, -97.88], [98.42, -95.37, -107.92], [25.2, -26.35, -97.88]],
        [[14.9, 63.0, 119.3], [153.6, 153.9, 194.1], [181.1, 34.4, 191.6]],
    ),
    "tables of version 4": (
        colour_profiles.table_rgb("mAB "),
        [[3.92, -122.21, -98.0], [98.04, -102.12, -108.0], [25.1, -34.56, -98.0]],
        [[14.9, 62.8, 119.7], [154.2, 139.1, 194.9], [181.8, 18.7, 192.3]],
    ),
}
# fmt: on


@pytest.mark.parametrize("name", BY_LITTLE_CMS)
def test_profiles_mean_what_little_cms_says(name):
    profile, lab, values = BY_LITTLE_CMS[name]
    space = profiles.colour_space(profile, greyscale=False)
    # Compared in L*a*b*, for Little CMS continues sRGB below zero otherwise than by mirroring.
    expected = profiles.srgb_of_lab(np.float32(lab)[None])[0]
    inside = np.abs(expected - np.clip(expected, 0, 1)).max(axis=1) == 0
    got = space.to_srgb(COLOURS.astype(np.float32))
    assert np.abs(profiles.srgb_decoded(got) - profiles.srgb_decoded(expected)).max() < 2e-3
    assert not inside.any() or np.abs(got - expected)[inside].max() < 2e-3
    assert np.abs(np.clip(space.from_srgb(COLOURS), 0, 1) * 255 - values).max() < 0.1


def png(pixels, profile=None):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", icc_profile=profile)
    return buffer.getvalue()


def deep_png_of(samples, profile=None):
    image = Image.fromarray((samples // 257).astype(np.uint8).squeeze())
    deep = DeepPixels(samples, 16)
    return encode(image, "png", metadata=Metadata(profile=profile), deep=deep).data


def round_trip(source, scale=1):
    prepared = prepare(source, UpscaleOptions())
    width, height = prepared.size
    size = width * scale, height * scale
    prescaled = of_arrays(enlarge_lanczos)(prepared.rgb, size)
    return finish_arrays(prescaled, prescaled, prepared, resolved())


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize(
    "profile", [colour_profiles.p3(), colour_profiles.wide_rgb()], ids=["p3", "adobe"]
)
def test_colours_that_srgb_cannot_hold_come_back(profile, scale):
    patches = np.array([[255, 0, 0], [0, 255, 0], [250, 90, 20], [12, 240, 250]], np.uint8)
    pixels = np.repeat(np.repeat(patches[None], 16, axis=0), 16, axis=1)
    finished = round_trip(png(pixels, profile), scale)
    middles = np.asarray(finished.image)[8 * scale, 8 * scale :: 16 * scale]
    assert np.abs(middles.astype(int) - patches).max() <= 1
    assert finished.metadata.profile == profile
    assert finished.deep is None


def test_a_crop_and_transparency_keep_what_srgb_cannot_hold():
    pixels = np.zeros((12, 12, 4), np.uint8)
    pixels[..., 0], pixels[..., 3], pixels[:, 6:, 3] = 255, 255, 0
    prepared = prepare(png(pixels, colour_profiles.p3()), UpscaleOptions(crop=(2, 3, 8, 7)))
    finished = finish_arrays(prepared.rgb, prepared.rgb, prepared, resolved())
    result = np.asarray(finished.image)
    assert prepared.beyond.shape == prepared.rgb.shape
    assert (result[result[..., 3] == 255][:, :3] == [255, 0, 0]).all()


def test_a_linear_profile_keeps_its_darkest_quarter():
    linear = colour_profiles.matrix_rgb(
        ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141)),
        [colour_profiles.parametric(0, 1.0)] * 3,
    )
    ramp = np.arange(64, dtype=np.uint16) * 256
    samples = np.repeat(np.repeat(ramp[None, :, None], 4, axis=0), 3, axis=2)
    finished = round_trip(deep_png_of(samples, linear))
    assert np.abs(finished.deep.samples.astype(int) - samples).max() <= 2
    assert len(np.unique(finished.deep.samples[0, :, 0])) == 64


def test_grey_profiles_by_luminance_and_by_lightness_come_back():
    for profile in (colour_profiles.grey(1.0), colour_profiles.grey(2.8)):
        ramp = np.repeat(np.arange(0, 65536, 1024, dtype=np.uint16)[None, :, None], 4, axis=0)
        finished = round_trip(deep_png_of(ramp, profile))
        assert np.abs(finished.deep.samples.astype(int) - ramp).max() <= 2


def test_a_profile_that_leads_one_way_is_applied_and_the_result_is_srgb():
    pixels = np.uint8(np.rint(COLOURS * 255))[None]
    both = decode(png(pixels, colour_profiles.table_rgb("mft2")), max_pixels=100)
    one = decode(png(pixels, colour_profiles.table_rgb("mft2", back=False)), max_pixels=100)
    assert np.array_equal(one.rgb, both.rgb)
    assert one.beyond is None
    assert one.facts.metadata.profile is None
    assert "the result is sRGB" in one.facts.warnings[0]


def test_a_grey_profile_is_no_use_to_colour():
    picture = decode(
        png(np.full((4, 4, 3), (9, 200, 30), np.uint8), colour_profiles.grey(1.8)),
        max_pixels=100,
    )
    assert "profile" in picture.facts.warnings[0]
    assert np.allclose(picture.rgb * 255, (9, 200, 30), atol=0.01)


@pytest.mark.parametrize("cut", range(0, 600, 7))
def test_a_damaged_profile_gives_colours_or_nothing(cut):
    for kind in ("mft1", "mft2", "mAB "):
        profile = colour_profiles.table_rgb(kind)
        for damaged in (profile[:cut], profile[:cut] + bytes(40) + profile[cut + 40 :]):
            space = profiles.colour_space(damaged, greyscale=False)
            if space is not None:
                space.to_srgb(COLOURS.astype(np.float32))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["png", "tiff"])
def test_sixteen_bits_are_written_as_other_readers_read_them(name, channels):
    samples = np.random.default_rng(5).integers(0, 65536, (70, 9, channels), np.uint16)
    samples[:40] = np.arange(9, dtype=np.uint16)[:, None] * 7000
    mode = ("L", "LA", "RGB", "RGBA")[channels - 1]
    exif = Image.Exif()
    exif[315] = "Ada"
    exif.get_ifd(0x8769)[0x829A] = 0.5
    metadata = Metadata(exif=exif.tobytes(), profile=colour_profiles.wide_rgb(), dpi=(300, 300))
    encoded = encode(
        Image.new(mode, (9, 70)),
        name,
        metadata=metadata,
        settings={"scale": 2.0},
        deep=DeepPixels(samples, 16),
    )
    if name == "tiff":
        read = tifffile.imread(io.BytesIO(encoded.data)).reshape(samples.shape)
    else:
        read = cv2.imdecode(np.frombuffer(encoded.data, np.uint8), cv2.IMREAD_UNCHANGED)
        order = {1: [0], 2: [0, 3], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]
        read = read.reshape(70, 9, -1)[..., order]
    assert np.array_equal(read, samples)
    assert encoded.warnings == ()
    again = decode(encoded.data, max_pixels=1000).facts
    assert again.depth == 16
    assert again.metadata.profile == (metadata.profile)
    assert again.metadata.dpi == pytest.approx((300, 300), abs=0.01)
    kept = Image.Exif()
    kept.load(again.metadata.exif)
    assert kept[315] == "Ada"
    assert kept.get_ifd(0x8769)[0x829A] == 0.5
    assert read_settings(encoded.data) == {"scale": 2.0}


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("depth", [10, 12])
def test_avif_is_written_at_its_depth_with_its_metadata(depth, channels):
    steps = np.linspace(0, 2**depth - 1, 40 * 30).reshape(40, 30, 1).round()
    values = np.concatenate([steps, steps[::-1], steps[:, ::-1], steps], axis=2)[..., :channels]
    deep = DeepPixels(np.rint(values * (65535 / (2**depth - 1))).astype(np.uint16), depth)
    mode = ("L", "LA", "RGB", "RGBA")[channels - 1]
    exif = Image.Exif()
    exif[315] = "Ada"
    metadata = Metadata(exif=exif.tobytes(), profile=colour_profiles.p3())
    encoded = encode(
        Image.new(mode, (30, 40)),
        "avif",
        quality=100,
        metadata=metadata,
        settings={"scale": 2.0},
        deep=deep,
    )
    assert encoded.warnings == ()
    read = cv2.imdecode(np.frombuffer(encoded.data, np.uint8), cv2.IMREAD_UNCHANGED)
    order = {1: [0], 2: [0, 3], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]
    assert np.abs(read.reshape(40, 30, -1)[..., order].astype(int) - values).max() <= 1
    with Image.open(io.BytesIO(encoded.data)) as image:
        image.load()
        assert image.size == (30, 40)
        assert image.info["icc_profile"] == metadata.profile
        assert image.getexif()[315] == "Ada"
    assert read_settings(encoded.data) == {"scale": 2.0}
    assert decode(encoded.data, max_pixels=2000).facts.depth == depth


@pytest.mark.parametrize(
    ("name", "depth", "sentence"),
    [
        ("jpeg", 16, "16 bits a channel, and the JPEG file 8. PNG and TIFF hold 16."),
        ("avif", 16, "16 bits a channel, and the AVIF file 12. PNG and TIFF hold 16."),
        ("webp", 12, "12 bits a channel, and the WEBP file 8."),
        ("png", 32, "32 bits a channel, and the PNG file 16."),
    ],
)
def test_fewer_bits_than_the_source_had_are_said(name, depth, sentence):
    deep = DeepPixels(np.zeros((4, 4, 3), np.uint16), depth)
    (warning,) = encode(Image.new("RGB", (4, 4)), name, deep=deep).warnings
    assert sentence in warning


def test_a_result_is_a_source_again_at_its_depth_and_in_its_colours():
    samples = np.random.default_rng(7).integers(0, 65536, (8, 8, 4), np.uint16)
    first = decode(deep_png_of(samples, colour_profiles.p3()), max_pixels=100)
    finished = finish_arrays(first.rgb, first.rgb, prepare(first, UpscaleOptions()), resolved())
    again = reopened(finished.image, finished.deep, finished.metadata)
    assert again.facts.depth == 16
    assert again.facts.metadata.profile == colour_profiles.p3()
    opaque = samples[..., 3] > 6000
    assert np.abs(again.rgb + again.beyond - first.rgb - first.beyond)[opaque].max() < 1e-3
