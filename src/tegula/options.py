"""Every option of an upscale, declared once: its type, unit, bounds, default and effect.

``UpscaleOptions`` is what a caller gives, with None where the choice is left open;
``tegula.resolve`` closes what is open, from a preset of the bundle in use, and returns
``ResolvedOptions``. The command line, the options reference in the docs, the metadata of
a result and the sentences of errors all follow from ``OPTIONS``, the JSON schema of
``UpscaleOptions``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from pydantic.config import JsonDict

from tegula.errors import OptionError
from tegula.regions import PlacedRegion, parse_region
from tegula.schema import CheckedOptions, properties_of

MAX_SIDE = 65_536
MAX_PIXELS = 134_217_728
"""The default limit of a source and of a result: 128 mega-pixels, as 16384 by 8192."""

MAX_SEED = 2**63 - 1
"""As large as a signed 64-bit number; ComfyUI's schemas go as far."""


def _checked_region(text: str) -> str:
    try:
        parse_region(text)
    except OptionError as error:
        # pydantic gathers ValueErrors with all other faults; anything else ends the check.
        raise ValueError(str(error)) from None
    return text


Preset = Literal["faithful", "balanced", "creative", "fast", "best", "exact"]
Scheduler = Literal[
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
]
Sigmas = Literal["own", "normal", "karras", "exponential", "sgm-uniform", "simple", "ddim-uniform"]
TileOrder = Literal["linear", "chess", "none"]
SeamFix = Literal["none", "band", "half-tile", "half-tile+intersections"]
Weighting = Literal["a1111", "comfyui"]
PRESETS: tuple[Preset, ...] = get_args(Preset)
SCHEDULERS: tuple[Scheduler, ...] = get_args(Scheduler)
SIGMAS: tuple[Sigmas, ...] = get_args(Sigmas)

# These are open in UpscaleOptions and closed in PresetValues and ResolvedOptions.
NegativePrompt = Annotated[
    str, Field(description="What to steer away from; needs a guidance scale above 1.")
]
Creativity = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="Denoise strength: 0 leaves the prescaled picture, 1 redraws it from noise.",
    ),
]
Resemblance = Annotated[
    float,
    Field(
        ge=0,
        le=3,
        description="Control scale: how firmly the result keeps to the structure of the source.",
    ),
]
GuidanceScale = Annotated[
    float,
    Field(
        ge=0,
        le=30,
        description="How firmly the prompt is followed; 1 or below switches guidance off and "
        "halves the work.",
    ),
]
Steps = Annotated[
    int,
    Field(
        ge=1,
        le=1000,
        description="Length of the whole noise schedule; steps x creativity of them are run.",
    ),
]
PrescalerName = Annotated[
    str,
    Field(
        description="The net that enlarges before diffusion: a name from `tegula models`, or the "
        "path of an ESRGAN or SwinIR file."
    ),
]
Exact = Annotated[
    bool,
    Field(
        description="Holds the result to the source after everything else: shrunk again by "
        "averaging areas, it is within 1/255 of it on average and 4/255 at the worst pixel; "
        "PNG and TIFF files keep that."
    ),
]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Share = Annotated[float, Field(ge=0, le=1)]
_PIXELS: JsonDict = {"unit": "px"}
MOST_MENDED_BLUR = 0.7
"""Pixels of the source up to which undoing a blur pays; docs/decisions/0010 has the figures."""
FlatNoise = Annotated[float, Field(ge=0, le=8)]
MendedBlur = Annotated[float, Field(ge=0, le=MOST_MENDED_BLUR, json_schema_extra=_PIXELS)]
_ResultSide = Annotated[int, Field(ge=1, le=MAX_SIDE, json_schema_extra=_PIXELS)]
_Place = Annotated[int, Field(ge=0, le=MAX_SIDE)]
_TileSide = Annotated[int, Field(ge=64, le=8192, json_schema_extra=_PIXELS)]
_Padding = Annotated[int, Field(ge=0, le=8192, json_schema_extra=_PIXELS)]
_Blur = Annotated[int, Field(ge=0, le=64, json_schema_extra=_PIXELS)]


