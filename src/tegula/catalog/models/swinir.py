"""jingyunliang/swinir: a prescaler whose weights the user brings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator

from tegula.catalog.inputs import (
    Image,
    Inputs,
    Integer,
    Model,
    RunContext,
    UpscaleRequest,
    Version,
    Whole,
    approximated,
    refused,
)
from tegula.catalog.weights import need_prescaler
from tegula.options import UpscaleOptions

_LARGE = "Real-World Image Super-Resolution-Large"
_MEDIUM = "Real-World Image Super-Resolution-Medium"
_FILE_AND_FACTOR: Mapping[str, tuple[str, float]] = {
    _LARGE: ("003_realSR_BSRGAN_DFOWMFC_s64w8_SwinIR-L_x4_GAN", 4.0),
    _MEDIUM: ("003_realSR_BSRGAN_DFO_s64w8_SwinIR-M_x2_GAN", 2.0),
}


class SwinIR(Inputs):
    """Super-resolution alone; the restoring tasks of the model are refused."""

    image: Image
    task_type: Literal[
        "Real-World Image Super-Resolution-Large",
        "Real-World Image Super-Resolution-Medium",
        "Grayscale Image Denoising",
        "Color Image Denoising",
        "JPEG Compression Artifact Reduction",
    ] = Field(
        default="Real-World Image Super-Resolution-Large",
        description="Large enlarges 4 times, Medium twice.",
        json_schema_extra=approximated(
            "Large and Medium run with their own files, which the user puts into the "
            "`prescalers` folder of the models folder; denoising and JPEG repair are refused"
        ),
    )
    noise: Annotated[Literal[15, 25, 50], Whole] = Field(
        default=15,
        description="Level of the noise that the denoising tasks remove.",
        json_schema_extra=refused("belongs to tasks that are refused"),
    )
    jpeg: Integer = Field(
        default=40,
        ge=0,
        le=100,
        description="Quality of the file that JPEG repair mends.",
        json_schema_extra=refused("belongs to a task that is refused"),
    )

    @field_validator("task_type")
    @classmethod
    def _enlarges(cls, task: str) -> str:
        if task not in _FILE_AND_FACTOR:
            raise ValueError(
                "tegula runs SwinIR to enlarge only; choose one of the super-resolution tasks"
            )
        return task

    def request(self, context: RunContext) -> UpscaleRequest:  # noqa: ARG002 - the same for all
        """Return one upscale without diffusion.

        Raises:
            MissingWeightsError: the file of the task is not in the models folder.
        """
        name, factor = _FILE_AND_FACTOR[self.task_type]
        file = need_prescaler(name, f"SwinIR ({self.task_type})")
        return UpscaleRequest(
            (UpscaleOptions(auto=False, scale=factor, creativity=0.0, prescaler=str(file)),)
        )


MODEL = Model(
    "jingyunliang",
    "swinir",
    "SwinIR: a transformer that enlarges, without diffusion.",
    (Version("jingyunliang/swinir", "1", SwinIR),),
    "Needs the extra `formats` and the authors' file.",
)
