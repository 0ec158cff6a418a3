"""The methods that the bench compares, all through tegula's own upscaler."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from PIL import Image
from torch import Tensor, nn

from bench.quality.cache import Cache, remember_results
from bench.quality.recipes import Picture, on_white
from tegula.expectation import Expectation
from tegula.models.prescalers import Prescaler, list_prescalers
from tegula.models.prescalers.load import load_prescaler, with_share
from tegula.nets import Nets
from tegula.options import PRESETS, ResolvedOptions, UpscaleOptions
from tegula.pipeline.windows import canvas_piece
from tegula.plan import Plan
from tegula.upscaler import Upscaler

SEED = 1
BASELINE = "realesrgan-x4plus"
BICUBIC = "bicubic"
AUTO = "auto"
_HELD = "+colours"
_UNCLEANED = "+uncleaned"


@dataclass(frozen=True)
class Method:
    """A name and the options behind it; the scale is filled in per run.

    options: None is Pillow's bicubic resampling.
    """

    name: str
    options: UpscaleOptions | None

    @property
    def refines(self) -> bool:
        """Whether diffusion runs."""
        return self.options is not None and self.options.creativity != 0


def find_method(name: str) -> Method:
    """Return a method by its name on the command line.

    ``bicubic``; ``auto``, the nets that the look at the source chooses; a preset; or a
    prescaler, which is its net and nothing else. A prescaler may be followed by ``@0.35``, the
    share of its tuning that is taken (of ``tegula-photo`` alone; without it the damage decides,
    as it does for users), and by ``+colours``, for colours held to the source. Each but
    ``bicubic`` may end in ``+uncleaned``, which leaves traces of JPEG as they are.

    Raises:
        SystemExit: no method has that name.
    """
    if name.endswith(_UNCLEANED):
        method = find_method(name.removesuffix(_UNCLEANED))
        if method.options is not None:
            options = method.options.replaced(mend_jpeg=False, mend_chroma=False)
            return Method(f"{method.name}, uncleaned", options)
    if name == BICUBIC:
        return Method(BICUBIC, None)
    if name == AUTO:
        return Method("chosen nets", UpscaleOptions(creativity=0, seed=SEED))
    if name in PRESETS:
        return Method(f"mini {name}", UpscaleOptions(preset=name, seed=SEED))
    prescaler = name.removesuffix(_HELD)
    known = [facts.name for facts in list_prescalers()]
    plain, _, share = prescaler.partition("@")
    if plain not in known:
        names = ", ".join([BICUBIC, AUTO, *PRESETS, *known])
        raise SystemExit(f"There is no method {name!r}; there are: {names}.")
    options = UpscaleOptions(
        prescaler=plain,
        tuning=float(share) if share else None,
        creativity=0,
        likeness=0,
        seed=SEED,
    )
    if name.endswith(_HELD):
        return Method(f"{prescaler}, colours held", options)
    return Method(prescaler, options.replaced(colour_lock="none"))


METHODS = (
    BICUBIC,
    BASELINE,
    "realesrgan-x4plus-anime",
    "realesrgan-animevideov3",
    f"{BASELINE}{_HELD}",
    f"tegula-photo{_HELD}",
    *PRESETS,
)
"""What a run compares where nothing else is named."""


@dataclass(frozen=True)
class Result:
    """A picture, and what is known of how it was made.

    picture: [h, w, 3] in 0..1, of 8 bits, as a file holds it, on white where it has alpha.
    seconds: what refine took. nets: those that made it. columns, rows: borders of windows, px.
    """

    picture: Picture
    seconds: float = 0.0
    nets: tuple[str, ...] = ()
    columns: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()


@dataclass
class _CachedNets(Nets):
    """Nets that look into a cache."""

    cache: Cache = field(kw_only=True)

    def prescaler(self, name: str, tuning: float | None = None) -> Prescaler:
        """Return a prescaler whose results are kept."""
        key = f"{name}@{tuning}"
        if key not in self.prescalers:
            bundle = self.bundle
            loaded = load_prescaler(name, bundle.device, bundle.dtype, int8=bundle.int8)
            prescaler = with_share(loaded, tuning)
            for network in {prescaler.fastest, prescaler.full_precision} - {None}:
                remember_results(network, partial(_weights, prescaler, network), self.cache)  # type: ignore[arg-type]
            self.prescalers[key] = prescaler
        return self.prescalers[key]


def _weights(prescaler: Prescaler, network: nn.Module) -> Iterator[Tensor]:
    """Yield all that decides on what one of a prescaler's networks makes."""
    if network is prescaler.int8 and prescaler.full_precision and prescaler.ranges:
        # What is rounded is told by what it is rounded from, and by what.
        yield from prescaler.full_precision.state_dict().values()
        yield from prescaler.ranges.values()
    yield from network.state_dict().values()


class _Forgetful(Expectation):
    """Remembers nothing: what a net did not have to compute took no time."""

    def learn(self, plan: Plan, seconds: Mapping[str, float]) -> None:
        """Leave no trace."""


class Runner:
    """Runs methods on one picture after another."""

    def __init__(self, cache: Cache) -> None:
        """Load the packaged model."""
        self._upscaler = Upscaler.load("mini")
        nets = _CachedNets(self._upscaler.bundle, cache=cache)
        usual = self._upscaler.expectation
        self._upscaler.nets = nets
        self._upscaler.expectation = _Forgetful(nets, usual.version, usual.run, usual.count)

    def run(self, file: bytes, scale: int, method: Method) -> Result:
        """Enlarge one picture with one method; ``file`` tells what a user's file would."""
        if method.options is None:
            image = Image.open(io.BytesIO(file))
            size = (image.width * scale, image.height * scale)
            return Result(_pixels_on_white(image.resize(size, Image.Resampling.BICUBIC)))
        result = self._upscaler.upscale(file, method.options, scale=scale)
        options = result.options
        nets = tuple(filter(None, (options.prescaler, options.drawing_prescaler)))
        picture = _pixels_on_white(result.image)
        if not options.refines:
            return Result(picture, nets=nets)
        seconds = float(result.timings["refine"])
        return Result(picture, seconds, (*nets, "mini"), *self._borders(options))

    def _borders(self, options: ResolvedOptions) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return where windows begin or end inside the picture, in pixels."""
        facts = self._upscaler.bundle.facts
        size = options.width, options.height
        grid = canvas_piece(facts, *size, options.window, options.overlap).grid
        factor = facts.latent_factor
        columns = _inside(grid.columns, grid.window_width, factor, options.width)
        return columns, _inside(grid.rows, grid.window_height, factor, options.height)


def _pixels_on_white(image: Image.Image) -> Picture:
    levels = np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    return on_white(np.asarray(levels / np.float32(255), np.float32))


def _inside(starts: Sequence[int], window: int, factor: int, side: int) -> tuple[int, ...]:
    edges = {edge * factor for start in starts for edge in (start, start + window)}
    return tuple(sorted(edge for edge in edges if 0 < edge < side))
