"""Writes the pages of docs/ that are made from the code: `python -m docs.generate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from tegula.models.mini.bundle import CONFIG_FILE, WEIGHTS, read_config
from tegula.models.sd15.facts import PRESETS as SD15
from tegula.options import KNOBS, PRESETS, Knob, PresetValues, UpscaleOptions, plain

FOLDER = Path(__file__).parent


def options_page() -> str:
    """Return docs/options.md."""
    defaults = {field.name: field.default for field in dataclasses.fields(UpscaleOptions)}
    rows = [_row(name, knob, defaults[name]) for name, knob in KNOBS.items()]
    return "\n".join(
        [
            "# Options",
            "",
            "Made from the code by `make docs`. Every option is a field of `UpscaleOptions`, and",
            "of the command line with hyphens: `guidance_scale` is `--guidance-scale`. What is",
            "left open is filled by the preset, whose numbers depend on the bundle.",
            "",
            "| option | range | default | effect |",
            "|---|---|---|---|",
            *rows,
            "",
            "## Presets of the packaged bundle, mini",
            "",
            *_preset_table(read_config(WEIGHTS / CONFIG_FILE).presets),
            "",
            "## Presets of Stable Diffusion 1.5 bundles",
            "",
            *_preset_table(SD15),
            "",
        ]
    )


PAGES: Mapping[str, Callable[[], str]] = {"options.md": options_page}


def _row(name: str, knob: Knob, default: object) -> str:
    return f"| `{name}` | {_range(knob, default)} | {_default(knob, default)} | {knob.effect} |"


def _range(knob: Knob, default: object) -> str:
    if isinstance(default, bool):
        return "on or off"
    if knob.choices:
        return ", ".join(f"`{choice}`" for choice in knob.choices)
    if knob.low is None:
        return "text"
    unit = f" {knob.unit}" if knob.unit else ""
    if knob.high is None:
        return f"from {plain(knob.low)}{unit}"
    return f"{plain(knob.low)} to {plain(knob.high)}{unit}"


def _default(knob: Knob, default: object) -> str:
    if knob.preset:
        return "by preset"
    if isinstance(default, bool):
        return "on" if default else "off"
    if default is None:
        return "open"
    return f"`{default}`" if default != "" else "empty"


def _preset_table(presets: Mapping[str, PresetValues]) -> list[str]:
    fields = [field.name for field in dataclasses.fields(PresetValues)]
    return [
        "| knob | " + " | ".join(PRESETS) + " |",
        "|---|" + "---|" * len(PRESETS),
        *(
            f"| {name} | "
            + " | ".join(str(getattr(presets[preset], name)) or "none" for preset in PRESETS)
            + " |"
            for name in fields
        ),
    ]


def main() -> None:
    """Write every generated page."""
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page())


if __name__ == "__main__":
    main()
