"""tegula from above: prepare -> prescale -> refine -> finish."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from tegula import __version__
from tegula.errors import OptionError
from tegula.expectation import Expectation
from tegula.images.open import Source
from tegula.images.pixels import Float, to_image
from tegula.models import DEFAULT_BUNDLE, BundleSettings
from tegula.models.bundle import Bundle
from tegula.models.device import home_of, pick_device, pick_dtype
from tegula.models.faces.likeness import can_describe
from tegula.models.load import load_bundle
from tegula.models.optimise import default_window_batch, optimise_bundle
from tegula.models.prescalers import Prescaler, is_tuned
from tegula.models.prescalers.int8 import multiplies_int8
from tegula.nets import Nets
from tegula.options import ResolvedOptions, UpscaleOptions
from tegula.pipeline.choices import choose, describe
from tegula.pipeline.faces import NONE_FOUND
from tegula.pipeline.finish import Layers, finish
from tegula.pipeline.likeness import USUAL_LIKENESS, LikenessGuard, control_by_faces
from tegula.pipeline.pictures import on_device, outlines
from tegula.pipeline.prepare import Placed, Prepared, prepare, read_spatial_control
from tegula.pipeline.prescale import NetCache, prescale_source
from tegula.pipeline.redraw import refine_redraw
from tegula.pipeline.refine import PICTURES, RefineJob, refine_canvas
from tegula.pipeline.remarks import ignored_options, loras_of_prompts, prompt_taken
from tegula.pipeline.shards import Shards, Spread
from tegula.pipeline.sharing import in_order, shared
from tegula.plan import Memory, Plan, expected_memory
from tegula.progress import (
    Cancel,
    Cancelled,
    OnPreview,
    OnProgress,
    Reporter,
    StageClock,
    never_cancelled,
)
from tegula.resolve import enlarged_part, preset_values, resolve, with_context
from tegula.result import UpscaleResult

_REFINE = {"canvas": refine_canvas, "redraw": refine_redraw}
_HOST = torch.device("cpu")
_PIXEL_BYTES = 12
"""Bytes of a pixel: three channels in float32."""


OnPlan = Callable[[Plan, "Mapping[str, float] | None"], None]
"""Called with the work of an upscale and its expected seconds by stage, None where unknown."""


@dataclass(frozen=True)
class Callbacks:
    """Whom an upscale keeps informed, and who may end it."""

    on_progress: OnProgress | None = None
    on_preview: OnPreview | None = None
    cancel: Cancel = field(default_factory=Cancel)
    on_plan: OnPlan | None = None

    def on_picture(self, small: Float) -> None:
        """Show a small array as a picture."""
        if self.on_preview is not None:
            self.on_preview(to_image(small))


@dataclass
class Upscaler:
    """Enlarges pictures with one bundle on one device.

    Load it once and call ``upscale`` as often as wanted, from one thread at a time.

    spread: lets other processes help with large pictures; None is never.

    Example:
        >>> upscaler = Upscaler.load()
        >>> upscaler.upscale("photo.jpg", scale=4).save("large.png")
    """

    bundle: Bundle
    nets: Nets = field(init=False, repr=False)
    expectation: Expectation = field(init=False, repr=False)
    spread: Spread | None = field(default=None, repr=False)
    # What the nets made within a block of sharing_prescaled; None outside of one.
    _net_cache: NetCache | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Begin with no other nets than the bundle's."""
        self.nets = Nets(self.bundle)
        self.expectation = Expectation(
            self.nets,
            __version__,
            lambda source, options: self._upscale(source, options, Callbacks())[0],
            lambda source, options: self.prepare(source, options)[2],
        )

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
            precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``. With ``auto`` the large prescaler
                also multiplies 8-bit integers, where the processor is fast at them.
            backend: ``torch``, or ``openvino`` for processors.
            compile: let torch compile the denoiser for the batches of the first pictures, and
                autoencoder and prescaler; takes minutes once and is kept in the cache folder.

        Raises:
            ModelError: the weights are unknown, missing or broken; see its subclasses.
            OptionError: no such device, precision or backend, or no compiler.
        """
        on = pick_device(device)
        dtype = pick_dtype(on, precision)
        wanted = BundleSettings(
            bundle=bundle,
            controlnet=controlnet,
            vae=vae,
            loras=tuple(loras),
            few_step=few_step,
            embeddings=tuple(embeddings),
        )
        loaded = load_bundle(wanted, device=on, dtype=dtype)
        int8 = precision == "auto" and on.type == "cpu" and multiplies_int8()
        loaded = dataclasses.replace(loaded, int8=int8)
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
        on_plan: OnPlan | None = None,
        cancelled: Cancelled = never_cancelled,
        **named: Any,
    ) -> UpscaleResult:
        """Enlarge one picture.

        Example:
            >>> upscaler.upscale("photo.jpg", scale=4).save("large.png")

        Args:
            source: a path, the bytes of a file, a binary file, a Pillow image, a numpy array
                or a torch tensor, as ``tegula.images.decode.decode`` takes them; or what
                ``tegula.pipeline.prepare`` made of one with the same options.
            options: what to do; the balanced preset at 2x by default.
            mask: a picture of any size, laid over the source: white is refined, black
                stays as prescaled.
            strength_map: a grey picture of any size, laid over the source: what share of
                the creativity each place gets.
            on_progress: called with how far the work is.
            on_preview: shown small pictures of the work so far; they change nothing of the
                result.
            on_plan: called with the work and its expected seconds by stage before it begins.
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
        callbacks = Callbacks(on_progress, on_preview, Cancel(cancelled), on_plan)
        result, seconds = self._upscale(source, options, callbacks, mask, strength_map)
        self.expectation.learn(result.plan, seconds)
        return result

    def _upscale(
        self,
        source: Source | Prepared,
        options: UpscaleOptions,
        callbacks: Callbacks,
        mask: Source | None = None,
        strength_map: Source | None = None,
    ) -> tuple[UpscaleResult, Mapping[str, float]]:
        """Run all stages; return the seconds of those that say something of other upscales, too."""
        # Loading and counting happen once, so they must not be timed as part of a stage.
        usual = preset_values(self.bundle.facts.presets, options.preset).prescaler
        self.nets.costs(self.nets.prescaler(options.prescaler or usual))
        clock, loaded = StageClock(callbacks.cancel), set(self.nets.prescalers)
        with clock("prepare"):
            prepared, resolved, plan = self.prepare(source, options)
            nets = self._prescalers(resolved)
            widened = with_context(options, prepared.facts.size)
            placed = Placed.on(self._home(resolved), prepared)
            control = read_spatial_control(mask, strength_map, widened, resolved, placed)
            restore_faces = self.nets.face_work(resolved)
            found, control = control_by_faces(placed, resolved, control)
        reporter = self._reporter(callbacks, plan)
        with clock("prescale"):
            show = callbacks.on_picture if callbacks.on_preview else None
            progress = reporter.stage("prescale", callbacks.cancel, show)
            part = enlarged_part(widened, prepared.facts.size)
            shards = self._shards(resolved)
            begun = prescale_source(placed, resolved, part, nets, progress, self._net_cache, shards)
            prescaled, enlarged, from_cache = begun.picture, begun.enlarged, begun.from_cache
            free = control.mask_without(begun.done if resolved.refines else None)
            layers = Layers(begun.drawn, begun.alpha, free)
            del begun
        loras, left_out = loras_of_prompts(self.bundle, options) if resolved.refines else ([], [])
        with clock("refine"), self._merged(loras) as merged:
            strength, refined = control.strength(prescaled, resolved.flat_skip), prescaled
            if resolved.refines:
                progress = reporter.stage("refine", callbacks.cancel, show)
                job = RefineJob(
                    bundle=self.bundle,
                    prescaled=prescaled,
                    source=enlarged,
                    options=resolved,
                    strength=strength,
                    weight=control.weight,
                    coding=plan.autoencoder_flops / max(1, plan.refine_flops),
                    shards=self._shards(resolved, loras),
                )
                refined = _REFINE[resolved.mode](job, progress)
                del job
            # Large pictures take gigabytes each: what finish does not need goes before it.
            is_everywhere = strength is None
            del enlarged, strength
        with clock("finish"):
            reporter.begin("finish")
            faces = restore_faces(prepared.rgb, callbacks.cancel) if restore_faces else ()
            layers = dataclasses.replace(layers, patches=faces)
            guard = LikenessGuard.of(prepared, found, resolved.likeness)
            finished = finish(refined, prescaled, placed, resolved, layers, guard)
        reporter.finished()
        notes = []
        if options.auto:
            notes = [describe(prepared.look, resolved, len(found)), prompt_taken(options, resolved)]
        has_map = mask is not None or strength_map is not None
        shown = resolved
        if options.crop is not None:
            shown = self._resolved(options.replaced(seed=resolved.seed), prepared)
        result = UpscaleResult(
            image=finished.image,
            source=to_image(prepared.rgb, prepared.alpha),
            options=resolved,
            settings={
                "version": __version__,
                "bundle": self.bundle.facts.name,
                "fingerprint": self.bundle.facts.fingerprint,
                **shown.settings(),
                "asked": options.changed(),
            },
            metadata=finished.metadata,
            timings=clock.seconds,
            plan=plan,
            warnings=(
                *self.bundle.warnings,
                *ignored_options(self.bundle, options, resolved, has_map=has_map),
                *left_out,
                *merged,
                *finished.warnings,
                *([NONE_FOUND] if restore_faces and not faces else []),
            ),
            deep=finished.deep,
            found="; ".join(filter(None, notes)),
            consistency=finished.consistency,
            faces=finished.faces,
        )
        if options.crop is not None and widened.crop is not None:
            result = result.without_context(shown, widened.crop, options.crop)
        # A stage that did less than the plan counts, or more, tells nothing of other upscales.
        is_unlike_its_plan = {
            "prepare": isinstance(source, Prepared)
            or resolved.faces
            or loaded != set(self.nets.prescalers),
            "prescale": from_cache,
            "refine": not is_everywhere or callbacks.on_preview is not None or bool(loras),
            "finish": resolved.faces,
        }
        usual_seconds = {s: t for s, t in clock.seconds.items() if not is_unlike_its_plan.get(s)}
        return result, usual_seconds

    def _shards(
        self, options: ResolvedOptions, loras: Sequence[tuple[str, float]] = ()
    ) -> Shards | None:
        """Return what spreads a picture over helpers, with LoRAs merged; None where nothing is."""
        if self.spread is None:
            return None
        return self.spread.shards(options.width * options.height, loras)

    def _prescalers(self, options: ResolvedOptions) -> tuple[Prescaler, Prescaler | None]:
        """Return the net that enlarges, and the one for what is drawn, if there is one."""
        second = options.drawing_prescaler
        return (
            self.nets.prescaler(options.prescaler, options.tuning),
            self.nets.prescaler(second) if second else None,
        )

    def _home(self, options: ResolvedOptions) -> torch.device:
        """Return where pictures lie: on the host where they would take too much of the device."""
        pixels = options.width * options.height
        return home_of(PICTURES * _PIXEL_BYTES * pixels, self.bundle.device)

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
        options = options or UpscaleOptions()
        rows = 2 * at_once * default_window_batch(self.bundle)
        denoiser = shared(self.bundle.denoiser, rows)
        loras, _ = loras_of_prompts(self.bundle, options)
        given_up = threading.Event()
        callbacks = Callbacks(cancel=Cancel(lambda: given_up.is_set() or cancelled()))
        # What a thread computes with is settled by its first question: not while another one has
        # switched to one thread for a moment.
        pool = ThreadPoolExecutor(at_once, initializer=torch.get_num_threads)
        with self._merged(loras) as merged, pool:
            # The networks have the LoRAs already; each result warns of them.
            bundle = dataclasses.replace(self.bundle, denoiser=denoiser)
            if bundle.with_loras is not None:
                bundle = dataclasses.replace(bundle, with_loras=lambda _: nullcontext(merged))
            together = Upscaler(bundle)
            together.nets = dataclasses.replace(self.nets, bundle=bundle)

            def one(source: Source) -> UpscaleResult:
                with denoiser.member():
                    # Its seconds are not remembered: they depend on what ran beside it.
                    return together._upscale(source, options, callbacks)[0]

            try:
                yield from in_order(pool, one, sources, at_once)
            finally:
                given_up.set()

    @contextmanager
    def sharing_prescaled(self) -> Iterator[None]:
        """Let upscales of the same pixels by the same net within the block run it once."""
        self._net_cache = {}
        try:
            yield
        finally:
            self._net_cache = None

    def prepare(
        self, source: Source | Prepared, options: UpscaleOptions
    ) -> tuple[Prepared, ResolvedOptions, Plan]:
        """Decode the source, resolve every option for it, and count the work.

        Raises:
            InputError, PathError: as ``upscale`` does.
        """
        prepared = source if isinstance(source, Prepared) else prepare(source, options)
        size = prepared.facts.size
        resolved = self._resolved(with_context(options, size), prepared)
        alpha = None if prepared.alpha is None else outlines(on_device(prepared.alpha, _HOST))
        plan = self.nets.plan(prepared.size, resolved, alpha=alpha is not None)
        return prepared, resolved, plan

    def forecast(self, source: Source, options: UpscaleOptions) -> tuple[Plan, Memory]:
        """Count the work and the memory of an upscale.

        Raises:
            InputError, PathError: as ``upscale`` does.
        """
        _, resolved, plan = self.prepare(source, options)
        prescaler = self.nets.prescaler(resolved.prescaler)
        return plan, expected_memory(self.bundle, self.nets.bundle_cost, prescaler, plan, resolved)

    def _resolved(self, options: UpscaleOptions, prepared: Prepared) -> ResolvedOptions:
        facts = self.bundle.facts
        size = prepared.facts.size
        written = prepared.facts.metadata.prompt
        if options.auto and options.source_prompt and not options.prompt and facts.reads_prompts:
            options = options.replaced(prompt=written)
        usual = preset_values(facts.presets, options.preset)
        on_processor = self.bundle.device.type == "cpu"
        chosen = choose(prepared.look, options, usual, size, on_processor=on_processor)
        if options.auto and can_describe():
            chosen["likeness"] = USUAL_LIKENESS
        resolved = resolve(options, facts.presets, facts.window, size, chosen)
        guidance_scale = min(resolved.guidance_scale, facts.strongest_guidance)
        tuning = resolved.tuning if is_tuned(resolved.prescaler) else None
        return resolved.replaced(
            guidance_scale=guidance_scale,
            tuning=tuning,
            mend_jpeg=prepared.mended,
            mend_chroma=prepared.chroma_mended,
        )

    def _reporter(self, callbacks: Callbacks, plan: Plan) -> Reporter:
        on_progress, seconds = callbacks.on_progress, None
        if on_progress is not None or callbacks.on_plan is not None:
            seconds = self.expectation.expected(plan)
        if callbacks.on_plan is not None:
            callbacks.on_plan(plan, seconds)
        if not seconds:
            return Reporter(on_progress, plan.shares)
        # Preparing is over when the first report is made.
        seconds = {stage: part for stage, part in seconds.items() if stage != "prepare"}
        total = sum(seconds.values()) or 1.0
        return Reporter(on_progress, {s: n / total for s, n in seconds.items()}, total)

    @contextmanager
    def _merged(self, loras: Sequence[tuple[str, float]]) -> Iterator[Sequence[str]]:
        """Run with LoRAs in the networks, and take them out again; returns warnings."""
        if not loras or self.bundle.with_loras is None:
            yield ()
            return
        with self.bundle.with_loras(loras) as warnings:
            yield warnings
