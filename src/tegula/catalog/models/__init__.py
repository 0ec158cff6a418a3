"""One small module per model: its inputs, and what tegula makes of them."""

from __future__ import annotations

from tegula.catalog.models.clarity_upscaler import MODEL as CLARITY_UPSCALER
from tegula.catalog.models.codeformer import MODEL as CODEFORMER
from tegula.catalog.models.gfpgan import MODEL as GFPGAN
from tegula.catalog.models.high_resolution_controlnet_tile import (
    MODEL as HIGH_RESOLUTION_CONTROLNET_TILE,
)
from tegula.catalog.models.real_esrgan import MODEL as REAL_ESRGAN
from tegula.catalog.models.swinir import MODEL as SWINIR
from tegula.catalog.models.tegula_upscale import MODEL as TEGULA_UPSCALE
from tegula.catalog.models.ultimate_sd_upscale import MODEL as ULTIMATE_SD_UPSCALE
from tegula.catalog.models.ultimate_sd_upscale import PORTRAIT_MODEL as ULTIMATE_PORTRAIT_UPSCALE

MODELS = (
    TEGULA_UPSCALE,
    HIGH_RESOLUTION_CONTROLNET_TILE,
    ULTIMATE_SD_UPSCALE,
    ULTIMATE_PORTRAIT_UPSCALE,
    CLARITY_UPSCALER,
    REAL_ESRGAN,
    SWINIR,
    GFPGAN,
    CODEFORMER,
)

__all__ = ["MODELS"]
