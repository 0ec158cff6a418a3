"""tegula from above: prepare -> prescale -> refine -> finish."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from tegula import __version__, rates
from tegula.errors import OptionError
from tegula.folders import write_atomically
from tegula.images.adjust import fuse_exposures, lock_colour
from tegula.images.deep import DeepPixels
from tegula.images.encode import Encoded, encode
from tegula.images.formats import format_for
from tegula.images.metadata import Metadata
from tegula.images.open import Source
from tegula.images.pixels import Size, enlarge_lanczos, to_image
from tegula.models import DEFAULT_BUNDLE
from tegula.models.bundle import Bundle, SplitDenoiser
from tegula.models.compiled import default_window_batch, optimise_bundle
from tegula.models.costs import BundleCost, Cost, bundle_cost, prescaler_flops
from tegula.models.device import pick_device, pick_dtype
from tegula.models.faces.networks import FaceRestorer, load_detector, load_restorer
from tegula.models.library import FileKind, find_file
from tegula.models.load import load_bundle
from tegula.models.prescalers import Prescaler
from tegula.models.prescalers.load import load_prescaler
from tegula.models.prompt import PromptStyle, split_tags
from tegula.options import ResolvedOptions, UpscaleOptions, resolve, with_context
from tegula.pipeline.faces import NONE_FOUND, FaceWork
from tegula.pipeline.finish import finish
from tegula.pipeline.prepare import Prepared, prepare, read_spatial_control
from tegula.pipeline.prescale import prescale
from tegula.pipeline.redraw import refine_redraw
from tegula.pipeline.refine import RefineJob, refine_canvas
from tegula.pipeline.sampler import prompts_of
from tegula.pipeline.sharing import in_order, shared
from tegula.plan import Costs, Memory, Plan, expected_memory, make_plan
from tegula.progress import (
    Cancel,
    Cancelled,
    OnPreview,
    OnProgress,
    Reporter,
    StageClock,
    StageProgress,
    never_cancelled,
)
from tegula.regions import parse_region

_FACE_PRESCALER = "realesrgan-x4plus"
_USUAL_SIDE = 1024
"""Of the usual picture, by whose seconds a server estimates a model that it has not run yet."""
_REFINE = {"canvas": refine_canvas, "redraw": refine_redraw}


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
    warnings: sentences on options that could not be followed.
    deep: the result with sixteen bits a channel, when the source has more than eight; PNG and
        TIFF files are written of it.
    """

    image: Image.Image
    source: Image.Image
    options: ResolvedOptions
    settings: Mapping[str, object]
    metadata: Metadata
    timings: Mapping[str, float]
    plan: Plan
    warnings: tuple[str, ...]
    deep: DeepPixels | None = None

    @property
    def seed(self) -> int:
        """The seed that gives this result again."""
        return self.options.seed

    def encoded(
        self,
        file_format: str = "png",
        *,
        quality: int = 95,
        settings: Mapping[str, object] | None = None,
    ) -> Encoded:
        """Return the bytes of a file with the source's profile and metadata and the settings.

        Args:
            file_format: png, jpeg, webp, avif or tiff.
            quality: 1..100, for JPEG, WebP and AVIF.
            settings: instead of those of the result, to be read by ``tegula upscale --like``.

        Raises:
            OptionError: unknown format, or quality out of bounds.
            InputError: a side is longer than the format allows.
        """
        return encode(
            self.image,
            file_format,
            quality=quality,
            metadata=self.metadata,
            settings=self.settings if settings is None else settings,
            deep=self.deep,
        )

    def save(
        self, path: str | Path, *, file_format: str | None = None, quality: int = 95
    ) -> tuple[str, ...]:
        """Write the result as ``tegula upscale`` does, at once or not at all.

        Profile, metadata and settings are kept, and sixteen bits where there are any;
        ``image.save`` would lose them.

        Args:
            path: of the file; its ending says the format, unless ``file_format`` does.
            file_format: png, jpeg, webp, avif or tiff.
            quality: 1..100, for JPEG, WebP and AVIF.

        Returns:
            Sentences on what the format could not hold.

        Raises:
            OptionError, InputError: as ``encoded`` does.
            PathError: the file cannot be written; nothing is left of it then.
        """
        target = Path(path)
        written = self.encoded(format_for(target, file_format), quality=quality)
        write_atomically(target, written.data)
        return written.warnings

    def _repr_png_(self) -> bytes:
        """Show the result in a notebook."""
        return self.encoded().data


