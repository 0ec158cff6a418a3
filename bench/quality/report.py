"""Writes what the bench found: JSON, a Markdown table, a page and a sheet of crops."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from bench.quality.drawings import can_read
from bench.quality.judges import JUDGES, relatives
from bench.quality.methods import BASELINE
from bench.quality.run import Crop, Outcome

# One table for each group, as one of all measures would be too wide to read. Of each measure its
# title and how its numbers are written.
JUDGED = {
    **{f"frechet_{name}": (f"Fréchet {facts.title}", "{:.4f}") for name, facts in JUDGES.items()},
    **{f"distance_{name}": (f"distance {facts.title}", "{:.4f}") for name, facts in JUDGES.items()},
    "dists": ("DISTS", "{:.4f}"),
}
MEASURED = {
    "psnr": ("PSNR", "{:.2f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "texture_low": ("texture low", "{:.2f}"),
    "texture_middle": ("texture middle", "{:.2f}"),
    "texture_upper": ("texture upper", "{:.2f}"),
    "flat": ("flat energy", "{:.2f}"),
    "grid": ("grid", "{:.1%}"),
    "colour": ("colour ΔE", "{:.2f}"),
    "consistency": ("consistency", "{:.2f}"),
    "off_mean": ("shrunk again: mean", "{:.2f}"),
    "off_worst": ("worst", "{:.0f}"),
    "naturalness": ("naturalness", "{:.2f}"),
    "brisque": ("BRISQUE", "{:.1f}"),
}
DRAWN = {
    "read": ("characters read", "{:.1%}"),
    "text_ssim": ("SSIM of text", "{:.4f}"),
    "white": ("white kept", "{:.1%}"),
    "black": ("black kept", "{:.1%}"),
    **{k: v for k, v in JUDGED.items() if not k.startswith("frechet")},
    "ssim": ("SSIM", "{:.4f}"),
    "psnr": ("PSNR", "{:.2f}"),
}
Columns = Mapping[str, tuple[str, str]]
Table = Mapping[str, Mapping[str, float]]


def mean_over(tables: Mapping[str, Table]) -> dict[str, dict[str, float]]:
    """Return each method's measures averaged over the degradations; the worst stays the worst."""
    methods = next(iter(tables.values()))
    return {
        method: {
            name: float(
                (np.max if name.endswith("_worst") else np.mean)(
                    [table[method][name] for table in tables.values()]
                )
            )
            for name in methods[method]
        }
        for method in methods
    }


def markdown(outcome: Outcome) -> str:
    """Return all tables as Markdown: what training saw, the means, then each degradation."""
    parts = [_judges(outcome)]
    for scale, tables in outcome.tables.items():
        together = {f"mean over {', '.join(tables)}": mean_over(tables), **tables}
        for name, table in together.items():
            parts += [
                render(f"{scale}x, {name}: {group}", table, columns)
                for group, columns in (("networks", JUDGED), ("measures", MEASURED))
            ]
        parts += _beside_baseline(scale, tables)
    if outcome.truth_brisque is not None:
        parts.append(f"BRISQUE of the photographs themselves: {outcome.truth_brisque:.1f}.")
    if outcome.seams:
        lines = ["| method | refine s per megapixel | seam score | spread over seeds |"]
        lines += ["|---|---|---|---|"]
        lines += [
            f"| {n} | {outcome.seconds_per_megapixel[n]:.2f} | {outcome.seams[n]:.3f} "
            f"| {outcome.spread[n]:.2f} |"
            for n in outcome.seams
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def drawings_markdown(outcome: Outcome) -> str:
    """Return the tables of drawings as Markdown."""
    parts = [
        render(f"{scale}x, drawings, {name}", table, DRAWN)
        for scale, tables in outcome.tables.items()
        for name, table in tables.items()
    ]
    if not can_read():
        parts.append("tesseract is not installed: no characters were read (tesseract-ocr).")
    return "\n\n".join(parts) + "\n"


def render(title: str, table: Table, columns: Columns) -> str:
    """Return a table under a bold title; measures that no method has are left out."""
    shown = {k: c for k, c in columns.items() if any(k in row for row in table.values())}
    head = "| method | " + " | ".join(label for label, _ in shown.values()) + " |"
    rule = "|---" * (len(shown) + 1) + "|"
    rows = [
        f"| {method} | "
        + " | ".join(form.format(row[k]) if k in row else "" for k, (_, form) in shown.items())
        + " |"
        for method, row in table.items()
    ]
    return "\n".join([f"**{title}**", "", head, rule, *rows])


def _judges(outcome: Outcome) -> str:
    """Say of each judge which relative of it the training of each method looked through."""
    names = list(JUDGES)
    lines = [
        "**What training saw of each judge's family**",
        "",
        "| method | " + " | ".join(JUDGES[n].title for n in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for method, nets in outcome.nets.items():
        cells = [", ".join(relatives(name, nets)) or "nothing" for name in names]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _beside_baseline(scale: int, tables: Mapping[str, Table]) -> list[str]:
    """Return each distance over that of x4plus alone, by degradation, if x4plus was run."""
    parts = []
    means = {"mean": mean_over(tables), **tables}
    for measure, (title, _) in JUDGED.items():
        whole = means["mean"]
        if BASELINE not in whole or measure not in whole[BASELINE]:
            continue
        table = {
            method: {
                name: found[method][measure] / found[BASELINE][measure]
                for name, found in means.items()
            }
            for method in whole
            if method != BASELINE
        }
        columns = {name: (name, "{:.2f}") for name in means}
        parts.append(render(f"{scale}x, {title}, of that of {BASELINE}", table, columns))
    return parts


def write(
    outcomes: Mapping[str, Outcome], folder: Path, about: Mapping[str, object], text: str
) -> None:
    """Write ``quality.json``, ``quality.md``, ``index.html`` and ``crops/`` into a folder."""
    (folder / "crops").mkdir(parents=True, exist_ok=True)
    found: dict[str, object] = {"about": dict(about)}
    for name, outcome in outcomes.items():
        found[name] = {
            "nets": outcome.nets,
            "tables": outcome.tables,
            "truth_brisque": outcome.truth_brisque,
            "refine_seconds_per_megapixel": outcome.seconds_per_megapixel,
            "seams": outcome.seams,
            "spread_over_seeds": outcome.spread,
        }
    (folder / "quality.json").write_text(json.dumps(found, indent=2) + "\n")
    (folder / "quality.md").write_text(text)
    crops = [crop for outcome in outcomes.values() for crop in outcome.crops]
    for number, crop in enumerate(crops):
        _strip(crop).save(folder / "crops" / f"{number:03d}.png")
    (folder / "index.html").write_text(_page(text, crops))


def _strip(crop: Crop) -> Image.Image:
    pixels = np.hstack([picture for _, picture in crop.columns])
    return Image.fromarray(np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8))


def _page(text: str, crops: Sequence[Crop]) -> str:
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
        f"<pre>{html.escape(text)}</pre>{figures}</html>\n"
    )
