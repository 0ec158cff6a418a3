"""jingyunliang/swinir: a prescaler whose weights the user brings."""

from __future__ import annotations

from collections.abc import Mapping

from tegula.catalog.adapters import needed_prescaler
from tegula.catalog.inputs import (
    APPROXIMATED,
    INTEGER,
    REFUSED,
    STRING,
    Field,
    Model,
    Recipe,
    Situation,
    Values,
    Version,
    image_field,
    one_pass,
)
from tegula.options import UpscaleOptions

LARGE = "Real-World Image Super-Resolution-Large"
MEDIUM = "Real-World Image Super-Resolution-Medium"
RESTORATIONS = (
    "Grayscale Image Denoising",
    "Color Image Denoising",
    "JPEG Compression Artifact Reduction",
)
_FILES: Mapping[str, tuple[str, float]] = {
    LARGE: ("003_realSR_BSRGAN_DFOWMFC_s64w8_SwinIR-L_x4_GAN", 4.0),
    MEDIUM: ("003_realSR_BSRGAN_DFO_s64w8_SwinIR-M_x2_GAN", 2.0),
}
_ENLARGES_ONLY = "tegula runs SwinIR to enlarge only; choose one of the super-resolution tasks"

FIELDS = (
    image_field(),
    Field(
        name="task_type", kind=STRING, default=LARGE, choices=(LARGE, MEDIUM, *RESTORATIONS),
        refusals=dict.fromkeys(RESTORATIONS, _ENLARGES_ONLY),
        description="Large enlarges 4 times, Medium twice.",
        fidelity=APPROXIMATED,
        remark="Large and Medium run with their own files, which the user puts into the "
        "`prescalers` folder of the models folder; denoising and JPEG repair are refused",
    ),
    Field(
        name="noise", kind=INTEGER, default=15, choices=(15, 25, 50),
        description="Level of the noise that the denoising tasks remove.",
        fidelity=REFUSED, remark="belongs to tasks that are refused",
    ),
    Field(
        name="jpeg", kind=INTEGER, default=40, low=0, high=100,
        description="Quality of the file that JPEG repair mends.",
        fidelity=REFUSED, remark="belongs to a task that is refused",
    ),
)  # fmt: skip


def plan(values: Values, situation: Situation) -> Recipe:  # noqa: ARG001 - the same for all
    """Return one upscale without diffusion.

    Raises:
        MissingWeightsError: the file of the task is not in the models folder.
    """
    name, factor = _FILES[values["task_type"]]
    path = needed_prescaler(name, f"SwinIR ({values['task_type']})")
    return one_pass(UpscaleOptions(scale=factor, creativity=0.0, prescaler=str(path)))


MODEL = Model(
    "jingyunliang",
    "swinir",
    "SwinIR: a transformer that enlarges, without diffusion.",
    (Version("jingyunliang/swinir", "1", FIELDS, plan),),
    "Needs the extra `formats` and the authors' file.",
)
