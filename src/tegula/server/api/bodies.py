"""What the bodies of requests hold, as pydantic models, and the answer to those that are wrong.

What is in ``input`` and ``defaults`` depends on the model; the catalogue checks that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from tegula.catalog.violations import InvalidField, violation
from tegula.server.api.errors import ProblemError, invalid

WebhookEvent = Literal["start", "output", "logs", "completed"]
Slug = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Url = Annotated[str, Field(pattern=r"^https?://[^\s]+$", max_length=2048)]
ModelName = Annotated[str, Field(pattern=r"^[^/\s:]{1,64}/[^/\s:]{1,64}$")]


def _none_if_empty(value: Any) -> Any:
    return None if value == "" else value


OptionalUrl = Annotated[Url | None, BeforeValidator(_none_if_empty)]


class Body(BaseModel):
    """A JSON object; unknown keys are refused, and null in an optional field is as if left out.

    Some clients send every field that they know.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        optional = {name for name, known in cls.model_fields.items() if not known.is_required()}
        return {key: part for key, part in value.items() if part is not None or key not in optional}


def example(**body: Any) -> ConfigDict:
    """Return the configuration of a body with an example of it for the API's document."""
    return ConfigDict(json_schema_extra={"examples": [body]})


_PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5E"
    "rkJggg=="
)


class PredictionBody(Body):
    """What every way of creating a prediction takes."""

    model_config = example(input={"image": _PICTURE, "scale": 2})

    input: dict[str, Any] = Field(
        description="What the model takes; files as addresses, of uploads too, or as data URIs."
    )
    webhook: OptionalUrl = Field(
        None, description="Where to send signed messages about what happens."
    )
    webhook_events_filter: list[WebhookEvent] | None = Field(
        None, description="Which messages to send; `output` and `completed` when left out."
    )
    stream: bool | None = Field(None, description="Not needed: `urls.stream` is always there.")
    webhook_completed: OptionalUrl = Field(None, description="What older clients send.")
    webhook_event_filter: list[WebhookEvent] | None = Field(
        None, description="What older clients send."
    )


class VersionedPredictionBody(PredictionBody):
    """The same with the version to run: an id, ``owner/name``, both, or ``latest``."""

    model_config = example(version="tegula/upscale", input={"image": _PICTURE, "scale": 2})

    version: str = Field(
        max_length=256, description="An id, `owner/name`, `owner/name:id` or `latest`."
    )


class ModelBody(Body):
    """A new model of the caller's."""

    model_config = example(
        owner="ana",
        name="portraits",
        visibility="private",
        hardware="cpu",
        description="Portraits, twice as large.",
    )

    owner: Slug
    name: Slug
    visibility: Literal["public", "private"]
    hardware: str
    description: str = Field("", max_length=4000)
    readme: str = Field("", max_length=1_000_000)
    github_url: OptionalUrl = None
    paper_url: OptionalUrl = None
    license_url: OptionalUrl = None
    cover_image_url: OptionalUrl = None


class ModelChange(Body):
    """New texts for a model; what is left out stays."""

    model_config = example(description="Portraits, four times as large.")

    description: str | None = Field(None, max_length=4000)
    readme: str | None = Field(None, max_length=1_000_000)
    github_url: OptionalUrl = None
    paper_url: OptionalUrl = None
    weights_url: OptionalUrl = None
    license_url: OptionalUrl = None


class VersionBody(Body):
    """A new version of the caller's model: a version that is here with other defaults."""

    model_config = example(base="tegula/upscale", defaults={"scale": 4})

    base: str = Field(max_length=256)
    defaults: dict[str, Any] = Field(default_factory=dict)


class DeploymentBody(Body):
    """A new deployment; ``defaults``, inputs that it pins, is an addition to Replicate's API."""

    model_config = example(
        name="fast",
        model="tegula/upscale",
        version="latest",
        hardware="cpu",
        min_instances=0,
        max_instances=1,
        defaults={"scale": 2},
    )

    name: Slug
    model: ModelName
    version: str = Field(max_length=256)
    hardware: str
    min_instances: int = Field(ge=0, le=5)
    max_instances: int = Field(ge=0, le=20)
    defaults: dict[str, Any] = Field(default_factory=dict)


class DeploymentChange(Body):
    """A new release of a deployment; what is left out stays."""

    model_config = example(max_instances=2)

    version: str | None = Field(None, max_length=256)
    hardware: str | None = None
    min_instances: int | None = Field(None, ge=0, le=5)
    max_instances: int | None = Field(None, ge=0, le=20)
    defaults: dict[str, Any] | None = None


class TrainingBody(Body):
    """The body of a request for a training, which is refused."""

    destination: str
    input: dict[str, Any]
    webhook: OptionalUrl = None
    webhook_events_filter: list[WebhookEvent] | None = None


_MOST_ERRORS = 100


def invalid_request(errors: Sequence[Mapping[str, Any]]) -> ProblemError:
    """Return the 422 for pydantic's errors in a body, the query or the path."""
    return invalid(*map(_field, errors[:_MOST_ERRORS]))


def _field(error: Mapping[str, Any]) -> InvalidField:
    parts = [str(part) for part in error["loc"]]
    place = parts[1:] if parts[:1] == ["body"] else parts
    if not place and error["type"] == "missing":  # the whole body is
        expected = "A JSON object is required as the body, with Content-Type: application/json"
        return InvalidField("required", "", expected)
    keyword, description = violation(error, place[-1] if place else "")
    # What is missing or too much is a fault of the object around it.
    around = keyword in ("required", "additional_property_not_allowed")
    return InvalidField(keyword, ".".join(place[:-1] if around else place), description)
