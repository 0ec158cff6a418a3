"""Refine, canvas mode: Stable Diffusion with the tile ControlNet over one canvas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tegula.errors import OptionError
from tegula.models.bundle import (
    Bundle,
    BundleFacts,
    ControlImage,
    ControlScale,
    TileableAutoencoder,
)
from tegula.models.compiled import usual_batch
from tegula.models.device import home_of
from tegula.options import ResolvedOptions
from tegula.pipeline import autoencoder as tiled_autoencoder
from tegula.pipeline.batches import HalvingBatch, SafeDenoiser
from tegula.pipeline.sampler import (
    CanvasSampler,
    Conditioning,
    Guidance,
    Hold,
    Interval,
    Watch,
    blend_weights,
    first_steps,
    places_of,
)
from tegula.pipeline.schedulers import NoiseSchedule, ScheduleChoice, make_schedule
from tegula.pipeline.windows import (
    CanvasSize,
    Window,
    WindowGrid,
    fit_canvas,
    grid_windows,
    pad_to_canvas,
    prompt_shares,
)
from tegula.progress import SILENT, OnPicture, StageProgress

# Small pictures of a refine that is under way.
#
# Nothing here draws a random number or changes what it is shown, so that a run with
# previews gives the same result as one without.

PREVIEWS = 8
"""About as many are shown of one walk through the noise levels."""

SIDE = 512
"""Longest side of a preview in pixels, at most."""

HEAVY_SIDE = 256
"""The same where the bundle's own autoencoder has to decode it."""

_STRIP = 16
"""Latent rows that are decoded at once, for each time that the preview is smaller."""


def latents_watcher(
    bundle: Bundle, control: ControlImage, size: tuple[int, int], levels: int, show: OnPicture
) -> Watch:
    """Return what shows previews of latents, at about ``PREVIEWS`` of the noise levels.

    Args:
        bundle: decodes them, with its light autoencoder where it has one.
        control: of the whole canvas.
        size: height and width of the picture on the canvas.
        levels: of the run.
        show: is given the previews.
    """
    return _seldom(levels - 1, lambda latents: show(_decoded(bundle, latents, control, size)))


def canvas_watcher(size: tuple[int, int], offers: int, show: OnPicture | None) -> Watch:
    """Return what shows previews of a canvas of pixels, the first and about ``PREVIEWS`` more.

    Args:
        size: height and width of the picture on the canvas.
        offers: how many canvases follow the first.
        show: is given the previews; None leaves them all out.
    """
    if show is None:
        return lambda _canvas: None
    height, width = size
    return _seldom(offers, lambda canvas: show(small_picture(canvas[..., :height, :width])), 0)


