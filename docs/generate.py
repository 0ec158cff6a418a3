"""Writes the parts of docs/ that follow from the code: `python -m docs.generate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tegula.catalog import Model, models
from tegula.catalog.inputs import BOOLEAN, SINGLE, InputField
from tegula.models.mini import CONFIG_FILE, WEIGHTS
from tegula.models.mini.bundle import read_config
from tegula.models.sd15.facts import PRESETS as SD15
from tegula.options import OPTIONS, PRESETS, PresetValues
from tegula.resolve import preset_values
from tegula.schema import span
from tegula.server.api import connections, create, files, receiving
from tegula.server.api import models as api_models
from tegula.server.lifecycle import TRANSITIONS, Trigger
from tegula.server.queue import MOST_LOSSES
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
            "left open is filled by the preset, whose numbers depend on the model. Options are",
            "immutable: `options.replaced(scale=4)` returns others, and checks them.",
            "",
            "| option | range | default | effect |",
            "|---|---|---|---|",
            *rows,
            "",
            "## Presets of the packaged model, mini",
            "",
            *_preset_table(read_config(WEIGHTS / CONFIG_FILE).presets),
            "",
            "## Presets of Stable Diffusion 1.5 models",
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
        return _written(default)
    if default is None:
        return "open"
    return f"`{default}`" if default not in ("", []) else "empty"


def _preset_table(presets: Mapping[str, PresetValues]) -> list[str]:
    return [
        "| option | " + " | ".join(PRESETS) + " |",
        "|---|" + "---|" * len(PRESETS),
        *(
            f"| {name} | "
            + " | ".join(
                _written(getattr(preset_values(presets, preset), name)) for preset in PRESETS
            )
            + " |"
            for name in PresetValues.model_fields
        ),
    ]


def _written(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value) or "none"


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
    note = "    note right of aborted: reported as canceled"
    return "\n".join(["```mermaid", "stateDiagram-v2", begin, *lines, *ends, note, "```"])


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


@dataclass(frozen=True)
class Limit:
    """One limit of the server, for people to read.

    what: is limited. seen: what a client notices who goes beyond it.
    setting: that sets it. shown: the limit, where that is not just the default of a setting.
    """

    what: str
    seen: str
    setting: str = ""
    shown: str = ""


_CLOSED = "the connection is closed"
_FAILS = "the prediction fails and says so"
_LOST = f"the prediction runs again; lost {MOST_LOSSES} times, it fails"
_RETRIED = "429 with `Retry-After`, `RateLimit-Remaining` and `RateLimit-Reset`"
_CROWDED = "that which waited longest for its client is closed; 503 where all are busy"
LIMITS = (
    Limit("creates of one token in a minute", _RETRIED, "creates_per_minute"),
    Limit("other requests of one token in a minute", _RETRIED, "requests_per_minute"),
    Limit("unfinished predictions", "429 with `Retry-After`", "max_waiting"),
    Limit("unfinished work, estimated", "429 with `Retry-After`", "max_waiting_seconds"),
    Limit(
        "unfinished predictions of one account",
        "429 likewise",
        "max_account_waiting",
        shown="four fifths of `max_waiting`",
    ),
    Limit(
        "their work, estimated",
        "429 likewise",
        "max_account_waiting_seconds",
        shown="four fifths of `max_waiting_seconds`",
    ),
    Limit("a JSON body", "413", "max_body_bytes"),
    Limit("a body without its long texts", "413", shown=f"{receiving.MOST_FRAME >> 10} kB"),
    Limit("levels of a JSON body", "422", shown=str(receiving.DEEPEST)),
    Limit("an upload", "413", "max_upload_bytes"),
    Limit(
        "all uploads of one account together", "413, where set", "max_account_bytes", shown="none"
    ),
    Limit("metadata of an upload", "422", shown=f"{files.METADATA_BYTES >> 10} kB"),
    Limit(
        "large bodies in memory, over all requests",
        "503 with `Retry-After` and `x-should-retry: true`",
        "max_bodies_bytes",
    ),
    Limit("bytes of a body in a second, at least", f"408; {_CLOSED}", "least_body_rate"),
    Limit("headers and address of a request", "431", shown=f"{connections.HEAD_BYTES >> 10} kB"),
    Limit(
        "time for headers",
        f"408; {_CLOSED}, during a TLS handshake without an answer",
        "header_seconds",
    ),
    Limit("requests sent ahead of their answers", _CLOSED, shown=str(connections.MOST_PIPELINED)),
    Limit("idling between two requests", _CLOSED, shown=f"{connections.KEEP_S} s"),
    Limit("taking nothing of an answer", _CLOSED, shown=f"{connections.WRITE_S:g} s"),
    Limit("connections", _CROWDED, "max_connections"),
    Limit("connections of an address", _CROWDED, "max_connections_per_address"),
    Limit(
        "`Prefer: wait`",
        "202 with the prediction as it is, a little earlier",
        shown=f"{create.MAX_WAIT_S} s",
    ),
    Limit("`Idempotency-Key`", "422", shown=f"{create.LONGEST_KEY} characters"),
    Limit("words to search for", "422", shown=f"{api_models.LONGEST_QUERY} characters"),
    Limit(
        "ranges of a file in one request", "200 with the whole file", shown=str(files.MOST_RANGES)
    ),
    Limit("an input that is fetched", _FAILS, "max_fetch_bytes"),
    Limit("fetching an input", _FAILS, "fetch_seconds"),
    Limit(
        "fetches of one account at once",
        "the prediction waits as `starting`",
        "fetches_per_account",
    ),
    Limit(
        "fetches from one host at once", "the prediction waits as `starting`", "fetches_per_host"
    ),
    Limit("actors kept", "the next prediction waits for one to start", "ray_min_actors"),
    Limit(
        "actors at once",
        "the prediction waits as `starting`",
        "ray_max_actors",
        shown="as the cluster has room",
    ),
    Limit("pixels of a picture", _FAILS, "max_pixels"),
    Limit("an output", _FAILS, "max_output_bytes"),
    Limit("an output as a data URI", "a link in its place", "inline_output_bytes"),
    Limit("running a prediction", _FAILS, "run_seconds"),
    Limit("silence of a process that loads", _LOST, "load_seconds"),
    Limit("silence of a process that runs", _LOST, "hang_seconds"),
    Limit("silence of a worker", _LOST, "lease_seconds"),
    Limit("ending what was cancelled", "nothing: it is `canceled` at once", "cancel_seconds"),
    Limit(
        "models that nobody uses", "the next prediction waits for loading", "idle_unload_seconds"
    ),
    Limit(
        "keeping a finished prediction", "`data_removed`, and links are 404", "retention_seconds"
    ),
    Limit("listing a finished prediction", "404", "history_seconds", shown="none"),
    Limit("keeping an upload", "404", "upload_seconds"),
    Limit("copies of files in a bucket", "a download waits for the bucket", "blobs_copies_bytes"),
    Limit(
        "validity of a link of the bucket", "403 of the bucket", "blobs_link_seconds", shown="none"
    ),
    Limit("one try of a webhook", "it is sent again later", "webhook_seconds"),
    Limit("webhooks to one host at once", "others come later", "webhooks_per_receiver"),
    Limit("free bytes on the disk, at least", "503 of `/readyz`", "min_free_bytes"),
)
_LIMITS_HEAD = "| limit | default | setting | what a client sees beyond it |\n|---|---|---|---|\n"
_UNITS = {"_seconds": " s", "_rate": " bytes/s"}


def with_limits(page: str) -> str:
    """Return a page with its table of the server's limits as the code has it now."""
    before, head, rest = page.partition(_LIMITS_HEAD)
    if not head:
        return page
    defaults = {setting.name: setting.default for setting in describe_settings()}
    rows = ""
    for limit in LIMITS:
        unit = next((unit for end, unit in _UNITS.items() if limit.setting.endswith(end)), "")
        default = limit.shown or defaults[limit.setting] + unit
        setting = f"`{limit.setting}`" if limit.setting else ""
        rows += f"| {limit.what} | {default} | {setting} | {limit.seen} |\n"
    return f"{before}{head}{rows}\n{rest.partition(chr(10) * 2)[2]}"


def main() -> None:
    """Write every generated page."""
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page())
    server = FOLDER / "server.md"
    server.write_text(with_limits(with_settings(with_diagram(server.read_text()))))


if __name__ == "__main__":
    main()
