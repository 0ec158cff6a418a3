"""Refine, canvas mode: Stable Diffusion with the tile ControlNet over one canvas."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tegula.diffusion import tiled_autoencoder
from tegula.diffusion.canvas import CanvasSampler, Conditioning, places_of
from tegula.diffusion.guidance import Guidance, Interval
from tegula.diffusion.hold import Hold, blend_weights, first_steps
from tegula.diffusion.prediction import HalvingBatch, SafeDenoiser
from tegula.diffusion.schedulers import NoiseSchedule, ScheduleChoice, make_schedule
from tegula.errors import OptionError
from tegula.models.bundle import Bundle, BundleFacts, ControlImage, ControlScale
from tegula.models.memory import home_of
from tegula.models.running import usual_batch
from tegula.options import ResolvedOptions
from tegula.progress import Cancelled, OnUnit, ignore_units, never_cancelled
from tegula.stages.preview import OnPicture, latents_watcher, small_picture
from tegula.tiling.canvas import CanvasSize, fit_canvas, pad_to_canvas
from tegula.tiling.regions import prompt_shares
from tegula.tiling.windows import Window, WindowGrid, grid_windows

PICTURES = 3
"""Pictures of the canvas' size that refine keeps: prescaled, source, and result."""


@torch.inference_mode()
def refine_canvas(
    bundle: Bundle,
    prescaled: NDArray[np.float32],
    source: NDArray[np.float32],
    options: ResolvedOptions,
    on_unit: OnUnit = ignore_units,
    cancelled: Cancelled = never_cancelled,
    strength: NDArray[np.float32] | None = None,
    *,
    show: OnPicture | None = None,
) -> NDArray[np.float32]:
    """Add detail to a prescaled picture by tiled diffusion.

    Args:
        bundle: the diffusion model.
        prescaled: [height, width, 3] in 0..1; init image and control image.
        source: the source enlarged by Lanczos to the same size.
        options: creativity must be above 0.
        on_unit: told (windows done, windows in all steps).
        cancelled: asked between batches and autoencoder tiles.
        strength: [height, width] in 0..1, the share of the denoise strength that each
            pixel gets; None gives all of it everywhere.
        show: given small pictures of what there is by now, the prescaled one first.

    Returns:
        A picture shaped like ``prescaled``, in 0..1.

    Raises:
        OptionError: the window does not fit the model.
        CancelledError, NumericalError, OutOfMemoryError: as their names say.
    """
    height, width = prescaled.shape[:2]
    canvas = canvas_for(bundle.facts, width, height, options.window)
    home = home_of(PICTURES * 4 * 3 * canvas.width * canvas.height, bundle.device)
    control = ControlImage(
        to_tensor(pad_to_canvas(prescaled, canvas), home),
        to_tensor(pad_to_canvas(source, canvas), home),
    )
    generator = torch.Generator("cpu").manual_seed(options.seed)
    initial = tiled_autoencoder.encode(
        bundle, control.prescaled, control, generator, cancelled=cancelled
    ).to(bundle.device)
    noise = torch.randn(initial.shape, generator=generator).to(bundle.device)
    schedule = schedule_of(bundle, options, options.creativity)
    steps, hold, share = len(schedule), None, None
    if strength is not None:
        share = to_tensor(pad_to_canvas(strength[..., None], canvas), home)
        first = first_steps(share, steps, bundle.facts.latent_factor).to(bundle.device)
        hold = Hold(initial, noise, first)
    sampler = _sampler(bundle, control, latent_grid(bundle.facts, canvas, options.overlap), options)
    watch = None
    if show is not None:
        show(small_picture(control.prescaled[..., :height, :width]))
        watch = latents_watcher(bundle, control, (height, width), steps, show)
    start = [schedule.add_noise(initial, noise)]
    del initial, noise
    latents = sampler.sample(start.pop(), schedule, generator, on_unit, cancelled, hold, watch)
    del sampler, hold
    refined = tiled_autoencoder.decode(bundle, latents, control, cancelled=cancelled)
    if share is not None:
        refined = torch.lerp(control.prescaled, refined, blend_weights(share, steps))
    return to_array(refined[..., :height, :width])


def _sampler(
    bundle: Bundle, control: ControlImage, grid: WindowGrid, options: ResolvedOptions
) -> CanvasSampler:
    factor, batch = bundle.facts.latent_factor, window_batch(bundle, options)
    windows = [window.scaled(factor) for window in grid.windows]
    shares = [prompt_shares(options.regions, window, factor) for window in windows]
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
    own = [", ".join(filter(None, (options.prompt, region.prompt))) for region in options.regions]
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
