"""sczhou/codeformer: faces restored with weights that the user brings."""

from __future__ import annotations

from pydantic import Field

from tegula.catalog.inputs import (
    File,
    Inputs,
    Integer,
    Model,
    RunContext,
    UpscaleRequest,
    Version,
    approximated,
)
from tegula.catalog.weights import check_faces
from tegula.options import UpscaleOptions

_FACES = "codeformer"


class CodeFormer(Inputs):
    """No diffusion."""

    image: File = Field(description="The picture with faces.")
    codeformer_fidelity: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="0 restores most, 1 keeps most of the face.",
        json_schema_extra=approximated(
            "the same weight in the same net; faces are found by another detector, fade out "
            "towards a square instead of an outline, and keep their coarse tones"
        ),
    )
    background_enhance: bool = Field(
        default=True,
        description="Enlarge what is no face with Real-ESRGAN.",
        json_schema_extra=approximated("with Real-ESRGAN x4plus instead of x2plus"),
    )
    face_upsample: bool = Field(
        default=True,
        description="Enlarge restored faces with Real-ESRGAN.",
        json_schema_extra=approximated(
            "with x4plus, and only faces that the result shows larger than 512 pixels"
        ),
    )
    upscale: Integer = Field(
        default=2, ge=1, le=16, description="How many times as wide and high the result is."
    )

    def request(self, context: RunContext) -> UpscaleRequest:  # noqa: ARG002 - the same for all
        """Return one upscale.

        Raises:
            MissingWeightsError: the file is not in the models folder.
            MissingExtraError: the detector of faces is not installed.
        """
        check_faces(_FACES)
        options = UpscaleOptions(
            auto=False,
            scale=self.upscale,
            creativity=0.0,
            prescaler="realesrgan-x4plus" if self.background_enhance else "lanczos",
            faces=_FACES,
            face_fidelity=self.codeformer_fidelity,
            face_upsample=self.face_upsample,
        )
        return UpscaleRequest((options,))


MODEL = Model(
    "sczhou",
    "codeformer",
    "CodeFormer: restores faces, and enlarges the rest with Real-ESRGAN.",
    (Version("sczhou/codeformer", "1", CodeFormer),),
    "Needs the extra `faces`, the project's file, and a package of its network that may be "
    "used for non-commercial purposes only and is never installed along.",
)