class PresetValues(CheckedOptions):
    """What one preset of one bundle gives the options that a caller leaves open."""

    creativity: Creativity
    resemblance: Resemblance
    guidance_scale: GuidanceScale
    steps: Steps
    scheduler: Scheduler
    prescaler: PrescalerName
    negative_prompt: NegativePrompt = ""
    exact: Exact = False


class UpscaleOptions(CheckedOptions):
    """What a caller asks for. None leaves the choice to the preset of the bundle.

    Raises:
        OptionError: values of another type or out of bounds, or that contradict each other;
            the one sentence names all of them.
    """

    scale: float | None = Field(
        default=None,
        ge=0.05,
        le=16,
        description="Enlarges both sides by this factor; 2 when no size is asked for.",
        json_schema_extra={"unit": "times"},
    )
    resolution: _ResultSide | None = Field(
        default=None, description="Length of the shorter side of the result, instead of a factor."
    )
    size: tuple[_ResultSide, _ResultSide] | None = Field(
        default=None,
        description="Exact width and height of the result, instead of a factor.",
        json_schema_extra=_PIXELS,
    )
    crop: tuple[_Place, _Place, _Place, _Place] | None = Field(
        default=None,
        description="Runs only this part of the source, at the settings of the whole: x, y, width, "
        "height.",
        json_schema_extra=_PIXELS,
    )
    preset: Preset = Field(
        default="balanced",
        description="Fills every option left open: near the source, in between, inventive, "
        "quick, in between by the best net whatever time it takes, or without diffusion and held "
        "to the source pixel by pixel, for products, documents and evidence.",
    )
    prompt: str = Field(
        default="",
        description="What the picture shows or should look like; (word:1.3) weighs a word.",
    )
    source_prompt: bool = Field(
        default=True,
        description="With auto and without a prompt, takes the one that the source says it was "
        "made with, where the model reads prompts.",
    )
    negative_prompt: NegativePrompt | None = None
    prompt_weighting: Weighting = Field(
        default="a1111",
        description="How brackets weigh words: as AUTOMATIC1111's web UI does, or towards the "
        "empty prompt as ComfyUI does, where [word] and BREAK are text and an embedding is written "
        "embedding:name.",
    )
    clip_skip: int = Field(
        default=1,
        ge=1,
        le=12,
        description="Which layer of CLIP, counted from the end, reads the prompts: 1 takes the "
        "last, 2 is what anime models often want. mini, which has no CLIP, ignores it.",
    )
    creativity: Creativity | None = None
    resemblance: Resemblance | None = None
    guidance_scale: GuidanceScale | None = None
    guidance_start: Share = Field(
        default=0.0, description="Share of the steps after which guidance begins."
    )
    guidance_end: Share = Field(
        default=1.0,
        description="Share of the steps after which guidance ends; less work for little change.",
    )
    steps: Steps | None = None
    scheduler: Scheduler | None = Field(
        default=None, description="The solver that walks from noise to picture."
    )
    sigmas: Sigmas = Field(
        default="own",
        description="How the noise levels are spaced: as the scheduler's name and the model say, "
        "or by one of ComfyUI's names. LCM and TCD keep their own.",
    )
    exact_steps: bool = Field(
        default=False,
        description="Runs all the steps whatever the creativity, as ComfyUI counts, on a schedule "
        "that is as much longer. LCM and TCD always do.",
    )
    webui_steps: bool = Field(
        default=False,
        description="Counts steps as AUTOMATIC1111's web UI does in img2img: steps x creativity "
        "and one more, from a higher noise level. LCM and TCD run theirs.",
    )
    seed: Seed | None = Field(
        default=None,
        description="Fixes the noise: the same seed gives the same picture. Random when left open.",
    )
    hdr: Share = Field(
        default=0.0,
        description="Fuses synthetic exposures of the prescaled picture to open shadows and "
        "highlights; 0 changes nothing.",
    )
    window: int | None = Field(
        default=None,
        ge=64,
        le=4096,
        description="Side of the square that the model sees at once; smaller invents "
        "more, locally.",
        json_schema_extra=_PIXELS,
    )
    overlap: float = Field(
        default=0.125,
        ge=0,
        le=0.75,
        description="Least share of a window that neighbours have in common.",
    )
    window_batch: int | None = Field(
        default=None,
        ge=1,
        le=256,
        description="Windows in one forward pass; changes speed and memory, never the picture.",
    )
    guess_mode: bool = Field(
        default=False,
        description="Control from the picture alone: fades the control over the blocks and leaves "
        "the unconditional half free.",
    )
    control_start: Share = Field(
        default=0.0, description="Share of the steps after which control begins."
    )
    control_end: Share = Field(
        default=1.0,
        description="Share of the steps after which control ends; lower lets late steps invent.",
    )
    auto: bool = Field(
        default=True,
        description="Looks at the source first, and chooses creativity, resemblance, prescaler, "
        "tuning, mend_jpeg, mend_chroma, mend_blur, mend_flat, drawing_prescaler, "
        "hold_drawings and keep_grey, where they are left open, by the damage, sharpness and kind "
        "of picture that it finds.",
    )
    prescaler: PrescalerName | None = None
    drawing_prescaler: str | None = Field(
        default=None,
        description="A second net for the parts of the picture that are drawn or text, blended "
        "softly into the first. Empty, there is none. Left open, auto takes tegula-line where "
        "parts are drawn (and as the prescaler where all is), unless a prescaler is named.",
    )
    drawing_share: Share | None = Field(
        default=None,
        description="Share of the second net where a picture is drawn. Left open, all of it.",
    )
    hold_drawings: bool | None = Field(
        default=None,
        description="Holds drawn parts to the range of the source around each place, so that white "
        "paper stays white, and where they are not damaged to the source itself; what tegula-line "
        "made is kept as it is through diffusion. Left open, auto does so for drawings, pictures "
        "with drawn parts and things on white.",
    )
    tuning: Share | None = Field(
        default=None,
        description="Share of its tuning that the prescaler tegula-photo takes: 0 smooths as "
        "x4plus does, 1 keeps the most texture, and noise and traces of JPEG with it. Left open, "
        "the source decides, and 0.65 is taken without auto.",
    )
    keep_grey: bool | None = Field(
        default=None,
        description="Leaves no colour in the result. Left open, auto does so where the source has "
        "none, unless a prompt may ask for some.",
    )
    mend_jpeg: bool | None = Field(
        default=None,
        description="Reduces blocks and ringing of JPEG before enlarging. Left open, it is done "
        "below quality 16, and below 75 where plain resampling follows; with auto also where a "
        "PNG was such a JPEG.",
    )
    mend_chroma: bool | None = Field(
        default=None,
        description="Smooths blocks of colour that JPEG left, up to the edges of brightness. Left "
        "open, auto does so for photographs below quality 75 where plain resampling follows; nets "
        "do better without.",
    )
    mend_blur: MendedBlur | None = Field(
        default=None,
        description="Undoes a little blur that a lens or resampling left, before the prescaler: "
        "the standard deviation of a Gaussian, in pixels of the source. Left open, auto measures "
        "it where a photograph gets tegula-swift, or up to twice its size tegula-swift-jpeg; "
        "elsewhere none is undone.",
    )
    mend_flat: FlatNoise | None = Field(
        default=None,
        description="Takes the noise that compression and sensors leave out of flat places of what "
        "the prescaler made: its standard deviation, in levels of 255. Left open, auto decides by "
        "the damage where tegula's own nets make a photograph more than twice as large.",
    )
    colour_lock: Literal["wavelet", "adain", "none"] = Field(
        default="wavelet",
        description="Holds the colours of the result to the source: local tones, overall "
        "statistics, or not at all.",
    )
    mode: Literal["canvas", "redraw"] = Field(
        default="canvas",
        description="How diffusion covers the picture: windows of one latent canvas, which cannot "
        "show seams, or finished pixel tiles one after the other, as Ultimate SD "
        "Upscale does.",
    )
    tile_width: _TileSide = Field(
        default=512, description="Redraw mode: width of a tile, without its padding."
    )
    tile_height: _TileSide = Field(
        default=512, description="Redraw mode: height of a tile, without its padding."
    )
    tile_padding: _Padding = Field(
        default=32,
        description="Redraw mode: surroundings of a tile that the model sees and does not paint.",
    )
    tile_order: TileOrder = Field(
        default="linear",
        description="Redraw mode: row by row, the fields of one colour of a chessboard first, or "
        "no tiles at all, to run the seam fix alone.",
    )
    tile_blur: _Blur = Field(
        default=8,
        description="Redraw mode: deviation of the blur that softens the edge of a tile's mask.",
    )
    tile_uniform: bool = Field(
        default=True,
        description="Redraw mode: tiles at the edge see as much as all others, by looking further "
        "inside.",
    )
    seam_fix: SeamFix = Field(
        default="none",
        description="Redraw mode: paint once more over the borders of the tiles, in narrow bands, "
        "in tiles shifted by half, or in these and in their crossings.",
    )
    seam_fix_denoise: Share = Field(
        default=0.35, description="Redraw mode: denoise strength of the seam fix."
    )
    seam_fix_width: int = Field(
        default=64,
        ge=2,
        le=8192,
        description="Redraw mode: width of the bands of the seam fix.",
        json_schema_extra=_PIXELS,
    )
    seam_fix_blur: _Blur = Field(
        default=8, description="Redraw mode: as tile_blur, of the shifted tiles of the seam fix."
    )
    seam_fix_padding: _Padding = Field(
        default=16, description="Redraw mode: as tile_padding, of the seam fix."
    )
    regions: tuple[Annotated[str, AfterValidator(_checked_region)], ...] = Field(
        default=(),
        description="Prompts for parts of the picture, each as x,y,width,height:prompt in pixels "
        "or shares of the source, added to the common prompt and fading in from the "
        "edges.",
    )
    flat_skip: Share = Field(
        default=0.0,
        description="Share of the steps that areas without structure skip: less work, and their "
        "grain stays as it is.",
    )
    feature_reuse: int = Field(
        default=1,
        ge=1,
        le=100,
        description="Runs the encoder and the ControlNet at every n-th step only and the "
        "decoder at all; 1 runs everything everywhere. mini, which has no such halves, "
        "ignores it.",
        json_schema_extra={"unit": "steps"},
    )
    detail: float = Field(
        default=0.0,
        ge=-1,
        le=2,
        description="Scales what diffusion changed: -1 takes it away, 0 leaves it, 1 doubles it.",
    )
    sharpen: float = Field(
        default=0.0,
        ge=0,
        le=10,
        description="Sharpens the result by a kernel of three by three pixels.",
    )
    exact: Exact | None = None
    keep_hidden_colour: bool = Field(
        default=False,
        description="Enlarges the colours under full transparency as they are, in place of filling "
        "them from their surroundings; done without being asked where the picture goes on there, "
        "as in textures of games.",
    )
    faces: str = Field(
        default="",
        description="Restores faces with GFPGANv1.4, RestoreFormer, codeformer or another face "
        "model of `tegula models`, whose file you bring, or with the file at this path; needs the "
        "extra faces.",
    )
    likeness: Share | None = Field(
        default=None,
        description="How like the source faces stay: less is changed in them, the less the smaller "
        "they are, and a face that ends too far from its source by dlib's measure, 0.6 at 0 and 0 "
        "at 1, goes back towards the prescaled one, and then the source's; that of a net "
        "without diffusion, too. Left open, 0.5 where the extra faces is installed; 0 looks for no "
        "faces.",
    )
    face_fidelity: Share = Field(
        default=0.5,
        description="How far a restored face keeps to the source: codeformer alone listens to it.",
    )
    face_upsample: bool = Field(
        default=False,
        description="Enlarges restored faces with the prescaler where the result shows them larger "
        "than the 512 pixels that they are restored at.",
    )
    max_pixels: int = Field(
        default=MAX_PIXELS,
        ge=1,
        description="Refuses results, and inputs, with more pixels than this.",
        json_schema_extra=_PIXELS,
    )

    @field_validator("resolution", "size")
    @classmethod
    def _one_size(cls, value: Any, info: ValidationInfo) -> Any:
        # Only what is declared further up, and was right, is in ``info.data``.
        others = [n for n in ("scale", "resolution") if info.data.get(n) is not None]
        if value is not None and others:
            names = " and ".join((*others, str(info.field_name)))
            raise ValueError(f"{names} both say how large the result is; give one of them")
        return value

    @field_validator("guidance_end", "control_end")
    @classmethod
    def _in_order(cls, value: float, info: ValidationInfo) -> float:
        start = str(info.field_name).replace("end", "start")
        if info.data.get(start, 0.0) > value:
            raise ValueError(f"{start} must not come after {info.field_name}")
        return value

    @field_validator("webui_steps")
    @classmethod
    def _one_count(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("exact_steps"):
            raise ValueError(
                "exact_steps and webui_steps both say how steps are counted; give one of them"
            )
        return value

    @property
    def is_exact(self) -> bool:
        """Whether the result is held to the source, before a preset is looked up."""
        return self.preset == "exact" if self.exact is None else self.exact

    def changed(self) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        return self.model_dump(exclude_defaults=True)


OPTIONS = properties_of(UpscaleOptions)
"""The JSON schema of every option: type, minimum, maximum, enum, default, description, unit."""

REDRAW_OPTIONS = tuple(name for name in OPTIONS if name.startswith(("tile_", "seam_fix")))


class ResolvedOptions(UpscaleOptions):
    """Options with nothing left open.

    width, height: of the result in pixels.
    whole: of a crop, the size that the whole result would have; None without one.
    offset: where a crop lies in the whole result.
    placed_regions: ``regions`` on the result.
    """

    width: int
    height: int
    negative_prompt: NegativePrompt
    creativity: Creativity
    resemblance: Resemblance
    guidance_scale: GuidanceScale
    steps: Steps
    scheduler: Scheduler
    seed: Seed
    window: int
    prescaler: PrescalerName
    exact: Exact = False
    likeness: Share = 0.0
    drawing_prescaler: str = ""
    drawing_share: Share = 1.0
    hold_drawings: bool = False
    keep_grey: bool = False
    mend_jpeg: bool = False
    mend_chroma: bool = False
    mend_blur: MendedBlur = 0.0
    mend_flat: FlatNoise = 0.0
    placed_regions: tuple[PlacedRegion, ...] = ()
    whole: tuple[int, int] | None = None
    offset: tuple[int, int] = (0, 0)

    @property
    def refines(self) -> bool:
        """Whether diffusion has anything to do."""
        if self.mode == "canvas":
            return self.creativity > 0
        fixes = self.seam_fix != "none" and self.seam_fix_denoise > 0
        return fixes or (self.tile_order != "none" and self.creativity > 0)

    def settings(self) -> dict[str, Any]:
        """Return the options as the metadata of a result keeps them.

        The size and the regions are those of the result; how they were asked for belongs
        to the one source, and the metadata has it apart.
        """
        values = self.model_dump(
            exclude={
                *("scale", "resolution", "size", "crop", "max_pixels", "regions"),
                *("whole", "offset"),
            }
        )
        values["regions"] = values.pop("placed_regions")
        values["redraw"] = {name: values.pop(name) for name in REDRAW_OPTIONS}
        return values
