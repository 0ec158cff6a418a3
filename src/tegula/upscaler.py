"""tegula from above: prepare -> prescale -> refine -> finish."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

from PIL import Image

from tegula import __version__
from tegula.errors import CancelledError
from tegula.images.hdr import fuse_exposures
from tegula.images.metadata import Metadata
from tegula.images.opening import Source
from tegula.images.resize import enlarge_lanczos
from tegula.models.bundle import Bundle
from tegula.models.devices import pick_device, pick_dtype
from tegula.models.prescalers import Prescaler, load_prescaler
from tegula.models.registry import load_bundle
from tegula.options import ResolvedOptions, UpscaleOptions, resolve
from tegula.plan import PixelCost, Plan, make_plan, pixel_cost
from tegula.progress import Cancelled, OnProgress, Reporter, never_cancelled
from tegula.stages.control_by_place import read_control
from tegula.stages.finish import finish, lock_colour, source_image
from tegula.stages.prepare import Prepared, prepare
from tegula.stages.prescale import prescale
from tegula.stages.refine_canvas import refine_canvas
from tegula.stages.refine_redraw import refine_redraw

DEFAULT_BUNDLE = "mini"


@dataclass(frozen=True)
class UpscaleResult:
    """What an upscale yields.

    image: the result, of mode L, LA, RGB or RGBA.
    source: the source as it was enlarged: upright, cropped, sRGB.
    options: the settings with nothing left open.
    settings: the same and the models, as a result's file keeps them.
    metadata: what the file of the source hands on to the file of the result.
    timings: seconds by stage.
    plan: the work that was done.
    warnings: sentences on what was done otherwise than asked.
    """

    image: Image.Image
    source: Image.Image
    options: ResolvedOptions
    settings: Mapping[str, object]
    metadata: Metadata
    timings: Mapping[str, float]
    plan: Plan
    warnings: tuple[str, ...]

    @property
    def seed(self) -> int:
        """The seed that gives this result again."""
        return self.options.seed


@dataclass
class Upscaler:
    """Enlarges pictures with one bundle on one device.

    Load it once and call ``upscale`` as often as wanted, from one thread at a time.

    Example:
        >>> upscaler = Upscaler.load()
        >>> upscaler.upscale("photo.jpg", UpscaleOptions(scale=4)).image.save("large.png")
    """

    bundle: Bundle
    _prescalers: dict[str, Prescaler] = field(default_factory=dict, repr=False)

    @classmethod
    def load(
        cls,
        bundle: str = DEFAULT_BUNDLE,
        *,
        controlnet: str | None = None,
        vae: str | None = None,
        loras: Sequence[tuple[str, float]] = (),
        embeddings: Sequence[str] = (),
        device: str = "auto",
        precision: str = "auto",
    ) -> Upscaler:
        """Load a bundle onto a device.

        Args:
            bundle: a name that ``tegula models`` lists, a hub id, a diffusers folder, or
                a single-file ``.safetensors`` checkpoint.
            controlnet: hub id, folder or file of the tile ControlNet, if the bundle's own
                is not wanted.
            vae: hub id, folder or file of another autoencoder.
            loras: (hub id or file, weight) of LoRAs, fused in this order.
            embeddings: files of textual inversions.
            device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
            precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.

        Raises:
            ModelError: the weights are unknown, missing or broken; see its subclasses.
            OptionError: no such device or precision.
        """
        on = pick_device(device)
        return cls(
            load_bundle(
                bundle,
                controlnet=controlnet,
                vae=vae,
                loras=loras,
                embeddings=embeddings,
                device=on,
                dtype=pick_dtype(on, precision),
            )
        )

    def upscale(
        self,
        source: Source,
        options: UpscaleOptions | None = None,
        *,
        mask: Source | None = None,
        strength_map: Source | None = None,
        on_progress: OnProgress | None = None,
        cancelled: Cancelled = never_cancelled,
    ) -> UpscaleResult:
        """Enlarge one picture.

        Args:
            source: path, bytes, binary file or PIL image.
            options: what to do; the balanced preset at 2x by default.
            mask: a picture of any size, laid over the source: white is refined, black
                stays as prescaled.
            strength_map: a grey picture of any size, laid over the source: what share of
                the creativity each place gets.
            on_progress: told how far the work is.
            cancelled: asked between small pieces of work; True stops the upscale.

        Raises:
            InputError: the source or an option cannot be used; see its subclasses.
            PathError: the source cannot be read.
            ModelError: the prescaler is unknown, missing or broken.
            NumericalError, OutOfMemoryError, CancelledError: as their names say.
        """
        clock = _Clock(cancelled)
        with clock("prepare"):
            asked = options or UpscaleOptions()
            prepared, resolved, plan = self.prepare(source, asked)
            where = read_control(mask, strength_map, asked, resolved, prepared)
            prescaler = self._prescaler(resolved.prescaler)
            reporter = Reporter(on_progress, plan.shares)
        with clock("prescale"):
            size = resolved.width, resolved.height
            report = reporter.units("prescale")
            prescaled = prescale(prepared.rgb, size, prescaler, on_unit=report, cancelled=cancelled)
            enlarged = enlarge_lanczos(prepared.rgb, size)
            prescaled = lock_colour(prescaled, enlarged, resolved)
            prescaled = fuse_exposures(prescaled, resolved.hdr)
        with clock("refine"):
            strength = where.strength(prescaled, resolved.flat_skip)
            refined = prescaled
            if resolved.refines:
                refine = refine_redraw if resolved.mode == "redraw" else refine_canvas
                report = reporter.units("refine")
                refined = refine(
                    self.bundle, prescaled, enlarged, resolved, report, cancelled, strength
                )
        with clock("finish"):
            reporter.begin("finish")
            finished = finish(refined, prescaled, prepared, resolved, where.mask)
        reporter.finished()
        return UpscaleResult(
            image=finished.image,
            source=source_image(prepared),
            options=resolved,
            settings=self._settings(asked, resolved),
            metadata=finished.metadata,
            timings=clock.seconds,
            plan=plan,
            warnings=(
                *self.bundle.warnings,
                *self._held_back(asked, resolved),
                *finished.warnings,
            ),
        )

    def prepare(
        self, source: Source, options: UpscaleOptions
    ) -> tuple[Prepared, ResolvedOptions, Plan]:
        """Decode the source, settle every option for it, and count the work.

        Raises:
            InputError, PathError: as ``upscale`` does.
        """
        prepared = prepare(source, options)
        facts = self.bundle.facts
        resolved = resolve(options, facts.presets, facts.window, prepared.facts.size)
        guidance_scale = min(resolved.guidance_scale, facts.strongest_guidance)
        resolved = dataclasses.replace(resolved, guidance_scale=guidance_scale)
        prescaler = self._prescaler(resolved.prescaler)
        plan = make_plan(self.bundle, self._cost, prescaler, prepared.size, resolved)
        return prepared, resolved, plan

    @cached_property
    def _cost(self) -> PixelCost:
        return pixel_cost(self.bundle)

    def _prescaler(self, name: str) -> Prescaler:
        if name not in self._prescalers:
            self._prescalers[name] = load_prescaler(name, self.bundle.device, self.bundle.dtype)
        return self._prescalers[name]

    def _settings(self, asked: UpscaleOptions, options: ResolvedOptions) -> Mapping[str, object]:
        facts = self.bundle.facts
        models = {"bundle": facts.name, "fingerprint": facts.fingerprint}
        return {
            "version": __version__,
            **models,
            **dataclasses.asdict(options),
            "asked": asked.changed(),
        }

    def _held_back(self, asked: UpscaleOptions, options: ResolvedOptions) -> Iterator[str]:
        if not options.refines:
            return
        facts = self.bundle.facts
        if asked.guidance_scale is not None and asked.guidance_scale > options.guidance_scale:
            yield (
                f"{facts.name} takes a guidance scale of up to {facts.strongest_guidance:g}; "
                f"{asked.guidance_scale:g} was held to it."
            )
        ignored = self.bundle.text.ignored_words(f"{options.prompt} {options.negative_prompt}")
        if ignored:
            yield f"{facts.name} does not know and ignores: {', '.join(ignored)}."


class _Clock:
    """Measures stages and stops between them when asked to."""

    def __init__(self, cancelled: Cancelled) -> None:
        self.seconds: dict[str, float] = {}
        self._cancelled = cancelled

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if self._cancelled():
            raise CancelledError(f"Cancelled before {stage}; nothing was written.")
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start
