"""Every knob of an upscale, with its unit, bounds, default and effect."""

from __future__ import annotations

import dataclasses
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tegula.errors import OptionError, TooLargeError

# What is known of one option beside its value: effect, unit, bounds, choices.


@dataclass(frozen=True)
class Knob:
    """What the docs, the command line and the validation know of one option."""

    effect: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    preset: bool = False


def knob(
    effect: str,
    default: Any = None,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    preset: bool = False,
) -> Any:
    """Return a dataclass field that knows its knob in its metadata."""
    about = Knob(effect, unit, low, high, choices, preset)
    return dataclasses.field(default=default, metadata={"knob": about})


def check_knob(name: str, knob: Knob, value: Any) -> None:
    """Check a value, or each number of a tuple; None is always right.

    Raises:
        OptionError: it is out of bounds, or not among the choices.
    """
    if value is None:
        return
    if knob.choices and value not in knob.choices:
        raise OptionError(f"{name} is one of {', '.join(knob.choices)}, not {value!r}.")
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        below = knob.low is not None and number < knob.low
        above = knob.high is not None and number > knob.high
        if below or above or not math.isfinite(number):
            raise OptionError(f"{name} is {_bounds(knob)}, not {number}.")


def _bounds(knob: Knob) -> str:
    unit = f" {knob.unit}" if knob.unit else ""
    if knob.high is None:
        return f"at least {plain(knob.low)}{unit}"
    return f"between {plain(knob.low)} and {plain(knob.high)}{unit}"


def plain(number: float | None) -> str:
    """Return a bound as people write it: no exponent, no needless decimals."""
    return "" if number is None else f"{number:.6f}".rstrip("0").rstrip(".")


# Prompts for parts of the picture: ``x,y,width,height:prompt``.

_NUMBER = r"\s*(\d+(?:\.\d*)?|\.\d+)\s*"
_FEATHER = 0.125
"""Share of a region's shorter side over which it fades in."""

_FORM = re.compile(rf"{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}:(.*)", re.DOTALL)


@dataclass(frozen=True)
class Region:
    """A rectangle of the source, as shares of its width and height, and what it shows."""

    x: float
    y: float
    width: float
    height: float
    prompt: str


@dataclass(frozen=True)
class PlacedRegion:
    """A region in pixels of the result: its edges, how far inside it fades in, its prompt."""

    left: float
    top: float
    right: float
    bottom: float
    feather: float
    prompt: str


def place_region(
    region: Region, result: tuple[int, int], part: tuple[float, float, float, float]
) -> PlacedRegion:
    """Return where a region lies on the result.

    Args:
        region: as shares of the whole source.
        result: width and height in pixels.
        part: x, y, width and height of what is enlarged, as shares of the whole source.
    """
    across, down = result[0] / part[2], result[1] / part[3]
    return PlacedRegion(
        (region.x - part[0]) * across,
        (region.y - part[1]) * down,
        (region.x + region.width - part[0]) * across,
        (region.y + region.height - part[1]) * down,
        min(region.width * across, region.height * down) * _FEATHER,
        region.prompt,
    )


def parse_region(text: str, source: tuple[int, int] | None = None) -> Region:
    """Read ``x,y,width,height:prompt``.

    The numbers are pixels of the source or, when none is above 1, shares of it.

    Args:
        text: as above; the prompt may hold colons.
        source: width and height of the source in pixels; None checks the form alone.

    Raises:
        OptionError: it has another form, or lies outside the source.
    """
    found = _FORM.fullmatch(text)
    if found is None or not found[5].strip():
        raise OptionError(
            f"A region is x,y,width,height:prompt in pixels or shares of the source, not {text!r}."
        )
    x, y, width, height = (float(number) for number in found.groups()[:4])
    sides = (1.0, 1.0) if max(x, y, width, height) <= 1 else source
    if width == 0 or height == 0:
        raise OptionError(f"The region {text!r} has no width or no height.")
    if sides is None:
        return Region(x, y, width, height, found[5].strip())
    if x >= sides[0] or y >= sides[1]:
        raise OptionError(f"The region {text!r} lies outside the picture.")
    right, bottom = min(x + width, sides[0]), min(y + height, sides[1])
    across, down = 1 / sides[0], 1 / sides[1]
    return Region(x * across, y * down, (right - x) * across, (bottom - y) * down, found[5].strip())


