"""Refine: tiled diffusion over a prescaled picture; what both modes share, and canvas mode.

Both modes encode pieces of a canvas, add noise, sample, decode, and blend the result in.
Canvas mode has a single piece, which is everything. Redraw mode, in ``redraw``, has many
and pastes one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tegula.images.pixels import Size
from tegula.models.bundle import Bundle, ControlImage, TileableAutoencoder
from tegula.options import ResolvedOptions
from tegula.pipeline import autoencoder
from tegula.pipeline.evaluate import BatchSize
from tegula.pipeline.pictures import extend
from tegula.pipeline.preview import latents_watcher, small_picture
from tegula.pipeline.sampler import (
    CanvasSampler,
    Conditioning,
    Watch,
    crop_control,
    embed_windows,
    encode_prompts,
    places_of,
)
from tegula.pipeline.schedulers import NoiseSchedule, schedule_of
from tegula.pipeline.shards import Shards
from tegula.pipeline.steps import Guidance, MaskSchedule, blend_weights, first_steps
from tegula.pipeline.windows import Piece, Window, canvas_piece
from tegula.progress import SILENT, StageProgress

_ENCODING = 0.3
"""Share of the autoencoder's work that encoding takes: decoders are larger than encoders."""

PICTURES = 3
"""Pictures of the canvas' size that refine keeps: prescaled, source, and result."""


@dataclass(frozen=True)
class RefineJob:
    """What refine works on.

    bundle: the diffusion model.
    prescaled: [height, width, 3] in 0..1; the first canvas, and the control image. The result
        lies where it does: on the host where pictures would take too much of the device.
    source: the source enlarged by Lanczos to the same size.
    strength: [height, width] in 0..1, the share of the denoise strength that each pixel
        gets; None gives all of it everywhere.
    coding: share of the work that the autoencoder takes.
    weight: [height, width], what the control scale is multiplied by; None is 1 everywhere.
    shards: spreads windows and tiles over helpers; None runs all of them here.
    """

    bundle: Bundle
    prescaled: Tensor
    source: Tensor
    options: ResolvedOptions
    strength: Tensor | None = None
    coding: float = 0.0
    weight: Tensor | None = None
    shards: Shards | None = None


@torch.inference_mode()
def refine_canvas(job: RefineJob, progress: StageProgress = SILENT) -> Tensor:
    """Add detail to a prescaled picture by tiled diffusion of one canvas.

    Args:
        job: with a creativity above 0.
        progress: counts windows of all steps, is checked for cancel between batches and
            autoencoder tiles, and is shown previews, the prescaled picture first.

    Returns:
        A picture shaped like ``job.prescaled``, in 0..1.

    Raises:
        OptionError: the window does not fit the model.
        CancelledError, NumericalError, OutOfMemoryError: as their names say.
    """
    options, (height, width) = job.options, job.prescaled.shape[:2]
    piece = canvas_piece(job.bundle.facts, width, height, options.window, options.overlap)
    diffusion = Diffusion(job, piece.area.width, piece.area.height)
    control, steps = diffusion.control, len(diffusion.schedule(options.creativity))
    watch = None
    if progress.on_picture is not None:
        progress.on_picture(small_picture(control.prescaled[..., :height, :width]))
        watch = latents_watcher(job.bundle, control, (height, width), steps, progress.on_picture)
    (refined,) = diffusion.run(control.prescaled, [piece], options.creativity, progress, watch)
    weights = diffusion.weights(piece.area, steps)
    if weights is not None:
        refined = torch.lerp(control.prescaled, refined, weights)
    return as_picture(refined[..., :height, :width])