@dataclass
class Upscaler:
    """Enlarges pictures with one bundle on one device.

    Load it once and call ``upscale`` as often as wanted, from one thread at a time.

    Example:
        >>> upscaler = Upscaler.load()
        >>> upscaler.upscale("photo.jpg", scale=4).save("large.png")
    """

    bundle: Bundle
    _prescalers: dict[str, Prescaler] = field(default_factory=dict, repr=False)
    _restorers: dict[str, FaceRestorer] = field(default_factory=dict, repr=False)
    _prescaler_costs: dict[str, Cost] = field(default_factory=dict, repr=False)
    _learns: bool = field(default=True, repr=False)
    _merges: bool = field(default=True, repr=False)

    @classmethod
    def load(
        cls,
        bundle: str = DEFAULT_BUNDLE,
        *,
        controlnet: str | None = None,
        vae: str | None = None,
        loras: Sequence[tuple[str, float]] = (),
        few_step: str | None = None,
        embeddings: Sequence[str] = (),
        device: str = "auto",
        precision: str = "auto",
        backend: str = "torch",
        compile: bool = False,  # noqa: A002 - torch's own word for it
    ) -> Upscaler:
        """Load a bundle onto a device.

        Args:
            bundle: a name that ``tegula models`` lists, a hub id, a diffusers folder, or
                a single-file checkpoint. Parts may be given by such names, too.
            controlnet: hub id, folder or file of the tile ControlNet, if the bundle's own
                is not wanted; ``none`` does without.
            vae: hub id, folder or file of another autoencoder.
            loras: (hub id or file, weight) of LoRAs, merged in this order.
            few_step: a LoRA for few steps, by file or by name (hyper-4, tcd, lcm, ...), or
                ``auto`` for the best that is on this machine. With one, also among
                ``loras``, all presets take its scheduler, steps and guidance; ``none``
                leaves the presets as they are.
            embeddings: files of textual inversions.
            device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
            precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
            backend: ``torch``, or ``openvino`` for processors.
            compile: compile the networks by torch for a few static batch sizes and run
                each once; takes minutes the first time and is kept in the cache folder.

        Raises:
            ModelError: the weights are unknown, missing or broken; see its subclasses.
            OptionError: no such device, precision or backend, or no compiler.
        """
        on = pick_device(device)
        loaded = load_bundle(
            bundle,
            controlnet=controlnet,
            vae=vae,
            loras=loras,
            few_step=few_step,
            embeddings=embeddings,
            device=on,
            dtype=pick_dtype(on, precision),
        )
        return cls(optimise_bundle(loaded, backend, compiled=compile))

    def upscale(
        self,
        source: Source | Prepared,
        options: UpscaleOptions | None = None,
        *,
        mask: Source | None = None,
        strength_map: Source | None = None,
        on_progress: OnProgress | None = None,
        on_preview: OnPreview | None = None,
        cancelled: Cancelled = never_cancelled,
        **named: Any,
    ) -> UpscaleResult:
        """Enlarge one picture.

        Example:
            >>> upscaler.upscale("photo.jpg", scale=4).save("large.png")

        Args:
            source: a path, the bytes of a file, a binary file, a Pillow image, a numpy array
                or a torch tensor, as ``tegula.images.open.decode`` takes them; or what
                ``tegula.pipeline.prepare`` made of one with the same options.
            options: what to do; the balanced preset at 2x by default.
            mask: a picture of any size, laid over the source: white is refined, black
                stays as prescaled.
            strength_map: a grey picture of any size, laid over the source: what share of
                the creativity each place gets.
            on_progress: called with how far the work is.
            on_preview: shown small pictures of the work so far; they change nothing of the
                result.
            cancelled: asked between small pieces of work; True stops the upscale.
            **named: fields of ``UpscaleOptions`` by their names, in place of ``options`` or
                on top of them.

        Raises:
            InputError: the source or an option cannot be used; see its subclasses.
            PathError: the source cannot be read.
            ModelError: the prescaler is unknown, missing or broken.
            NumericalError, OutOfMemoryError, CancelledError: as their names say.
        """
        if not isinstance(options, UpscaleOptions | None):
            raise OptionError(
                f"options is a {type(options).__name__}; give UpscaleOptions, or the options by "
                "their names, such as scale=4."
            )
        options = (options or UpscaleOptions()).replaced(**named)
        cancel = Cancel(cancelled)
        # Loading and counting happen once, so they must not be timed as part of a stage.
        prescaler = self._prescaler(
            options.prescaler or self.bundle.facts.presets[options.preset].prescaler
        )
        self._costs(prescaler)
        clock = StageClock(cancel)
        with clock("prepare"):
            prepared, resolved, plan = self.prepare(source, options)
            wider = with_context(options, prepared.facts.size)
            control = read_spatial_control(mask, strength_map, wider, resolved, prepared)
            restore_faces = self._face_work(resolved)
            reporter = self._reporter(on_progress, plan)
        with clock("prescale"):
            size, progress = plan.size, StageProgress(reporter.units("prescale"), cancel)
            prescaled = prescale(prepared.rgb, size, prescaler, progress=progress)
            enlarged = enlarge_lanczos(prepared.rgb, size)
            prescaled = lock_colour(prescaled, enlarged, resolved, out=prescaled)
            prescaled = fuse_exposures(prescaled, resolved.hdr)
        loras, left_out = self._find_loras(options)
        with clock("refine"), self._merged(loras if resolved.refines else ()) as merged:
            strength, refined = control.strength(prescaled, resolved.flat_skip), prescaled
            if resolved.refines:
                show = (lambda small: on_preview(to_image(small))) if on_preview else None
                progress = StageProgress(reporter.units("refine"), cancel, show)
                job = RefineJob(self.bundle, prescaled, enlarged, resolved, strength)
                refined = _REFINE[resolved.mode](job, progress)
                del job
            # Large pictures take gigabytes each: what finish does not need goes before it.
            typical = strength is None and on_preview is None
            del enlarged, strength
        with clock("finish"):
            reporter.begin("finish")
            faces = restore_faces(prepared.rgb, cancel) if restore_faces else ()
            finished = finish(refined, prescaled, prepared, resolved, control.mask, faces)
        reporter.finished()
        # What says nothing of other upscales: reading ahead, less work than planned, or more.
        untypical = {
            "prepare": isinstance(source, Prepared) or resolved.faces,
            "refine": not typical or bool(loras),
            "finish": resolved.faces,
        }
        self._learn(plan, {s: t for s, t in clock.seconds.items() if not untypical.get(s)})
        image, deep = finished.image, finished.deep
        seen = to_image(prepared.rgb, prepared.alpha)
        if options.crop is not None and wider.crop is not None:
            # What was enlarged with it for the sake of its edges is cut away.
            middle = self._resolved(options.replaced(seed=resolved.seed), prepared.facts.size)
            size = (middle.width, middle.height)
            box = _part(resolved.offset, middle.offset, size)
            image, deep = image.crop(box), None if deep is None else deep.crop(box)
            seen = seen.crop(_part(wider.crop[:2], options.crop[:2], options.crop[2:]))
            resolved = middle
        return UpscaleResult(
            image=image,
            source=seen,
            options=resolved,
            settings={
                "version": __version__,
                "bundle": self.bundle.facts.name,
                "fingerprint": self.bundle.facts.fingerprint,
                **resolved.settings(),
                "asked": options.changed(),
            },
            metadata=finished.metadata,
            timings=clock.seconds,
            plan=plan,
            warnings=(
                *self.bundle.warnings,
                *self._ignored(options, resolved),
                *(left_out if resolved.refines else ()),
                *merged,
                *finished.warnings,
                *([NONE_FOUND] if restore_faces and not faces else []),
            ),
            deep=deep,
        )

    def upscale_many(
        self,
        sources: Sequence[Source],
        options: UpscaleOptions | None = None,
        *,
        at_once: int = 2,
        cancelled: Cancelled = never_cancelled,
    ) -> Iterator[UpscaleResult]:
        """Enlarge several pictures at once, with their windows in common batches.

        The results are what ``upscale`` gives, up to rounding, in the order of the
        sources. It is faster where one picture does not keep the device busy: on GPUs,
        and for pictures of few windows. The upscaler is not to be used otherwise until then.

        Args:
            sources: pictures, as ``upscale`` takes them.
            options: the same for all.
            at_once: pictures that run, and are in memory, at a time; at least 1.
            cancelled: asked between small pieces of work; True stops all.

        Raises:
            TegulaError: as ``upscale`` does for the first source that fails; those that
                run beside it are abandoned.
        """
        rows = 2 * at_once * default_window_batch(self.bundle)
        denoiser = shared(self.bundle.denoiser, rows)
        together = dataclasses.replace(
            self,
            bundle=dataclasses.replace(self.bundle, denoiser=denoiser),
            _learns=False,
            _merges=False,
        )
        given_up = threading.Event()

        def one(source: Source) -> UpscaleResult:
            with denoiser.member():
                return together.upscale(
                    source, options, cancelled=lambda: given_up.is_set() or cancelled()
                )

        loras, _ = self._find_loras(options or UpscaleOptions())
        with self._merged(loras), ThreadPoolExecutor(at_once) as pool:
            try:
                yield from in_order(pool, one, sources, at_once)
            finally:
                given_up.set()

    def prepare(
        self, source: Source | Prepared, options: UpscaleOptions
    ) -> tuple[Prepared, ResolvedOptions, Plan]:
        """Decode the source, resolve every option for it, and count the work.

        Raises:
            InputError, PathError: as ``upscale`` does.
        """
        prepared = source if isinstance(source, Prepared) else prepare(source, options)
        size = prepared.facts.size
        resolved = self._resolved(with_context(options, size), size)
        plan = self._plan(self._prescaler(resolved.prescaler), prepared.size, resolved)
        return prepared, resolved, plan

    def forecast(self, source: Source, options: UpscaleOptions) -> tuple[Plan, Memory]:
        """Count the work and the memory of an upscale.

        Raises:
            InputError, PathError: as ``upscale`` does.
        """
        _, resolved, plan = self.prepare(source, options)
        prescaler = self._prescaler(resolved.prescaler)
        return plan, expected_memory(self.bundle, self._bundle_cost, prescaler, plan, resolved)

    def expected_seconds(self, plan: Plan) -> Mapping[str, float] | None:
        """Return how long a plan takes by stage, judged by earlier upscales; None if unknown."""
        return rates.find(rates.setting_of(self.bundle)).seconds(plan)

    def _learn(self, plan: Plan, seconds: Mapping[str, float]) -> None:
        """Remember how long the stages took; of a usual picture, too, if it is known."""
        if not self._learns:
            return
        size = _USUAL_SIDE, _USUAL_SIDE
        options = self._resolved(UpscaleOptions(seed=0), size)
        prescaler = self._prescalers.get(options.prescaler)
        usual = None if prescaler is None else self._plan(prescaler, size, options)
        rates.remember(rates.setting_of(self.bundle), plan, seconds, usual)

    def _resolved(self, options: UpscaleOptions, source_size: tuple[int, int]) -> ResolvedOptions:
        facts = self.bundle.facts
        resolved = resolve(options, facts.presets, facts.window, source_size)
        guidance_scale = min(resolved.guidance_scale, facts.strongest_guidance)
        return resolved.replaced(guidance_scale=guidance_scale)

    def _plan(
        self, prescaler: Prescaler, source_size: tuple[int, int], options: ResolvedOptions
    ) -> Plan:
        costs = self._costs(prescaler)
        return make_plan(self.bundle, prescaler.facts, costs, source_size, options)

    def _costs(self, prescaler: Prescaler) -> Costs:
        name = prescaler.facts.name
        if name not in self._prescaler_costs:
            self._prescaler_costs[name] = prescaler_flops(prescaler)
        return Costs(self._bundle_cost, self._prescaler_costs[name])

    @cached_property
    def _bundle_cost(self) -> BundleCost:
        return bundle_cost(self.bundle)

    def _reporter(self, on_progress: OnProgress | None, plan: Plan) -> Reporter:
        seconds = None if on_progress is None else self.expected_seconds(plan)
        if not seconds:
            return Reporter(on_progress, plan.shares)
        # Preparing is over when the first report is made.
        seconds = {stage: part for stage, part in seconds.items() if stage != "prepare"}
        total = sum(seconds.values()) or 1.0
        return Reporter(on_progress, {s: n / total for s, n in seconds.items()}, total)

    def _prescaler(self, name: str) -> Prescaler:
        if name not in self._prescalers:
            self._prescalers[name] = load_prescaler(name, self.bundle.device, self.bundle.dtype)
        return self._prescalers[name]

    def _face_work(self, options: ResolvedOptions) -> FaceWork | None:
        """Load what restores faces, before any work is done; None where none is asked for."""
        if not options.faces:
            return None
        if options.faces not in self._restorers:
            self._restorers[options.faces] = load_restorer(options.faces, self.bundle.device)
        prescaler = self._prescaler(options.prescaler)
        if options.face_upsample and prescaler.network is None:
            prescaler = self._prescaler(_FACE_PRESCALER)
        return FaceWork(
            load_detector(),
            self._restorers[options.faces],
            prescaler if options.face_upsample else None,
            options,
        )

    def _find_loras(self, options: UpscaleOptions) -> tuple[list[tuple[str, float]], list[str]]:
        """Return the LoRAs that prompts name, file and weight, and sentences on those left out.

        They are found by the names of files alone: a prompt may come from anywhere.
        """
        weighting, facts = options.prompt_weighting, self.bundle.facts
        prompts = [options.prompt, *(parse_region(text).prompt for text in options.regions)]
        loras, left_out = [], []
        for tag in (tag for prompt in prompts for tag in split_tags(prompt, weighting)[1]):
            reason, file = tag.fault, None
            if not reason and self.bundle.with_loras is None:
                reason = f"the networks of {facts.name} cannot be changed for a single run"
            elif not reason:
                file = find_file(tag.name, FileKind.LORA)
                reason = "there is no LoRA of that name; `tegula models` lists those there are"
            if file is not None and tag.weight is not None:
                loras.append((str(file), tag.weight))
            else:
                left_out.append(tag.left_out(reason))
        left_out += [
            tag.left_out("it counts in the prompt, not in the negative prompt")
            for tag in split_tags(options.negative_prompt or "", weighting)[1]
        ]
        return loras, left_out

    @contextmanager
    def _merged(self, loras: Sequence[tuple[str, float]]) -> Iterator[Sequence[str]]:
        """Run with LoRAs in the networks, and take them out again; returns warnings."""
        if not loras or not self._merges or self.bundle.with_loras is None:
            yield ()
            return
        with self.bundle.with_loras(loras) as warnings:
            yield warnings

    def _ignored(self, options: UpscaleOptions, resolved: ResolvedOptions) -> Iterator[str]:
        """Yield sentences on options that the bundle cannot follow."""
        if not resolved.refines:
            return
        facts, scale = self.bundle.facts, options.guidance_scale
        if scale is not None and scale > resolved.guidance_scale:
            yield (
                f"{facts.name} takes a guidance scale of up to {facts.strongest_guidance:g}; "
                f"{scale:g} was held to it."
            )
        if resolved.feature_reuse > 1 and not isinstance(self.bundle.denoiser, SplitDenoiser):
            yield f"{facts.name} runs as a whole, so feature_reuse has no effect."
        if resolved.clip_skip > 1 and facts.family == "mini":
            yield f"{facts.name} has no CLIP, so clip_skip has no effect."
        positive, negative = prompts_of(resolved)
        ignored = self.bundle.text.ignored_words(" ".join((*positive, negative)))
        if ignored:
            yield f"{facts.name} does not know and ignores: {', '.join(ignored)}."
        used = [*positive, negative] if resolved.guidance_scale > 1 else positive
        for word in self.bundle.text.unused_words(used, PromptStyle.of(resolved)):
            yield (
                f"The embedding {word} is loaded and has no effect: its word stands in no prompt, "
                f"nor in a negative prompt with a guidance scale above 1."
            )


def _part(at: Size, wanted: Size, size: Size) -> tuple[int, int, int, int]:
    """Return the left, top, right and bottom of a part within what lies at ``at``."""
    left, top = wanted[0] - at[0], wanted[1] - at[1]
    return left, top, left + size[0], top + size[1]
