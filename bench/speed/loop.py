"""What most programs do: diffusers' own pipeline, on one tile after the other or at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionControlNetImg2ImgPipeline

from bench.speed.job import NEGATIVE, PROMPT, SEED, Job, Picture
from tegula.models.sd15.facts import SCHEDULER
from tegula.models.sd15.networks import Networks
from tegula.pipeline.windows import WindowGrid, grid_windows

FACTOR = 8


def pipeline_of(networks: Networks, kind: Any = DDIMScheduler, **settings: Any) -> Any:
    """Return diffusers' img2img pipeline with a ControlNet, silent.

    Args:
        networks: what it runs.
        kind: one of diffusers' schedulers.
        **settings: of the scheduler, beside those of the model.
    """
    pipeline = StableDiffusionControlNetImg2ImgPipeline(
        vae=networks.autoencoder,
        text_encoder=networks.text_model,
        tokenizer=networks.tokenizer,
        unet=networks.unet,
        controlnet=networks.controlnet,
        scheduler=kind.from_config(dict(SCHEDULER), **settings),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tile_grid(side: int, tile: int, overlap: float) -> WindowGrid:
    """Return tiles of ``tile`` pixels over a square picture, on multiples of 8 pixels."""
    return grid_windows(side // FACTOR, side // FACTOR, tile // FACTOR, tile // FACTOR, overlap)


def by_tiles(pipeline: Any, job: Job, tile: int, overlap: float) -> Picture:
    """Run the whole pipeline on every tile, then blend the pixels where tiles overlap."""
    picture = job.picture
    grid = tile_grid(job.side, tile, overlap)
    pixels = grid_windows(job.side, job.side, tile, tile, overlap)
    result = np.zeros_like(picture)
    for index, window in enumerate(grid.windows):
        place = window.scaled(FACTOR).index[1:]
        result[place] += at_once(pipeline, job, picture[place]) * pixels.weights(index)[..., None]
    return result


def at_once(pipeline: Any, job: Job, picture: Picture) -> Picture:
    """Run the pipeline on a picture as one."""
    image = torch.tensor(picture.transpose(2, 0, 1)[None])
    painted: Picture = pipeline(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        image=image,
        control_image=image,
        strength=job.creativity,
        num_inference_steps=job.steps,
        guidance_scale=job.guidance_scale,
        generator=torch.Generator().manual_seed(SEED),
        output_type="np",
    ).images[0]
    return painted
