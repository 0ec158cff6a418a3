"""The model card beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tegula.models.mini.bundle import VOCABULARY
from tegula.models.mini.network import MiniNetwork
from train.config import RunSettings

_TEMPLATE = Path(__file__).with_name("card.md")


_NAMES = ("minutes", "device", "configuration", "samples", "pairs", "checkpoint")


def card(digest: str, settings: RunSettings, training: Mapping[str, Any]) -> str:
    """Return the card as Markdown."""
    with torch.device("meta"):
        network = MiniNetwork(settings.shape)
    return _TEMPLATE.read_text(encoding="utf-8").format(
        parameters=sum(p.numel() for p in network.parameters()) / 1e6,
        digest=digest,
        crop=settings.adversarial.batch.crop,
        side=settings.pairs.side,
        widths=", ".join(map(str, settings.shape.widths)),
        words=", ".join(VOCABULARY),
        history=training.get("history", ""),
        **{name: training[name] for name in _NAMES},
    )
