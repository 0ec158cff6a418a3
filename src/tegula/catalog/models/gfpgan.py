"""tencentarc/gfpgan: the prescaler, and faces restored with weights that the user brings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from tegula.catalog.inputs import (
    File,
    Inputs,
    Model,
    RunContext,
    UpscaleRequest,
    Version,
    approximated,
)
from tegula.catalog.models.real_esrgan import enlarged

_FACE_FILES: Mapping[str, str] = {
    "v1.2": "GFPGANv1.2",
    "v1.3": "GFPGANv1.3",
    "v1.4": "GFPGANv1.4",
    "RestoreFormer": "RestoreFormer",
}


class Gfpgan(Inputs):
    """No diffusion."""

    img: File = Field(description="The picture with faces.")
    version: Literal["v1.2", "v1.3", "v1.4", "RestoreFormer"] = Field(
        default="v1.4",
        description="Which weights restore the faces.",
        json_schema_extra=approximated(
            "runs where the `faces` folder of the models folder has the file of that "
            "version; faces are found by another detector, keep their coarse tones, and come out "
            "the same each time"
        ),
    )
    scale: float = Field(
        default=2.0,
        ge=0.05,
        le=10,
        description="How many times as wide and high the result is.",
        json_schema_extra=approximated(
            "Real-ESRGAN x4plus enlarges what is not a face, where the original has a smaller "
            "net; it goes straight to the size, where the original resamples what it made at 2x"
        ),
    )

    def request(self, context: RunContext) -> UpscaleRequest:  # noqa: ARG002 - the same for all
        """Return one upscale.

        Raises:
            MissingWeightsError: the file of the version is not in the models folder.
            MissingExtraError: the detector of faces is not installed.
        """
        return enlarged(self.scale, _FACE_FILES[self.version])


MODEL = Model(
    "tencentarc",
    "gfpgan",
    "GFPGAN: restores faces, and enlarges the rest with Real-ESRGAN.",
    (Version("tencentarc/gfpgan", "1", Gfpgan, image="img"),),
    "Needs the extra `faces` and the project's file.",
)
