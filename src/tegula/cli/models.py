"""Which models a command runs and where, and `tegula models`, which lists and fetches them."""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tegula.cli.console import Console, Interruption, format_bytes
from tegula.cli.options import JSON, QUIET, Option, flag, names_of_files, settings_part
from tegula.cli.progress import show_waiting
from tegula.errors import InputError, OptionError
from tegula.models import BACKENDS, DEFAULT_BUNDLE, PRECISIONS, BundleSettings, parse_lora

if TYPE_CHECKING:
    from tegula.upscaler import Upscaler


PARTS = tuple(name for name in BundleSettings.model_fields if name != "precision")
"""The options that name models; a result records these, and the precision is the machine's."""


@dataclass(frozen=True)
class Runtime:
    """Where and how the models run, as ``Upscaler.load`` takes it."""

    device: str = "auto"
    precision: str = "auto"
    backend: str = "torch"
    compile: bool = False


def models_given(parameters: Mapping[str, Any]) -> BundleSettings:
    """Return the models that the options of the command line name, of which some are empty."""
    given = {name: parameters[name] for name in PARTS if parameters[name] not in (None, ())}
    return BundleSettings(**given)


def models_like(settings: Mapping[str, Any], given: BundleSettings) -> BundleSettings:
    """Return the models of a result; another bundle leaves the parts of its own behind.

    Raises:
        InputError: the settings are damaged.
    """
    if "bundle" in given.model_fields_set:
        return given
    found = settings_part(settings, "models")
    known = {name: found[name] for name in PARTS if name in found}
    try:
        known["loras"] = tuple(map(tuple, known.get("loras", ())))
        before = BundleSettings(**known)
    except (OptionError, TypeError) as error:
        raise InputError("The settings of the result are damaged: models.") from error
    return before.replaced(**given.given())


def load_upscaler(
    console: Console, models: BundleSettings, runtime: Runtime, *, fast: bool = False
) -> Upscaler:
    """Load the models; ``fast`` takes a LoRA for few steps that is there, unless one is given.

    Raises:
        ModelError, OptionError: as ``Upscaler.load``.
    """
    few_step = models.few_step or ("auto" if fast else None)
    wanted = models.replaced(few_step=few_step, precision=runtime.precision)
    name = "the model" if wanted.bundle == DEFAULT_BUNDLE else wanted.bundle
    with show_waiting(console, f"loading {name}"):
        from tegula.models.headers import check_files

        check_files(wanted)
        # Importing torch makes hundreds of thousands of objects, none of them garbage; looking
        # through them again and again takes a tenth of the time.
        gc.disable()
        try:
            from tegula.upscaler import Upscaler
        finally:
            gc.enable()
        return Upscaler.load(
            **dict(wanted),
            device=runtime.device,
            backend=runtime.backend,
            compile=runtime.compile,
        )


MODEL = Option(
    ["--model", "--bundle", "bundle"],
    "A name from `tegula models`, a hub id, a folder or a checkpoint.",
    "default: the packaged one",
    metavar="NAME|PATH",
    shell_complete=names_of_files("checkpoint"),
)


def _search_library(_: click.Context, __: click.Parameter, folders: tuple[Path, ...]) -> None:
    from tegula.models.library import search_also

    for folder in folders:
        if not folder.is_dir():
            raise click.BadParameter(f"there is no folder {folder}.")
    search_also(folders)


LIBRARY = Option(
    ["--library"],
    "A folder of the web UI, of ComfyUI or of models, whose files have names here.",
    "may be repeated; usual places are found without it",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    multiple=True,
    callback=_search_library,
    expose_value=False,
    is_eager=True,
)
DEVICE = Option(["--device"], "auto, cpu, cuda, cuda:N or mps.", default="auto")

PRECISION = Option(
    ["--precision"],
    "What to compute in; `tegula doctor` shows what auto is here.",
    type=click.Choice(PRECISIONS),
    default="auto",
)
COMPILE = flag(
    ["--compile"],
    "Compile the model first: minutes once, then kept; pays off for many pictures.",
)