# Every knob of an upscale, with its unit, bounds, default and effect.
#
# ``UpscaleOptions`` is what a caller asks for; unset knobs are None. ``resolve`` fills
# them from the preset of the bundle in use and returns ``ResolvedOptions``, where
# nothing is open any more. The command line, the options reference in the docs and the
# metadata of a result are all made from the field descriptions here.

PRESETS = ("faithful", "balanced", "creative", "fast")
SCHEDULERS = (
    "ddim",
    "ddim-trailing",
    "dpm++2m",
    "dpm++2m-karras",
    "dpm++2m-sde",
    "dpm++2m-sde-karras",
    "dpm++sde",
    "dpm++sde-karras",
    "euler",
    "euler-ancestral",
    "heun",
    "dpm2",
    "dpm2-ancestral",
    "lms",
    "dpm++2s",
    "dpm++3s",
    "dpm++3m-sde",
    "unipc",
    "unipc-bh1",
    "lcm",
    "tcd",
)
SIGMAS = ("own", "normal", "karras", "exponential", "sgm-uniform", "simple", "ddim-uniform")
COLOUR_LOCKS = ("wavelet", "adain", "none")
MODES = ("canvas", "redraw")
TILE_ORDERS = ("linear", "chess", "none")
SEAM_FIXES = ("none", "band", "half-tile", "half-tile+intersections")
MAX_SEED = 2**53 - 1
"""The largest whole number that every reader of JSON keeps exactly."""

MAX_SIDE = 65_536


