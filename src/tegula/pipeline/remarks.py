"""The LoRAs that prompts name, and sentences on what a bundle cannot follow."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import shorten

from tegula.models.bundle import Bundle, SplitDenoiser
from tegula.models.library import FileKind, find_file
from tegula.models.prompt import PromptStyle, split_tags
from tegula.options import ResolvedOptions, UpscaleOptions
from tegula.pipeline.sampler import prompts_of
from tegula.regions import parse_region


def loras_of_prompts(
    bundle: Bundle, options: UpscaleOptions
) -> tuple[list[tuple[str, float]], list[str]]:
    """Return the LoRAs that prompts name, file and weight, and sentences on those left out.

    They are found by the names of files alone: a prompt may come from anywhere.
    """
    weighting, facts = options.prompt_weighting, bundle.facts
    prompts = [options.prompt, *(parse_region(text).prompt for text in options.regions)]
    loras, left_out = [], []
    for tag in (tag for prompt in prompts for tag in split_tags(prompt, weighting)[1]):
        reason, file = tag.fault, None
        if not reason and bundle.with_loras is None:
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


_SHOWN = 200
"""Characters of a prompt that are shown."""


def prompt_taken(options: UpscaleOptions, resolved: ResolvedOptions) -> str:
    """Say which prompt was taken from the source; empty where none was."""
    if resolved.prompt == options.prompt or not resolved.refines:
        return ""
    return f"prompt taken from the picture: {shorten(resolved.prompt, _SHOWN, placeholder='...')}"


def ignored_options(
    bundle: Bundle, options: UpscaleOptions, resolved: ResolvedOptions, *, has_map: bool = False
) -> Iterator[str]:
    """Yield sentences on options that the bundle or the prescaler cannot follow.

    ``has_map``: there is a mask or a strength map.
    """
    if options.tuning is not None and resolved.tuning is None:
        yield f"The prescaler {resolved.prescaler} is not tuned, so tuning has no effect."
    if resolved.exact and resolved.hdr:
        yield "An exact result has the tones of its source, so hdr has no effect."
    if not resolved.refines:
        if has_map and not resolved.faces:
            yield "Without diffusion nothing is masked, so mask and strength_map have no effect."
        return
    facts, scale = bundle.facts, options.guidance_scale
    if scale is not None and scale > resolved.guidance_scale:
        yield (
            f"{facts.name} takes a guidance scale of up to {facts.strongest_guidance:g}; "
            f"{scale:g} was held to it."
        )
    if resolved.feature_reuse > 1 and not isinstance(bundle.denoiser, SplitDenoiser):
        yield f"{facts.name} runs as a whole, so feature_reuse has no effect."
    if resolved.clip_skip > 1 and facts.family == "mini":
        yield f"{facts.name} has no CLIP, so clip_skip has no effect."
    positive, negative = prompts_of(resolved)
    ignored = bundle.text.ignored_words(" ".join((*positive, negative)))
    if ignored:
        yield f"{facts.name} does not know and ignores: {', '.join(ignored)}."
    used = [*positive, negative] if resolved.guidance_scale > 1 else positive
    for word in bundle.text.unused_words(used, PromptStyle.of(resolved)):
        yield (
            f"The embedding {word} is loaded and has no effect: its word stands in no prompt, "
            f"nor in a negative prompt with a guidance scale above 1."
        )
