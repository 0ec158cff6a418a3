"""tegula from above: prepare -> prescale -> refine -> finish."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from tegula import __version__, rates
from tegula.errors import OptionError
from tegula.images.adjust import fuse_exposures, hold_drawings, lock_colour
from tegula.images.open import Source
from tegula.images.pixels import Float, Size, enlarge_lanczos, outlines, to_image
from tegula.models import DEFAULT_BUNDLE, BundleSettings
from tegula.models.bundle import Bundle
from tegula.models.compiled import default_window_batch, optimise_bundle
from tegula.models.costs import BundleCost, Cost, bundle_cost, prescaler_flops
from tegula.models.device import pick_device, pick_dtype
from tegula.models.faces.likeness import can_describe, load_describer
from tegula.models.faces.networks import FaceRestorer, load_detector, load_restorer
from tegula.models.load import load_bundle
from tegula.models.prescalers import LANCZOS, Prescaler, is_tuned
from tegula.models.prescalers.load import load_prescaler, with_share
from tegula.options import (
    Preset,
    ResolvedOptions,
    UpscaleOptions,
    enlarged_part,
    preset_values,
    resolve,
    with_context,
)
from tegula.pipeline.choices import choose, describe
from tegula.pipeline.faces import NONE_FOUND, FaceWork
from tegula.pipeline.finish import finish
from tegula.pipeline.likeness import (
    USUAL_LIKENESS,
    FoundFace,
    LikenessGuard,
    enlarge_gently,
    find_faces,
    strength_in_faces,
)
from tegula.pipeline.prepare import Prepared, SpatialControl, prepare, read_spatial_control
from tegula.pipeline.prescale import (
    padding,
    prescale,
    prescale_alpha,
    prescale_mixed,
    run_network,
)
from tegula.pipeline.redraw import refine_redraw
from tegula.pipeline.refine import RefineJob, refine_canvas
from tegula.pipeline.remarks import ignored_options, loras_of_prompts, prompt_taken
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
    ignore_units,
    never_cancelled,
)
from tegula.result import UpscaleResult

_FACE_PRESCALER = "realesrgan-x4plus"
_LONG_WORK = {"cpu": 3e11}
"""FLOPs from which on an upscale is worth a measure of the machine; half a second's, about."""
_LONG_ON_GPU = 3e13
_MEASURED_WORK = {"cpu": 2e10}
"""FLOPs of a short measure of one net, about: a fraction of a second's."""
_MEASURED_ON_GPU = 2e12
_SMALLEST_TILE = 32
_LARGEST_TILE = 512
_USUAL_SIDE = 1024
"""Of the usual picture, by whose seconds a server estimates a model that it has not run yet."""
Crop = tuple[int, int, int, int]
_REFINE = {"canvas": refine_canvas, "redraw": refine_redraw}


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

    Example:
        >>> upscaler = Upscaler.load()
        >>> upscaler.upscale("photo.jpg", scale=4).save("large.png")
    """

    bundle: Bundle
    _prescalers: dict[str, Prescaler] = field(default_factory=dict, repr=False)
    _shares: dict[str, Prescaler] = field(default_factory=dict, repr=False)
    _restorers: dict[str, FaceRestorer] = field(default_factory=dict, repr=False)
    _prescaler_costs: dict[str, Mapping[int | None, Cost]] = field(default_factory=dict, repr=False)
    _measured: dict[str, float] = field(default_factory=dict, repr=False)
    _shared: dict[tuple[Any, ...], Float] | None = field(default=None, repr=False)

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
            compile: let torch compile the denoiser for the batches of the first pictures;
                takes minutes once and is kept in the cache folder.

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
        result, typical = self._upscale(source, options, callbacks, mask, strength_map)
        self._learn(result.plan, typical)
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
        self._costs(self._prescaler(options.prescaler or usual))
        clock, loaded = StageClock(callbacks.cancel), set(self._prescalers)
        with clock("prepare"):
            prepared, resolved, plan = self.prepare(source, options)
            prescaler = self._prescaler(resolved.prescaler, resolved.tuning)
            wider = with_context(options, prepared.facts.size)
            control = read_spatial_control(mask, strength_map, wider, resolved, prepared)
            restore_faces = self._face_work(resolved)
            found, control = _look_for_faces(prepared, resolved, control)
        reporter = self._reporter(callbacks, plan)
        with clock("prescale"):
            show = callbacks.on_picture if callbacks.on_preview else None
            whole = progress = reporter.stage("prescale", callbacks.cancel, show)
            alpha, ahead = prepared.alpha, 1.0
            if alpha is not None and outlines(alpha) is not None:
                # Alpha goes through the net as one picture more.
                ahead = 1 - 1 / (3 if resolved.drawing_prescaler else 2)
                progress = whole.part(0.0, ahead)
            drawn = None
            if resolved.drawing_prescaler or resolved.hold_drawings:
                part = enlarged_part(wider, prepared.facts.size)
                drawn = prepared.look.drawn_at(plan.size, part)
            key = self._shared_key(prepared, resolved)
            kept = None if self._shared is None else self._shared.get(key)
            if kept is not None:
                prescaled = kept.copy()  # what follows writes into it
                progress.on_unit(1, 1)
            elif resolved.drawing_prescaler and drawn is not None:
                nets = prescaler, self._prescaler(resolved.drawing_prescaler)
                share = drawn * np.float32(resolved.drawing_share)
                prescaled = prescale_mixed(prepared.rgb, plan.size, nets, share, progress)
            else:
                prescaled = prescale(prepared.rgb, plan.size, prescaler, progress=progress)
            if self._shared is not None and kept is None:
                self._shared[key] = prescaled.copy()
            if alpha is not None:
                behind = dataclasses.replace(whole.part(ahead, 1.0), on_unit=ignore_units)
                behind = dataclasses.replace(behind, on_picture=None)
                alpha = prescale_alpha(alpha, plan.size, prescaler, behind)
            prescaled = self._gently(prescaled, prepared, resolved, found, callbacks.cancel)
            enlarged = enlarge_lanczos(prepared.rgb, plan.size)
            prescaled = lock_colour(prescaled, enlarged, resolved, out=prescaled)
            if resolved.hold_drawings and drawn is not None:
                crisp = prepared.look.crisp
                prescaled = hold_drawings(prescaled, prepared.rgb, drawn, crisp)
            prescaled = fuse_exposures(prescaled, resolved.hdr)
        loras, left_out = loras_of_prompts(self.bundle, options) if resolved.refines else ([], [])
        with clock("refine"), self._merged(loras) as merged:
            strength, refined = control.strength(prescaled, resolved.flat_skip), prescaled
            if resolved.refines:
                progress = reporter.stage("refine", callbacks.cancel, show)
                coding = plan.autoencoder_flops / max(1, plan.refine_flops)
                job = RefineJob(self.bundle, prescaled, enlarged, resolved, strength, coding)
                refined = _REFINE[resolved.mode](job, progress)
                del job
            # Large pictures take gigabytes each: what finish does not need goes before it.
            is_everywhere = strength is None
            del enlarged, strength
        with clock("finish"):
            reporter.begin("finish")
            faces = restore_faces(prepared.rgb, callbacks.cancel) if restore_faces else ()
            held = drawn if resolved.hold_drawings else None
            guard = _guard_of(prepared, found, resolved.likeness)
            finished = finish(
                refined, prescaled, prepared, resolved, control.mask, faces, held, alpha, guard
            )
        reporter.finished()
        result = UpscaleResult(
            image=finished.image,
            source=to_image(prepared.rgb, prepared.alpha),
            options=resolved,
            settings={},
            metadata=finished.metadata,
            timings=clock.seconds,
            plan=plan,
            warnings=(
                *self.bundle.warnings,
                *ignored_options(self.bundle, options, resolved),
                *left_out,
                *merged,
                *finished.warnings,
                *([NONE_FOUND] if restore_faces and not faces else []),
            ),
            deep=finished.deep,
            found=_joined(
                describe(prepared.look, resolved, len(found)), prompt_taken(options, resolved)
            )
            if options.auto
            else "",
            consistency=finished.consistency,
            faces=finished.faces,
        )
        if options.crop is not None and wider.crop is not None:
            alone = options.replaced(seed=resolved.seed)
            middle = self._resolved(alone, prepared)
            result = _without_context(result, middle, wider.crop, options.crop)
        settings = {
            "version": __version__,
            "bundle": self.bundle.facts.name,
            "fingerprint": self.bundle.facts.fingerprint,
            **result.options.settings(),
            "asked": options.changed(),
        }
        # What says nothing of other upscales: reading ahead, less work than planned, or more.
        untypical = {
            "prepare": isinstance(source, Prepared)
            or resolved.faces
            or loaded != set(self._prescalers),
            "prescale": kept is not None,
            "refine": not is_everywhere or callbacks.on_preview is not None or bool(loras),
            "finish": resolved.faces,
        }
        typical = {s: seconds for s, seconds in clock.seconds.items() if not untypical.get(s)}
        return dataclasses.replace(result, settings=settings), typical

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
        with self._merged(loras) as merged, ThreadPoolExecutor(at_once) as pool:
            # The networks have the LoRAs already; each result warns of them.
            bundle = dataclasses.replace(self.bundle, denoiser=denoiser)
            if bundle.with_loras is not None:
                bundle = dataclasses.replace(bundle, with_loras=lambda _: nullcontext(merged))
            together = dataclasses.replace(self, bundle=bundle)

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
        self._shared = {}
        try:
            yield
        finally:
            self._shared = None

    def _shared_key(self, prepared: Prepared, resolved: ResolvedOptions) -> tuple[Any, ...]:
        """Return what decides on the result of the nets; empty where nothing is shared."""
        if self._shared is None:
            return ()
        names = "width", "height", "prescaler", "tuning", "drawing_prescaler", "drawing_share"
        return hash(prepared.rgb.tobytes()), *(getattr(resolved, name) for name in names)

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
        plan = self._plan(self._prescaler(resolved.prescaler), prepared.size, resolved)
        if resolved.drawing_prescaler:
            other = self._plan(self._prescaler(resolved.drawing_prescaler), prepared.size, resolved)
            plan = dataclasses.replace(
                plan,
                tiles=plan.tiles + other.tiles,
                prescale_flops=plan.prescale_flops + other.prescale_flops,
            )
        if prepared.alpha is not None and outlines(prepared.alpha) is not None:
            alone = self._plan(self._prescaler(resolved.prescaler), prepared.size, resolved)
            flops = plan.prescale_flops + alone.prescale_flops
            plan = dataclasses.replace(plan, prescale_flops=flops)
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
        return rates.find(rates.setting_of(self.bundle, __version__)).seconds(plan)

    def expect(self, plan: Plan) -> Mapping[str, float]:
        """Return how long a plan takes by stage, from a short measure where no run tells.

        The measure takes less than a second for each net that was not measured yet, and is
        kept in the cache folder.

        Raises:
            NumericalError, OutOfMemoryError: as ``upscale`` does.
        """
        setting = rates.setting_of(self.bundle, __version__)
        known = rates.find(setting)
        seconds = known.seconds(plan)
        if seconds is None:
            known = dataclasses.replace(known, measured={**known.measured, **self._measured})
            missing = {name for name, _ in rates.work_of(plan).values()} - set(known.measured)
            self._measured |= self._measure(plan, missing)
            rates.remember_measure(setting, self._measured)
            measured = {**known.measured, **self._measured}
            seconds = rates.Rates(known.runs, None, measured).seconds(plan)
        return seconds or {}

    def expected_when(self, plan: Plan, options: UpscaleOptions, preset: Preset) -> float:
        """Return the seconds of the same enlargement with another preset.

        Args:
            plan: of the enlargement.
            options: that it was planned with.
            preset: in place of that of the options.

        Raises:
            ModelError: the prescaler of the preset is missing.
            NumericalError, OutOfMemoryError: as ``upscale`` does.
        """
        options = options.replaced(
            **dict.fromkeys(("scale", "resolution", "crop")), regions=(), size=plan.size
        )
        facts = self.bundle.facts
        resolved = resolve(
            options.replaced(preset=preset), facts.presets, facts.window, plan.source
        )
        other = self._plan(self._prescaler(resolved.prescaler), plan.source, resolved)
        return sum(self.expect(other).values())

    def _measure(self, plan: Plan, missing: Set[str]) -> Mapping[str, float]:
        """Measure the seconds for a unit of work of those names that are missing."""
        net = next((name for name in missing if plan.tiles and name.startswith("prescale ")), None)
        enough = _MEASURED_WORK.get(self.bundle.device.type, _MEASURED_ON_GPU)
        found: dict[str, float] = {}
        if net is not None:
            prescaler = self._prescaler(plan.prescaler)
            cost = self._costs(prescaler).prescaler[prescaler.facts.factor]

            def work_of_net(side: int) -> float:
                return cost.of((side + 2 * padding(side, prescaler.facts)) ** 2)

            def run_net(side: int) -> Mapping[str, rates.Timed]:
                noise = np.random.default_rng(0).random((side, side, 3), np.float32)
                start = time.perf_counter()
                run_network(noise, prescaler)
                return {net: (work_of_net(side), time.perf_counter() - start)}

            found |= _measured(run_net, work_of_net, _SMALLEST_TILE, _LARGEST_TILE, enough)
        if missing - {net}:
            options = UpscaleOptions(
                scale=1, prescaler=LANCZOS, steps=2, creativity=1.0, seed=0, auto=False
            )

            def noise_of(side: int) -> Image.Image:
                return Image.effect_noise((side, side), 64).convert("RGB")

            def run_all(side: int) -> Mapping[str, rates.Timed]:
                result, _ = self._upscale(noise_of(side), options, Callbacks())
                works = rates.work_of(result.plan)
                return {name: (work, result.timings[s]) for s, (name, work) in works.items()}

            def work_of_all(side: int) -> float:
                return self.prepare(noise_of(side), options)[2].flops

            facts = self.bundle.facts
            sides = facts.minimum_window, facts.window
            found |= _measured(run_all, work_of_all, *sides, enough)
        return found

    def _learn(self, plan: Plan, seconds: Mapping[str, float]) -> None:
        """Remember how long the stages took; of a usual picture, too, if it is known."""
        size = _USUAL_SIDE, _USUAL_SIDE
        facts = self.bundle.facts
        options = resolve(UpscaleOptions(seed=0), facts.presets, facts.window, size)
        prescaler = self._prescalers.get(options.prescaler)
        usual = None if prescaler is None else self._plan(prescaler, size, options)
        rates.remember(rates.setting_of(self.bundle, __version__), plan, seconds, usual)

    def _resolved(self, options: UpscaleOptions, prepared: Prepared) -> ResolvedOptions:
        facts = self.bundle.facts
        size = prepared.facts.size
        written = prepared.facts.metadata.prompt
        if options.auto and options.source_prompt and not options.prompt and facts.reads_prompts:
            options = options.replaced(prompt=written)
        usual = preset_values(facts.presets, options.preset)
        chosen = choose(prepared.look, options, usual, size)
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

    def _reporter(self, callbacks: Callbacks, plan: Plan) -> Reporter:
        on_progress, seconds = callbacks.on_progress, None
        if on_progress is not None or callbacks.on_plan is not None:
            long = _LONG_WORK.get(self.bundle.device.type, _LONG_ON_GPU)
            seconds = self.expect(plan) if plan.flops > long else self.expected_seconds(plan)
        if callbacks.on_plan is not None:
            callbacks.on_plan(plan, seconds)
        if not seconds:
            return Reporter(on_progress, plan.shares)
        # Preparing is over when the first report is made.
        seconds = {stage: part for stage, part in seconds.items() if stage != "prepare"}
        total = sum(seconds.values()) or 1.0
        return Reporter(on_progress, {s: n / total for s, n in seconds.items()}, total)

    def _prescaler(self, name: str, tuning: float | None = None) -> Prescaler:
        if name not in self._prescalers:
            self._prescalers[name] = load_prescaler(name, self.bundle.device, self.bundle.dtype)
        if tuning is None:
            return self._prescalers[name]
        # The last share is kept: most pictures of a folder are alike.
        last = with_share(self._shares.get(name, self._prescalers[name]), tuning)
        self._shares[name] = last
        return last

    def _gently(
        self,
        prescaled: Float,
        prepared: Prepared,
        options: ResolvedOptions,
        faces: Sequence[FoundFace],
        cancel: Cancel,
    ) -> Float:
        """Enlarge the smallest faces again with the least of the prescaler's tuning."""
        if not options.tuning:
            return prescaled

        def enlarge(part: Float, size: Size) -> Float:
            net = self._prescaler(options.prescaler, 0.0)
            return prescale(part, size, net, progress=StageProgress(cancel=cancel))

        return enlarge_gently(prescaled, prepared.rgb, faces, enlarge)

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

    @contextmanager
    def _merged(self, loras: Sequence[tuple[str, float]]) -> Iterator[Sequence[str]]:
        """Run with LoRAs in the networks, and take them out again; returns warnings."""
        if not loras or self.bundle.with_loras is None:
            yield ()
            return
        with self.bundle.with_loras(loras) as warnings:
            yield warnings


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _measured(
    run: Callable[[int], Mapping[str, rates.Timed]],
    work_of: Callable[[int], float],
    side: int,
    largest: int,
    enough: float,
) -> Mapping[str, float]:
    """Return the seconds for a unit of work, by name, from one square or two.

    The larger has about ``enough`` work; what the smaller takes of it, which for a quick net
    is all that is not work, is left out.
    """
    smaller = larger = run(side)
    if work_of(side) < enough:
        while work_of(side) < enough and 2 * side <= largest:
            side *= 2
        larger = run(side)
    found = {}
    for name, (work, seconds) in larger.items():
        first, took = smaller[name]
        grew = work > first and seconds > took
        found[name] = (seconds - took) / (work - first) if grew else seconds / work
    return found