def _lora(text: str) -> tuple[str, float]:
    try:
        return parse_lora(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


MODEL_OPTIONS: Sequence[click.Option] = (
    MODEL,
    Option(
        ["--controlnet"],
        "Another tile ControlNet, or none.",
        metavar="NAME|PATH",
        shell_complete=names_of_files("ControlNet"),
    ),
    Option(
        ["--vae"],
        "Another autoencoder.",
        metavar="NAME|PATH",
        shell_complete=names_of_files("autoencoder"),
    ),
    Option(
        ["--lora", "loras"],
        "A LoRA and its weight, 1 if left out.",
        "may be repeated",
        type=_lora,
        metavar="NAME|FILE[:WEIGHT]",
        multiple=True,
        shell_complete=names_of_files("LoRA"),
    ),
    Option(
        ["--few-step"],
        "A LoRA for few steps, with the steps, scheduler and guidance that it needs: "
        "hyper-4, tcd, lcm, a file, auto or none.",
        "default: auto with --preset fast",
        metavar="NAME|FILE",
    ),
    Option(
        ["--embedding", "embeddings"],
        "A textual inversion.",
        "may be repeated",
        metavar="NAME|FILE",
        multiple=True,
        shell_complete=names_of_files("embedding"),
    ),
    LIBRARY,
    DEVICE,
    PRECISION,
    Option(
        ["--backend"],
        "What runs the denoiser; openvino is for processors.",
        type=click.Choice(BACKENDS),
        default="torch",
    ),
    COMPILE,
)


def bundle_rows() -> list[dict[str, Any]]:
    """Return every bundle that has a name, as ``--json`` prints it."""
    from tegula.models.load import list_bundles

    names = ("name", "family", "installed", "size", "licence", "description")
    return [{name: getattr(entry, name) for name in names} for entry in list_bundles()]


def prescaler_rows() -> list[dict[str, Any]]:
    """Return every prescaler that has a name, as ``--json`` prints it."""
    from tegula.models.prescalers import is_installed, list_prescalers

    return [
        {**dataclasses.asdict(facts), "installed": is_installed(facts.name)}
        for facts in list_prescalers()
    ]


def face_rows() -> list[dict[str, Any]]:
    """Return every face model that has a name, as ``--json`` prints it."""
    from tegula.models.faces import is_installed, list_face_models

    return [
        {**dataclasses.asdict(model), "installed": is_installed(model.name)}
        for model in list_face_models()
    ]


def file_rows() -> list[dict[str, Any]]:
    """Return every file of weights that was found on this machine, as ``--json`` prints it."""
    from tegula.models.library import list_files

    return [
        {"name": each.name, "kind": each.kind and each.kind.value, "path": str(each.path)}
        for each in list_files()
    ]


def _list(*, json: bool) -> None:
    console = Console.open(json=json)
    if click.get_current_context().invoked_subcommand is not None:
        return
    bundles, prescalers, faces = bundle_rows(), prescaler_rows(), face_rows()
    files = file_rows()
    console.record({"bundles": bundles, "prescalers": prescalers, "faces": faces, "files": files})
    console.text("Diffusion models (bundles), for --model; `tegula models pull NAME` fetches one:")
    for row in bundles:
        _print_row(console, row, format_bytes(row["size"]))
    console.text("\nPrescalers, for --prescaler:")
    for row in prescalers:
        _print_row(console, row, f"{row['factor']}x" if row["factor"] else "any")
    console.text("\nFace models, for --faces; put their files into faces/ of the models folder:")
    for row in faces:
        _print_row(console, row, "")
    if files:
        console.text("\nYour files, each by its name for the option of its kind:")
    for row in files:
        console.text(f"  {row['name']:<24} {row['kind'] or 'file':<12} {row['path']}")


def _print_row(console: Console, row: Mapping[str, Any], fact: str) -> None:
    state = "installed" if row["installed"] else "missing"
    console.text(f"  {row['name']:<24} {state:<9} {fact:>8}  {row['description']}")


def _pull(name: str, *, quiet: bool) -> None:
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    console = Console.open(quiet=quiet)
    with Interruption().installed():
        from tegula.models.load import pull

        folders = pull(
            name,
            lambda done, total: console.message(
                f"{name}: {format_bytes(done)} of {format_bytes(total)}"
            ),
        )
    for folder in folders:
        console.message(f"{folder} is complete.")
    if not folders:
        console.message(f"All that {name} needs is here already.")


MODELS = click.Group(
    "models",
    callback=_list,
    invoke_without_command=True,
    help="List diffusion models, prescalers and face models, and fetch diffusion models.",
    short_help="List and fetch models.",
    params=[LIBRARY, JSON],
    commands=[
        click.Command(
            "pull",
            callback=_pull,
            help="Fetch and verify the weights of a diffusion model, by its name or hub id, or a "
            "ControlNet or an autoencoder by its hub id.",
            short_help="Fetch a diffusion model.",
            params=[click.Argument(["name"]), QUIET],
        )
    ],
)
