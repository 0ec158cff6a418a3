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
from tegula.options import ResolvedOptions
from tegula.progress import Cancelled, OnUnit, ignore_units, never_cancelled
from tegula.tiling.canvas import CanvasSize, fit_canvas, pad_to_canvas
from tegula.tiling.regions import prompt_shares
from tegula.tiling.windows import Window, WindowGrid, grid_windows

CPU_WINDOW_BATCH = 4
GPU_WINDOW_BATCH = 16


@torch.inference_mode()
def refine_canvas(
    bundle: Bundle,
    prescaled: NDArray[np.float32],
    source: NDArray[np.float32],
    options: ResolvedOptions,
    on_unit: OnUnit = ignore_units,
    cancelled: Cancelled = never_cancelled,
    strength: NDArray[np.float32] | None = None,
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

    Returns:
        A picture shaped like ``prescaled``, in 0..1.

    Raises:
        OptionError: the window does not fit the model.
        CancelledError, NumericalError, OutOfMemoryError: as their names say.
    """
    height, width = prescaled.shape[:2]
    canvas = canvas_for(bundle.facts, width, height, options.window)
    control = ControlImage(
        to_tensor(pad_to_canvas(prescaled, canvas), bundle),
        to_tensor(pad_to_canvas(source, canvas), bundle),
    )
    generator = torch.Generator("cpu").manual_seed(options.seed)
    initial = tiled_autoencoder.encode(
        bundle, control.prescaled, control, generator, cancelled=cancelled
    )
    noise = torch.randn(initial.shape, generator=generator).to(bundle.device)
    schedule = schedule_of(bundle, options, options.creativity)
    steps, hold, share = len(schedule), None, None
    if strength is not None:
        share = to_strength(pad_to_canvas(strength[..., None], canvas), bundle)
        hold = Hold(initial, noise, first_steps(share, steps, bundle.facts.latent_factor))
    sampler = _sampler(bundle, control, latent_grid(bundle.facts, canvas, options.overlap), options)
    start = schedule.add_noise(initial, noise)
    latents = sampler.sample(start, schedule, generator, on_unit, cancelled, hold)
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
    """Encode the control image of every window, given in pixels, one row each."""
    embedded: list[Tensor] = []

    def embed(start: int, end: int) -> None:
        crops = [crop_control(control, window) for window in windows[start:end]]
        together = ControlImage(
            torch.cat([crop.prescaled for crop in crops]),
            torch.cat([crop.source for crop in crops]),
        )
        embedded.append(bundle.denoiser.embed_control(together))

    batch.run(embed, len(windows))
    return torch.cat(embedded)


def crop_control(control: ControlImage, window: Window) -> ControlImage:
    """Cut a window, given in pixels, out of a control image."""
    return ControlImage(control.prescaled[window.index], control.source[window.index])


def window_batch(bundle: Bundle, options: ResolvedOptions) -> HalvingBatch:
    """Return the windows of one forward pass: as asked for, or what suits the device."""
    usual = GPU_WINDOW_BATCH if bundle.device.type == "cuda" else CPU_WINDOW_BATCH
    return HalvingBatch(options.window_batch or usual)


def to_tensor(picture: NDArray[np.float32], bundle: Bundle) -> Tensor:
    """Return [1, 3, height, width] on the device of a bundle."""
    tensor = torch.tensor(picture.transpose(2, 0, 1)[None])
    return tensor.to(bundle.device)


def to_strength(strength: NDArray[np.float32], bundle: Bundle) -> Tensor:
    """Return [1, 1, height, width] on the device of a bundle."""
    return torch.tensor(strength[..., 0][None, None]).to(bundle.device)


def to_array(image: Tensor) -> NDArray[np.float32]:
    """Return [height, width, 3], cut to 0..1."""
    array: NDArray[np.float32] = image[0].clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    return array