def _look_for_faces(
    prepared: Prepared, options: ResolvedOptions, control: SpatialControl
) -> tuple[Sequence[FoundFace], SpatialControl]:
    """Return the faces that are to stay as they are, and where the picture may change with them."""
    if options.likeness == 0 or not (options.refines or options.faces):
        return (), control
    faces = find_faces(prepared.rgb)
    size = options.width, options.height
    share = strength_in_faces(faces, prepared.size, size, options.likeness)
    if share is not None and control.strength_map is not None:
        share *= control.strength_map
    return faces, control if share is None else dataclasses.replace(control, strength_map=share)


def _guard_of(
    prepared: Prepared, faces: Sequence[FoundFace], likeness: float
) -> LikenessGuard | None:
    """Return what holds finished faces to those of the source; None where nothing can."""
    if not faces or not can_describe():
        return None
    return LikenessGuard(load_describer(), prepared.rgb, faces, likeness)


def _without_context(
    result: UpscaleResult, middle: ResolvedOptions, wider: Crop, crop: Crop
) -> UpscaleResult:
    """Cut away what was enlarged with a part for the sake of its edges.

    Args:
        result: of the part with its context.
        middle: the options of the part alone.
        wider: left, top, width and height of the part with its context, in the source.
        crop: the same of the part alone.
    """
    box = _part(result.options.offset, middle.offset, (middle.width, middle.height))
    return dataclasses.replace(
        result,
        image=result.image.crop(box),
        deep=None if result.deep is None else result.deep.crop(box),
        source=result.source.crop(_part(wider[:2], crop[:2], crop[2:])),
        options=middle,
        faces=tuple(
            dataclasses.replace(face, left=face.left + wider[0], top=face.top + wider[1])
            for face in result.faces
        ),
    )


def _part(at: Size, wanted: Size, size: Size) -> tuple[int, int, int, int]:
    """Return the left, top, right and bottom of a part within what lies at ``at``."""
    left, top = wanted[0] - at[0], wanted[1] - at[1]
    return left, top, left + size[0], top + size[1]
