"""juergengunz/ultimate-portrait-upscale: Ultimate SD Upscale with defaults for portraits."""

from __future__ import annotations

from tegula.catalog.inputs import Model, Version
from tegula.catalog.models.ultimate_sd_upscale import fields, plan

FIELDS = fields(
    prompt="business portrait, detailed skin, perfect skin, soft lighting, beautiful eyes, "
    "photorealistic, perfect teeth",
    negative_prompt="cartoon, cgi, render, painting, illustration, drawing",
    denoise=0.1,
    upscalers=("4x-UltraSharp",),
)
MODEL = Model(
    "juergengunz",
    "ultimate-portrait-upscale",
    "Ultimate SD Upscale with gentle defaults for portraits.",
    (Version("juergengunz/ultimate-portrait-upscale", "1", FIELDS, plan),),
    "As fewjative/ultimate-sd-upscale, with other defaults. Which checkpoint the original "
    "has is not known.",
)
