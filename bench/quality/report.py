"""Writes what the bench found: JSON, a Markdown table, a page and a sheet of crops."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from bench.quality.run import Crop, Outcome

COLUMNS = {
    "frechet": ("Fréchet", "{:.4f}"),
    "perceptual": ("perceptual", "{:.4f}"),
    "psnr": ("PSNR", "{:.2f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "texture_low": ("texture low", "{:.2f}"),
    "texture_middle": ("texture middle", "{:.2f}"),
    "texture_upper": ("texture upper", "{:.2f}"),
    "flat": ("flat energy", "{:.2f}"),
    "colour": ("colour ΔE", "{:.2f}"),
    "consistency": ("consistency", "{:.2f}"),
    "naturalness": ("naturalness", "{:.2f}"),
    "brisque": ("BRISQUE", "{:.1f}"),
}
Table = Mapping[str, Mapping[str, float]]


def mean_over(tables: Mapping[str, Table]) -> dict[str, dict[str, float]]:
    """Return each method's measures averaged over the degradations."""
    methods = next(iter(tables.values()))
    return {
        method: {
            name: float(np.mean([table[method][name] for table in tables.values()]))
            for name in methods[method]
        }
        for method in methods
    }


def markdown(outcome: Outcome) -> str:
    """Return all tables as Markdown, the means first."""
    parts = []
    for scale, tables in outcome.tables.items():
        parts.append(_table(f"{scale}x, mean over {', '.join(tables)}", mean_over(tables)))
        parts += [_table(f"{scale}x, {name}", table) for name, table in tables.items()]
    names = list(outcome.seams)
    lines = [
        "| method | refine s per megapixel | seam score | spread over seeds |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {n} | {outcome.seconds_per_megapixel[n]:.2f} | {outcome.seams[n]:.3f} "
        f"| {outcome.spread[n]:.2f} |"
        for n in names
    ]
    truth = f"BRISQUE of the photographs themselves: {outcome.truth_brisque:.1f}."
    return "\n\n".join([*parts, truth, "\n".join(lines)]) + "\n"


def _table(title: str, table: Table) -> str:
    head = "| method | " + " | ".join(label for label, _ in COLUMNS.values()) + " |"
    rule = "|---" * (len(COLUMNS) + 1) + "|"
    rows = [
        f"| {method} | "
        + " | ".join(form.format(row[k]) for k, (_, form) in COLUMNS.items())
        + " |"
        for method, row in table.items()
    ]
    return "\n".join([f"**{title}**", "", head, rule, *rows])


def write(outcome: Outcome, folder: Path, about: Mapping[str, object]) -> None:
    """Write ``quality.json``, ``quality.md``, ``index.html`` and ``crops/`` into a folder."""
    (folder / "crops").mkdir(parents=True, exist_ok=True)
    found = {
        "about": dict(about),
        "tables": outcome.tables,
        "truth_brisque": outcome.truth_brisque,
        "refine_seconds_per_megapixel": outcome.seconds_per_megapixel,
        "seams": outcome.seams,
        "spread_over_seeds": outcome.spread,
    }
    (folder / "quality.json").write_text(json.dumps(found, indent=2) + "\n")
    (folder / "quality.md").write_text(markdown(outcome))
    for number, crop in enumerate(outcome.crops):
        _strip(crop).save(folder / "crops" / f"{number:03d}.png")
    (folder / "index.html").write_text(_page(outcome, outcome.crops))


def _strip(crop: Crop) -> Image.Image:
    pixels = np.hstack([picture for _, picture in crop.columns])
    return Image.fromarray(np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8))


def _page(outcome: Outcome, crops: Sequence[Crop]) -> str:
    figures = "\n".join(
        f"<figure><figcaption>{html.escape(crop.title)}: "
        f"{html.escape(' | '.join(name for name, _ in crop.columns))}</figcaption>"
        f'<img loading="lazy" src="crops/{number:03d}.png" alt=""></figure>'
        for number, crop in enumerate(crops)
    )
    style = "body{font-family:sans-serif;margin:2em}figure{margin:1em 0}pre{overflow:auto}"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Quality bench</title>'
        f"<style>{style}</style><h1>Quality bench</h1>"
        f"<pre>{html.escape(markdown(outcome))}</pre>{figures}</html>\n"
    )