@dataclass(frozen=True, kw_only=True)
class UpscaleOptions:
    """What a caller asks for. None leaves the choice to the preset of the bundle.

    Raises:
        OptionError: a value is out of its bounds, or two knobs contradict each other.
    """

    scale: float | None = knob(
        "Enlarges both sides by this factor; 2 when no size is asked for.",
        unit="times", low=0.05, high=16,
    )  # fmt: skip
    resolution: int | None = knob(
        "Length of the shorter side of the result, instead of a factor.",
        unit="px", low=1, high=MAX_SIDE,
    )  # fmt: skip
    size: tuple[int, int] | None = knob(
        "Exact width and height of the result, instead of a factor.",
        unit="px", low=1, high=MAX_SIDE,
    )  # fmt: skip
    crop: tuple[int, int, int, int] | None = knob(
        "Runs only this part of the source, at the settings of the whole: x, y, width, "
        "height.",
        unit="px", low=0, high=MAX_SIDE,
    )  # fmt: skip
    preset: str = knob(
        "Fills every knob left open: near the source, in between, inventive, or quick.",
        "balanced", choices=PRESETS,
    )  # fmt: skip
    prompt: str = knob("What the picture shows or should look like; (word:1.3) weighs a word.", "")
    negative_prompt: str | None = knob(
        "What to steer away from; needs a guidance scale above 1.", preset=True
    )
    creativity: float | None = knob(
        "Denoise strength: 0 leaves the prescaled picture, 1 redraws it from noise.",
        low=0, high=1, preset=True,
    )  # fmt: skip
    resemblance: float | None = knob(
        "Control scale: how firmly the result keeps to the structure of the source.",
        low=0, high=3, preset=True,
    )  # fmt: skip
    guidance_scale: float | None = knob(
        "How firmly the prompt is followed; 1 or below switches guidance off and "
        "halves the work.",
        low=0, high=30, preset=True,
    )  # fmt: skip
    guidance_start: float = knob(
        "Share of the steps after which guidance begins.", 0.0, low=0, high=1
    )
    guidance_end: float = knob(
        "Share of the steps after which guidance ends; less work for little change.",
        1.0, low=0, high=1,
    )  # fmt: skip
    steps: int | None = knob(
        "Length of the whole noise schedule; steps x creativity of them are run.",
        low=1, high=1000, preset=True,
    )  # fmt: skip
    scheduler: str | None = knob(
        "The solver that walks from noise to picture.", choices=SCHEDULERS, preset=True
    )
    sigmas: str = knob(
        "How the noise levels are spaced: as the scheduler's name and the model say, or by "
        "one of ComfyUI's names. LCM and TCD keep their own.",
        "own", choices=SIGMAS,
    )  # fmt: skip
    exact_steps: bool = knob(
        "Runs all the steps whatever the creativity, as ComfyUI counts, on a schedule that "
        "is as much longer. LCM and TCD always do.",
        default=False,
    )
    seed: int | None = knob(
        "Fixes the noise: the same seed gives the same picture. Random when left open.",
        low=0, high=MAX_SEED,
    )  # fmt: skip
    hdr: float = knob(
        "Fuses synthetic exposures of the prescaled picture to open shadows and "
        "highlights; 0 changes nothing.",
        0.0, low=0, high=1,
    )  # fmt: skip
    window: int | None = knob(
        "Side of the square that the model sees at once; smaller invents more, locally.",
        unit="px", low=64, high=4096,
    )  # fmt: skip
    overlap: float = knob(
        "Least share of a window that neighbours have in common.", 0.125, low=0, high=0.75
    )
    window_batch: int | None = knob(
        "Windows in one forward pass; changes speed and memory, never the picture.",
        low=1, high=256,
    )  # fmt: skip
    guess_mode: bool = knob(
        "Control from the picture alone: fades the control over the blocks and leaves "
        "the unconditional half free.",
        default=False,
    )
    control_start: float = knob(
        "Share of the steps after which control begins.", 0.0, low=0, high=1
    )
    control_end: float = knob(
        "Share of the steps after which control ends; lower lets late steps invent.",
        1.0, low=0, high=1,
    )  # fmt: skip
    prescaler: str | None = knob(
        "The net that enlarges before diffusion: a name from `tegula models`, or the "
        "path of an ESRGAN or SwinIR file.",
        preset=True,
    )
    colour_lock: str = knob(
        "Holds the colours of the result to the source: local tones, overall statistics, or "
        "not at all.",
        "wavelet", choices=COLOUR_LOCKS,
    )  # fmt: skip
    mode: str = knob(
        "How diffusion covers the picture: windows of one latent canvas, which cannot show "
        "seams, or finished pixel tiles one after the other, as Ultimate SD Upscale does.",
        "canvas", choices=MODES,
    )  # fmt: skip
    tile_width: int = knob(
        "Redraw mode: width of a tile, without its padding.", 512, unit="px", low=64, high=8192
    )
    tile_height: int = knob(
        "Redraw mode: height of a tile, without its padding.", 512, unit="px", low=64, high=8192
    )
    tile_padding: int = knob(
        "Redraw mode: surroundings of a tile that the model sees and does not paint.",
        32, unit="px", low=0, high=8192,
    )  # fmt: skip
    tile_order: str = knob(
        "Redraw mode: row by row, the fields of one colour of a chessboard first, or no "
        "tiles at all, to run the seam fix alone.",
        "linear", choices=TILE_ORDERS,
    )  # fmt: skip
    tile_blur: int = knob(
        "Redraw mode: deviation of the blur that softens the edge of a tile's mask.",
        8, unit="px", low=0, high=64,
    )  # fmt: skip
    tile_uniform: bool = knob(
        "Redraw mode: tiles at the edge see as much as all others, by looking further inside.",
        default=True,
    )
    seam_fix: str = knob(
        "Redraw mode: paint once more over the borders of the tiles, in narrow bands, in "
        "tiles shifted by half, or in these and in their crossings.",
        "none", choices=SEAM_FIXES,
    )  # fmt: skip
    seam_fix_denoise: float = knob(
        "Redraw mode: denoise strength of the seam fix.", 0.35, low=0, high=1
    )
    seam_fix_width: int = knob(
        "Redraw mode: width of the bands of the seam fix.", 64, unit="px", low=2, high=8192
    )
    seam_fix_blur: int = knob(
        "Redraw mode: as tile_blur, of the shifted tiles of the seam fix.",
        8, unit="px", low=0, high=64,
    )  # fmt: skip
    seam_fix_padding: int = knob(
        "Redraw mode: as tile_padding, of the seam fix.", 16, unit="px", low=0, high=8192
    )
    regions: tuple[str, ...] = knob(
        "Prompts for parts of the picture, each as x,y,width,height:prompt in pixels or shares "
        "of the source, added to the common prompt and fading in from the edges.",
        (),
    )
    flat_skip: float = knob(
        "Share of the steps that areas without structure skip: less work, and their grain "
        "stays as it is.",
        0.0, low=0, high=1,
    )  # fmt: skip
    feature_reuse: int = knob(
        "Runs the encoder and the ControlNet at every n-th noise level only and the decoder at "
        "all; 1 runs everything everywhere. mini, which has no such halves, ignores it.",
        1, unit="levels", low=1, high=100,
    )  # fmt: skip
    detail: float = knob(
        "Scales what diffusion changed: -1 takes it away, 0 leaves it, 1 doubles it.",
        0.0, low=-1, high=2,
    )  # fmt: skip
    sharpen: float = knob(
        "Sharpens the result by a kernel of three by three pixels.", 0.0, low=0, high=10
    )
    faces: str = knob(
        "Restores faces with GFPGANv1.4, RestoreFormer, codeformer or another file of the "
        "faces folder that you filled, or with the file at this path; needs the extra faces.",
        "",
    )
    face_fidelity: float = knob(
        "How far a restored face keeps to the source: codeformer alone listens to it.",
        0.5, low=0, high=1,
    )  # fmt: skip
    face_upsample: bool = knob(
        "Enlarges restored faces with the prescaler where the result shows them larger than "
        "the 512 pixels that they are restored at.",
        default=False,
    )
    max_pixels: int = knob(
        "Refuses results, and inputs, with more pixels than this.",
        134_217_728, unit="px", low=1,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, bounds in KNOBS.items():
            check_knob(name, bounds, getattr(self, name))
        asked = [n for n in ("scale", "resolution", "size") if getattr(self, n) is not None]
        if len(asked) > 1:
            raise OptionError(
                f"{' and '.join(asked)} both say how large the result is; give one of them."
            )
        for region in self.regions:
            parse_region(region)
        for start, end in (("guidance_start", "guidance_end"), ("control_start", "control_end")):
            if getattr(self, start) > getattr(self, end):
                raise OptionError(f"{start} must not come after {end}.")

    def changed(self) -> dict[str, Any]:
        """Return the knobs that differ from their defaults."""
        values = ((field, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {field.name: value for field, value in values if value != field.default}


KNOBS: Mapping[str, Knob] = {
    field.name: field.metadata["knob"] for field in dataclasses.fields(UpscaleOptions)
}


@dataclass(frozen=True, kw_only=True)
class RedrawOptions:
    """The tile and seam fix knobs of redraw mode, as ``UpscaleOptions`` describes them."""

    tile_width: int = 512
    tile_height: int = 512
    tile_padding: int = 32
    tile_order: str = "linear"
    tile_blur: int = 8
    tile_uniform: bool = True
    seam_fix: str = "none"
    seam_fix_denoise: float = 0.35
    seam_fix_width: int = 64
    seam_fix_blur: int = 8
    seam_fix_padding: int = 16


@dataclass(frozen=True, kw_only=True)
class PresetValues:
    """The numbers behind one preset name for one bundle."""

    creativity: float
    resemblance: float
    guidance_scale: float
    steps: int
    scheduler: str
    prescaler: str
    negative_prompt: str = ""


@dataclass(frozen=True, kw_only=True)
class ResolvedOptions:
    """Options with nothing left open; ``width`` and ``height`` are those of the result."""

    width: int
    height: int
    preset: str
    prompt: str
    negative_prompt: str
    creativity: float
    resemblance: float
    guidance_scale: float
    guidance_start: float
    guidance_end: float
    steps: int
    scheduler: str
    seed: int
    hdr: float
    window: int
    overlap: float
    window_batch: int | None
    guess_mode: bool
    control_start: float
    control_end: float
    prescaler: str
    colour_lock: str
    sigmas: str = "own"
    exact_steps: bool = False
    flat_skip: float = 0.0
    feature_reuse: int = 1
    detail: float = 0.0
    sharpen: float = 0.0
    faces: str = ""
    face_fidelity: float = 0.5
    face_upsample: bool = False
    regions: tuple[PlacedRegion, ...] = ()
    mode: str = "canvas"
    redraw: RedrawOptions = RedrawOptions()

    @property
    def refines(self) -> bool:
        """Whether diffusion has anything to do."""
        if self.mode == "canvas":
            return self.creativity > 0
        fixes = self.redraw.seam_fix != "none" and self.redraw.seam_fix_denoise > 0
        return fixes or (self.redraw.tile_order != "none" and self.creativity > 0)


def target_size(options: UpscaleOptions, width: int, height: int) -> tuple[int, int]:
    """Return the width and height of the result for a whole source of this size.

    A crop is enlarged as it would be within the whole.

    Raises:
        TooLargeError: the result would have more pixels than ``options.max_pixels``.
    """
    if options.size is not None:
        factors = options.size[0] / width, options.size[1] / height
    elif options.resolution is not None:
        factors = (options.resolution / min(width, height),) * 2
    else:
        factors = (2.0 if options.scale is None else options.scale,) * 2
    if options.crop is not None:
        width, height = options.crop[2:]
    target = max(1, round(width * factors[0])), max(1, round(height * factors[1]))
    if target[0] * target[1] > options.max_pixels:
        raise TooLargeError(
            f"The result would be {target[0]}x{target[1]} = {target[0] * target[1]:,} pixels, "
            f"above the limit of {options.max_pixels:,}; ask for less or raise max_pixels."
        )
    return target


def enlarged_part(
    options: UpscaleOptions, source_size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Return x, y, width and height of what is enlarged, as shares of the whole source."""
    if options.crop is None:
        return 0.0, 0.0, 1.0, 1.0
    (x, y, across, down), (width, height) = options.crop, source_size
    return x / width, y / height, across / width, down / height


def resolve(
    options: UpscaleOptions,
    presets: Mapping[str, PresetValues],
    default_window: int,
    source_size: tuple[int, int],
) -> ResolvedOptions:
    """Fill what the caller left open from the preset, and draw a seed if none is given.

    Raises:
        TooLargeError: the result would have more pixels than ``options.max_pixels``.
    """
    width, height = target_size(options, *source_size)
    preset = presets[options.preset]
    values = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(ResolvedOptions)
        if field.name not in ("width", "height", "redraw", "regions")
    }
    values["redraw"] = _redraw_options(options)
    part = enlarged_part(options, source_size)
    values["regions"] = tuple(
        place_region(parse_region(text, source_size), (width, height), part)
        for text in options.regions
    )
    for field in dataclasses.fields(preset):
        if values[field.name] is None:
            values[field.name] = getattr(preset, field.name)
    if values["window"] is None:
        values["window"] = default_window
    if values["seed"] is None:
        values["seed"] = secrets.randbits(31)
    return ResolvedOptions(width=width, height=height, **values)


def _redraw_options(options: UpscaleOptions) -> RedrawOptions:
    names = [field.name for field in dataclasses.fields(RedrawOptions)]
    return RedrawOptions(**{name: getattr(options, name) for name in names})