class Diffusion:
    """Encode -> noise -> sample -> decode, for pieces of the canvas of one job.

    control: the job's pictures, padded to the canvas; whatever is decoded lies where they do.
    strength: the job's, [1, 1, height, width] beside them.
    """

    def __init__(self, job: RefineJob, width: int, height: int) -> None:
        """Lay the pictures of a job on a canvas of this size in pixels."""
        bundle = job.bundle

        def on_canvas(picture: Tensor) -> Tensor:
            below, right = height - picture.shape[0], width - picture.shape[1]
            return extend(picture, (0, below), (0, right), "mirrored").permute(2, 0, 1)[None]

        def plane(values: Tensor | None) -> Tensor | None:
            return None if values is None else on_canvas(values[..., None])

        self.control = ControlImage(
            on_canvas(job.prescaled), on_canvas(job.source), plane(job.weight)
        )
        self.strength = plane(job.strength)
        self._bundle = bundle
        self._options = job.options
        # Shares of the work at which encoding and sampling end; decoding ends at 1.
        self._encoding_ends = _ENCODING * job.coding
        self._sampling_ends = 1.0 - job.coding + self._encoding_ends
        self._prompts = encode_prompts(bundle, job.options)
        self._batch = BatchSize.of(bundle, job.options)
        self._shards = job.shards

    def schedule(self, denoise_strength: float) -> NoiseSchedule:
        """Return a fresh schedule for a run of this strength."""
        return schedule_of(self._bundle.scheduler, self._options, denoise_strength)

    def weights(self, area: Window, steps: int) -> Tensor | None:
        """Return how far each pixel of what was refined counts; None: all the way."""
        if self.strength is None:
            return None
        return blend_weights(self.strength[area.index], steps)

    def run(
        self,
        canvas: Tensor,
        pieces: Sequence[Piece],
        denoise_strength: float,
        progress: StageProgress,
        watch: Watch | None = None,
    ) -> Iterator[Tensor]:
        """Yield what becomes of each piece, [1, 3, height, width], not clamped.

        Every piece starts from the same noise, but for the canvas of a crop: its noise is
        that of its place in the whole, so that a crop shows what the whole will show. All
        pieces are read before the first is yielded.

        Args:
            canvas: [1, 3, height, width], as ``control`` lies; the pieces are read from it.
            pieces: of one size.
            denoise_strength: above 0.
            progress: counts windows of all steps of these pieces; its share is that of all
                that is done here.
            watch: shown the clean latents by now.
        """
        latents = self._sampled(canvas, pieces, denoise_strength, progress, watch)
        decoding = progress.part(self._sampling_ends, 1.0)

        def decoded(rows: slice) -> Tensor:
            control = crop_control(self.control, pieces[rows.start].area)
            if rows.stop - rows.start > 1:
                progress.cancel.check()
                return autoencoder.decode_together(self._bundle, latents[rows], control)
            return autoencoder.decode(
                self._bundle,
                latents[rows],
                control,
                _share(decoding, rows, len(pieces)),
                self._shards,
            )

        for rows, pictures in self._coded_at_once(pieces).run(decoded, len(pieces)):
            decoding.on_share(rows.stop / len(pieces))
            yield from torch.split(pictures, 1)

    def _coded_at_once(self, pieces: Sequence[Piece]) -> BatchSize:
        area = pieces[0].area
        return BatchSize(autoencoder.coded_at_once(self._bundle, (area.width, area.height)))

    def _sampled(
        self,
        canvas: Tensor,
        pieces: Sequence[Piece],
        denoise_strength: float,
        progress: StageProgress,
        watch: Watch | None,
    ) -> Tensor:
        """Return the clean latents of pieces, [pieces, channels, height, width]."""
        bundle, options, factor = self._bundle, self._options, self._bundle.facts.latent_factor
        generators = [torch.Generator("cpu").manual_seed(options.seed) for _ in pieces]
        encoding = progress.part(0.0, self._encoding_ends)

        def encoded(rows: slice) -> Tensor:
            images = [canvas[piece.area.index] for piece in pieces[rows]]
            if len(images) > 1:
                progress.cancel.check()
                return autoencoder.encode_together(bundle, torch.cat(images), generators[rows])
            return autoencoder.encode(
                bundle,
                images[0],
                crop_control(self.control, pieces[rows.start].area),
                generators[rows.start],
                _share(encoding, rows, len(pieces)),
                self._shards,
            )

        parts = []
        for rows, part in self._coded_at_once(pieces).run(encoded, len(pieces)):
            encoding.on_share(rows.stop / len(pieces))
            parts.append(part.to(bundle.device))
        initial = torch.cat(parts)
        del parts
        if options.whole is not None and options.mode == "canvas":
            drawn = [self._noise_at(options.offset, options.whole, initial[:1].shape)]
        else:
            drawn = [torch.randn(initial[:1].shape, generator=each) for each in generators]
        noise = torch.cat(drawn).to(bundle.device)
        schedule, mask = self.schedule(denoise_strength), None
        if self.strength is not None:
            first = [
                first_steps(self.strength[piece.area.index], len(schedule), factor)
                for piece in pieces
            ]
            mask = MaskSchedule(initial, noise, torch.cat(first).to(bundle.device))
        places = places_of(pieces, factor, options.placed_regions, bundle.device)
        control = embed_windows(bundle, self.control, places.windows, self._batch)
        sampler = CanvasSampler(
            bundle.denoiser,
            bundle.dtype,
            places,
            Conditioning(*self._prompts, control),
            Guidance.of(options),
            self._batch,
            options.feature_reuse,
            self._shards,
        )
        # The noisy start is handed over for good: `sample` lets go of it after its first step,
        # so no name here may hold on to it, nor to what it was made of. Otherwise large
        # pictures would take up to three latent canvases more. A list can be emptied within
        # the call, a variable cannot.
        start = [schedule.noised(initial, noise, 0)]
        del initial, noise, drawn
        sampling = progress.part(self._encoding_ends, self._sampling_ends)
        return sampler.sample(start.pop(), schedule, generators, sampling, mask, watch)

    def _noise_at(self, offset: Size, whole: Size, shape: torch.Size) -> Tensor:
        """Return the noise that the canvas of the whole result has where a crop of it lies.

        Args:
            offset: of the crop, in pixels of the whole result.
            whole: width and height of the whole result.
            shape: [1, channels, height, width] of the crop's canvas.
        """
        options, facts, factor = self._options, self._bundle.facts, self._bundle.facts.latent_factor
        canvas = canvas_piece(facts, *whole, options.window, options.overlap).area
        of_whole = (*shape[:2], canvas.height // factor, canvas.width // factor)
        generator = torch.Generator("cpu").manual_seed(options.seed)
        if isinstance(self._bundle.autoencoder, TileableAutoencoder):
            # It drew a sample of the posterior before the noise.
            torch.randn(of_whole, generator=generator)
        noise = torch.randn(of_whole, generator=generator)
        left, top = round(offset[0] / factor), round(offset[1] / factor)
        inside = noise[..., top : top + shape[-2], left : left + shape[-1]]
        # The canvas of a small crop is a window, which may reach beyond the canvas of the whole.
        placed = torch.randn(shape, generator=generator)
        placed[..., : inside.shape[-2], : inside.shape[-1]] = inside
        return placed


def _share(progress: StageProgress, rows: slice, count: int) -> StageProgress:
    return progress.part(rows.start / count, rows.stop / count)


def as_picture(image: Tensor) -> Tensor:
    """Return [height, width, 3], cut to 0..1; the image itself is cut too."""
    return image[0].clamp_(0, 1).permute(1, 2, 0)
