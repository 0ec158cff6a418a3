"""nightmareai/real-esrgan: the prescaler, and faces restored if asked for."""

from __future__ import annotations

from pydantic import Field

from tegula.catalog.inputs import (
    Image,
    Inputs,
    Model,
    RunContext,
    UpscaleRequest,
    Version,
    approximated,
)
from tegula.catalog.weights import check_faces
from tegula.options import UpscaleOptions

_FACES = "GFPGANv1.4"


class RealEsrgan(Inputs):
    """No diffusion."""

    image: Image
    scale: float = Field(
        default=4.0, ge=0.05, le=10, description="How many times as wide and high the result is."
    )
    face_enhance: bool = Field(
        default=False,
        description="Restore faces with GFPGAN too.",
        json_schema_extra=approximated(
            "needs the extra `faces`, and GFPGANv1.4.pth in the `faces` folder of the models "
            "folder. The default is that of the project's own schema; a copy in circulation says "
            "true"
        ),
    )

    def request(self, context: RunContext) -> UpscaleRequest:  # noqa: ARG002 - the same for all
        """Return one upscale.

        Raises:
            MissingWeightsError: faces are asked for, and their file is not in the models folder.
            MissingExtraError: faces are asked for, and their detector is not installed.
        """
        return enlarged(self.scale, _FACES if self.face_enhance else "")


def enlarged(scale: float, faces: str) -> UpscaleRequest:
    """Return one upscale by Real-ESRGAN x4plus, with faces restored if a model for them is named.

    Raises:
        MissingWeightsError: the file of the face model is not in the models folder.
        MissingExtraError: the detector of faces is not installed.
    """
    if faces:
        check_faces(faces)
    options = UpscaleOptions(
        auto=False, scale=scale, creativity=0.0, prescaler="realesrgan-x4plus", faces=faces
    )
    return UpscaleRequest((options,))


MODEL = Model(
    "nightmareai",
    "real-esrgan",
    "Real-ESRGAN: a feed-forward net that enlarges and cleans, without diffusion.",
    (Version("nightmareai/real-esrgan", "1", RealEsrgan),),
    "The same weights, in tiles that cannot be told from the whole.",
)
