"""Writes the parts of docs/ that follow from the code: `python -m docs.generate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tegula.catalog import Model, models
from tegula.catalog.inputs import BOOLEAN, SINGLE, InputField
from tegula.models.mini import CONFIG_FILE, WEIGHTS
from tegula.models.mini.bundle import read_config
from tegula.models.sd15.facts import PRESETS as SD15
from tegula.options import OPTIONS, PRESETS, PresetValues
from tegula.schema import span
from tegula.server.queue import TRANSITIONS, Trigger
from tegula.server.settings import describe_settings
from tegula.server.tables import State

FOLDER = Path(__file__).parent


def options_page() -> str:
    """Return docs/options.md."""
    rows = [_option_row(name, schema) for name, schema in OPTIONS.items()]
    return "\n".join(
        [
            "# Options",
            "",
            "Made from the code by `make docs`. Every option is a field of `UpscaleOptions`, and",
            "of the command line with hyphens: `guidance_scale` is `--guidance-scale`. What is",
            "left open is filled by the preset, whose numbers depend on the bundle. Options are",
            "immutable: `options.replaced(scale=4)` returns others, and checks them.",
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


def _option_row(name: str, schema: Mapping[str, Any]) -> str:
    effect = schema["description"]
    return f"| `{name}` | {_range(schema)} | {_default(name, schema)} | {effect} |"


def _range(schema: Mapping[str, Any]) -> str:
    if schema["type"] == "boolean":
        return "on or off"
    return ", ".join(f"`{choice}`" for choice in schema.get("enum", ())) or span(schema) or "text"


def _default(name: str, schema: Mapping[str, Any]) -> str:
    default = schema["default"]
    if name in PresetValues.model_fields:
        return "by preset"
    if isinstance(default, bool):
        return "on" if default else "off"
    if default is None:
        return "open"
    return f"`{default}`" if default not in ("", []) else "empty"


def _preset_table(presets: Mapping[str, PresetValues]) -> list[str]:
    return [
        "| option | " + " | ".join(PRESETS) + " |",
        "|---|" + "---|" * len(PRESETS),
        *(
            f"| {name} | "
            + " | ".join(str(getattr(presets[preset], name)) or "none" for preset in PRESETS)
            + " |"
            for name in PresetValues.model_fields
        ),
    ]


def models_page() -> str:
    """Return docs/models.md."""
    return "\n".join([*_MODELS_HEAD, *(line for model in models() for line in _model(model))])


_MODELS_HEAD = (
    "# Models",
    "",
    "Made from the code by `make docs`. These are the models that `tegula run OWNER/NAME` and the",
    "server answer to. Each input is **exact** (it does what the model of this name does with it),",
    "**approximated** (what is done instead stands beside it) or **refused** (with the reason).",
    "Exact is meant of what the input does: the picture itself depends on the weights in use.",
    "[Coming from another upscaler](coming-from.md) sets their settings beside ours.",
    "",
)


def _model(model: Model) -> list[str]:
    words = " ".join(filter(None, [model.description, model.remark]))
    lines = [f"## {model.reference}", "", words, ""]
    for version in model.versions:
        if len(model.versions) > 1:
            lines += [f"### Version {version.label}", ""]
        files = "one file" if version.output == SINGLE else "a list of files"
        lines += [f"Output: {files}.", "", "| input | type | range | default | tegula |"]
        lines += ["|---|---|---|---|---|", *map(_input_row, version.fields), ""]
    return lines


def _input_row(known: InputField) -> str:
    values = ", ".join(f"`{choice}`" for choice in known.choices)
    if known.low is not None and known.high is not None:
        values = span({"minimum": known.low, "maximum": known.high})
    shown = str(known.default).lower() if known.kind == BOOLEAN else known.default
    default = "required" if known.required else f"`{shown}`"
    if not known.required and known.default in (None, ""):
        default = "open" if known.default is None else "empty"
    fidelity = f"{known.fidelity}: {known.remark}" if known.remark else known.fidelity
    return f"| `{known.name}` | {known.kind} | {values} | {default} | {fidelity} |"


PAGES: Mapping[str, Callable[[], str]] = {"models.md": models_page, "options.md": options_page}


_HAPPENS: Mapping[Trigger, str] = {
    Trigger.START: "a worker begins",
    Trigger.SUCCEED: "done",
    Trigger.FAIL: "error",
    Trigger.CANCEL: "cancel",
    Trigger.EXPIRE: "deadline",
    Trigger.REQUEUE: "its worker was lost, or the server stops",
}


def state_diagram() -> str:
    """Return the states of a prediction and the ways between them, as Mermaid."""
    ways: dict[tuple[State, State], list[str]] = {}
    for (state, trigger), then in TRANSITIONS.items():
        ways.setdefault((state, then), []).append(_HAPPENS[trigger])
    lines = [
        f"    {state.value} --> {then.value}: {' or '.join(triggers)}"
        for (state, then), triggers in ways.items()
    ]
    ends = [f"    {state.value} --> [*]" for state in State if state.terminal]
    begin = "    [*] --> starting: accepted, on the disk"
    told = "    note right of aborted: reported as canceled"
    return "\n".join(["```mermaid", "stateDiagram-v2", begin, *lines, *ends, told, "```"])


def with_diagram(page: str) -> str:
    """Return a page with its state diagram as the code has it now."""
    before, fence, rest = page.partition("```mermaid\nstateDiagram-v2")
    _, _, after = rest.partition("\n```")
    return f"{before}{state_diagram()}{after}" if fence else page


_SETTINGS_HEAD = "| setting | default | |\n|---|---|---|\n"


def with_settings(page: str) -> str:
    """Return a page with its table of the server's settings as the code has it now."""
    before, head, rest = page.partition(_SETTINGS_HEAD)
    if not head:
        return page
    rows = "".join(
        f"| `{setting.name}` | {setting.default} | {setting.effect} |\n"
        for setting in describe_settings()
    )
    return f"{before}{head}{rows}\n{rest.partition(chr(10) * 2)[2]}"


def main() -> None:
    """Write every generated page."""
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page())
    server = FOLDER / "server.md"
    server.write_text(with_settings(with_diagram(server.read_text())))


if __name__ == "__main__":
    main()