def _seldom(offers: int, take: Watch, first: int = 1) -> Watch:
    """Return what hands on about ``PREVIEWS`` of what it is offered, evenly spread.

    The first offer has the number ``first``; number 0 is always handed on.
    """
    every, numbers = max(1, -(-offers // PREVIEWS)), count(first)

    def offer(tensor: Tensor) -> None:
        if next(numbers) % every == 0:
            take(tensor)

    return offer


def small_picture(image: Tensor) -> NDArray[np.float32]:
    """Return a canvas [1, 3, height, width] as a picture of at most ``SIDE``, in 0..1."""
    small = _shrunk(image, _times(image.shape[-2:], SIDE))
    array: NDArray[np.float32] = small[0].float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    return array


def _decoded(
    bundle: Bundle, latents: Tensor, control: ControlImage, size: tuple[int, int]
) -> NDArray[np.float32]:
    height, width = size
    if not isinstance(bundle.autoencoder, TileableAutoencoder):
        return small_picture(_decoded_in_strips(bundle, latents, control, size))
    factor, light = bundle.facts.latent_factor, bundle.light_autoencoder
    side = HEAVY_SIDE if light is None else SIDE
    shown = latents[..., : -(-height // factor), : -(-width // factor)]
    shrunk = _shrunk(shown, _times(shown.shape[-2:], side // factor))
    return small_picture((light or bundle.autoencoder).decode(shrunk, control))


def _decoded_in_strips(
    bundle: Bundle, latents: Tensor, control: ControlImage, size: tuple[int, int]
) -> Tensor:
    """Decode latents that mean nothing without their control image, and shrink the picture."""
    (height, width), factor = size, bundle.facts.latent_factor
    times = _times(size, SIDE)
    strips, step = [], times * _STRIP
    for top in range(0, -(-height // factor), step):
        rows = slice(top * factor, (top + step) * factor)
        part = ControlImage(control.prescaled[..., rows, :], control.source[..., rows, :])
        picture = bundle.autoencoder.decode(latents[..., top : top + step, :], part)
        strips.append(_shrunk(picture, times))
    return torch.cat(strips, dim=2)[..., : -(-height // times), : -(-width // times)]


def _times(size: Sequence[int], side: int) -> int:
    return max(1, -(-max(size) // side))


def _shrunk(values: Tensor, times: int) -> Tensor:
    return functional.avg_pool2d(values.float(), times, ceil_mode=True) if times > 1 else values


# Refine, canvas mode: Stable Diffusion with the tile ControlNet over one canvas.

PICTURES = 3
"""Pictures of the canvas' size that refine keeps: prescaled, source, and result."""


@dataclass(frozen=True)
class RefineJob:
    """What refine works on.

    prescaled: [height, width, 3] in 0..1; the first canvas, and the control image.
    source: the source enlarged by Lanczos to the same size.
    strength: [height, width] in 0..1, the share of the denoise strength that each pixel
        gets; None gives all of it everywhere.
    """

    bundle: Bundle
    prescaled: NDArray[np.float32]
    source: NDArray[np.float32]
    options: ResolvedOptions
    strength: NDArray[np.float32] | None = None


@torch.inference_mode()
def refine_canvas(job: RefineJob, progress: StageProgress = SILENT) -> NDArray[np.float32]:
    """Add detail to a prescaled picture by tiled diffusion.

    Args:
        job: with a creativity above 0.
        progress: counts windows of all steps, is checked for cancel between batches and
            autoencoder tiles, and is shown previews, the prescaled picture first.

    Returns:
        A picture shaped like ``prescaled``, in 0..1.

    Raises:
        OptionError: the window does not fit the model.
        CancelledError, NumericalError, OutOfMemoryError: as their names say.
    """
    bundle, options = job.bundle, job.options
    height, width = job.prescaled.shape[:2]
    canvas = canvas_for(bundle.facts, width, height, options.window)
    home = home_of(PICTURES * 4 * 3 * canvas.width * canvas.height, bundle.device)
    control = ControlImage(
        to_tensor(pad_to_canvas(job.prescaled, canvas), home),
        to_tensor(pad_to_canvas(job.source, canvas), home),
    )
    generator = torch.Generator("cpu").manual_seed(options.seed)
    initial = tiled_autoencoder.encode(
        bundle, control.prescaled, control, generator, cancel=progress.cancel
    ).to(bundle.device)
    noise = torch.randn(initial.shape, generator=generator).to(bundle.device)
    schedule = schedule_of(bundle, options, options.creativity)
    steps, hold, share = len(schedule), None, None
    if job.strength is not None:
        share = to_tensor(pad_to_canvas(job.strength[..., None], canvas), home)
        first = first_steps(share, steps, bundle.facts.latent_factor).to(bundle.device)
        hold = Hold(initial, noise, first)
    sampler = _sampler(bundle, control, latent_grid(bundle.facts, canvas, options.overlap), options)
    watch = None
    if progress.on_picture is not None:
        progress.on_picture(small_picture(control.prescaled[..., :height, :width]))
        watch = latents_watcher(bundle, control, (height, width), steps, progress.on_picture)
    start = [schedule.add_noise(initial, noise)]
    del initial, noise
    latents = sampler.sample(start.pop(), schedule, generator, progress, hold, watch)
    del sampler, hold
    refined = tiled_autoencoder.decode(bundle, latents, control, cancel=progress.cancel)
    if share is not None:
        refined = torch.lerp(control.prescaled, refined, blend_weights(share, steps))
    return to_array(refined[..., :height, :width])


def _sampler(
    bundle: Bundle, control: ControlImage, grid: WindowGrid, options: ResolvedOptions
) -> CanvasSampler:
    factor, batch = bundle.facts.latent_factor, window_batch(bundle, options)
    windows = [window.scaled(factor) for window in grid.windows]
    shares = [prompt_shares(options.placed_regions, window, factor) for window in windows]
    return CanvasSampler(
        SafeDenoiser(bundle.denoiser, bundle.dtype),
        places_of(grid, bundle.device, shares),
        conditioning_of(bundle, options, embed_windows(bundle, control, windows, batch)),
        guidance_of(options),
        batch,
        options.feature_reuse,
    )


def canvas_for(facts: BundleFacts, width: int, height: int, window: int) -> CanvasSize:
    """Return canvas and window sides in pixels for a result of this size.

    Raises:
        OptionError: the window is too small for the model or no multiple of its step.
    """
    multiple = facts.window_multiple
    if window < facts.minimum_window or window % multiple:
        raise OptionError(
            f"A window of {window} px does not fit {facts.name}; it takes multiples of "
            f"{multiple} px from {facts.minimum_window} px up."
        )
    return fit_canvas(
        width,
        height,
        window,
        minimum_window=facts.minimum_window,
        window_multiple=multiple,
        factor=facts.latent_factor,
    )


def latent_grid(facts: BundleFacts, canvas: CanvasSize, overlap: float) -> WindowGrid:
    """Return the windows of a canvas in latent pixels."""
    factor = facts.latent_factor
    return grid_windows(
        canvas.width // factor,
        canvas.height // factor,
        canvas.window_width // factor,
        canvas.window_height // factor,
        overlap,
    )


def guidance_of(options: ResolvedOptions) -> Guidance:
    """Return how prompt and control steer a run with these options."""
    return Guidance(
        options.guidance_scale,
        Interval(options.guidance_start, options.guidance_end),
        ControlScale(options.resemblance, options.guess_mode),
        Interval(options.control_start, options.control_end),
    )


def schedule_of(bundle: Bundle, options: ResolvedOptions, denoise_strength: float) -> NoiseSchedule:
    """Return a fresh schedule for a run of this strength."""
    choice = ScheduleChoice(options.scheduler, options.steps, options.sigmas, options.exact_steps)
    return make_schedule(choice, bundle.scheduler, denoise_strength)


def conditioning_of(bundle: Bundle, options: ResolvedOptions, control: Tensor) -> Conditioning:
    """Encode the negative prompt, the common one, and the common one with each region's."""
    own = [
        ", ".join(filter(None, (options.prompt, region.prompt)))
        for region in options.placed_regions
    ]
    text = bundle.text.encode([options.negative_prompt, options.prompt, *own])
    return Conditioning(text[1:], text[:1], control)


def embed_windows(
    bundle: Bundle, control: ControlImage, windows: Sequence[Window], batch: HalvingBatch
) -> Tensor:
    """Encode the control image of every window, given in pixels, one row each.

    They are kept on the host where they would take too much of the device.
    """
    embedded = torch.empty(0)

    def embed(start: int, end: int) -> None:
        nonlocal embedded
        crops = [crop_control(control, window) for window in windows[start:end]]
        together = ControlImage(
            torch.cat([crop.prescaled for crop in crops]).to(bundle.device).contiguous(),
            torch.cat([crop.source for crop in crops]).to(bundle.device).contiguous(),
        )
        part = bundle.denoiser.embed_control(together)
        if start == 0:
            home = home_of(part[0].nbytes * len(windows), bundle.device)
            embedded = torch.empty(len(windows), *part.shape[1:], dtype=part.dtype, device=home)
        embedded[start:end] = part

    batch.run(embed, len(windows))
    return embedded


def crop_control(control: ControlImage, window: Window) -> ControlImage:
    """Cut a window, given in pixels, out of a control image."""
    return ControlImage(control.prescaled[window.index], control.source[window.index])


def window_batch(bundle: Bundle, options: ResolvedOptions) -> HalvingBatch:
    """Return the windows of one forward pass: as asked for, or what suits the device."""
    return HalvingBatch(options.window_batch or usual_batch(bundle, options.window))


def to_tensor(picture: NDArray[np.float32], home: torch.device) -> Tensor:
    """Return [1, channels, height, width], not to be written to: the host shares the memory."""
    writable = picture if picture.flags.writeable else picture.copy()
    return torch.from_numpy(writable).permute(2, 0, 1)[None].to(home)


def to_array(image: Tensor) -> NDArray[np.float32]:
    """Return [height, width, 3], cut to 0..1; the image itself is cut too."""
    array: NDArray[np.float32] = image[0].clamp_(0, 1).permute(1, 2, 0).cpu().numpy()
    return array
