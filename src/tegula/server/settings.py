"""What an operator sets.

``ServerSettings`` is the one description of every setting: its name, type, bounds, default and
what it does. Reading, checking, the table in docs/server.md and ``tegula serve --help`` follow
from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    AllowInfNan,
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
)
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    SettingsConfigDict,
    SettingsError,
)

from tegula.errors import OptionError, PathError
from tegula.folders import server_folder
from tegula.models import DEFAULT_BUNDLE, BundleSettings, offered_presets
from tegula.options import PRESETS, Preset
from tegula.schema import faults

MIB = 1 << 20

_STORES = ("s3", "gs", "az", "file")
"""Kinds of object stores; ``file`` is a folder that is there, to try it on."""
_OWN_PATHS = ("catalog", "docs", "history", "o", "p", "pages")


def _refuse_truth_values(value: Any) -> Any:
    """Refuse true and false as numbers, which Python takes for 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("number_type", "Input should be a number")
    return value


def _split_at_commas(value: Any) -> Any:
    if isinstance(value, str):
        value = value.split(",")
    if isinstance(value, list | tuple):
        value = [item.strip() if isinstance(item, str) else item for item in value]
        return tuple(item for item in value if item != "")
    return value


def _check_bundles(value: Any) -> Any:
    """Check each bundle under its name, so that the sentence of a wrong one tells which it is."""
    for name, bundle in value.items() if isinstance(value, Mapping) else ():
        try:
            BundleSettings.model_validate(bundle)
        except OptionError as error:  # noqa: PERF203
            # pydantic gathers ValueErrors with all other faults; anything else ends the check.
            raise ValueError(f"bundles, {name}: {error}") from None
    return value


def _folder_or_default(value: Any) -> Any:
    return server_folder() if value == "" else value  # empty variables count as unset


Count = Annotated[int, Field(ge=0), BeforeValidator(_refuse_truth_values)]
AtLeastOne = Annotated[int, Field(ge=1), BeforeValidator(_refuse_truth_values)]
Weight = Annotated[float, Field(gt=0), AllowInfNan(False), BeforeValidator(_refuse_truth_values)]  # noqa: FBT003
Seconds = Annotated[float, Field(ge=0), AllowInfNan(False), BeforeValidator(_refuse_truth_values)]  # noqa: FBT003
Share = Annotated[float, Field(ge=0), AllowInfNan(False), BeforeValidator(_refuse_truth_values)]  # noqa: FBT003
Probability = Annotated[float, Field(ge=0, le=1), BeforeValidator(_refuse_truth_values)]
# NoDecode: pydantic-settings would read lists in the environment as JSON.
Texts = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_at_commas)]
Numbers = Annotated[tuple[Count, ...], NoDecode, BeforeValidator(_split_at_commas)]


class ServerSettings(BaseSettings):
    """Settings of the server; each is also read from ``TEGULA_`` and its name in capitals."""

    model_config = SettingsConfigDict(env_prefix="TEGULA_", frozen=True, extra="forbid")

    public_url: str = Field(
        default="http://127.0.0.1:8000",
        description="How clients reach the server, without `/v1`, and with the path of a gateway.",
    )
    url_aliases: Texts = Field(
        default=(),
        description="Other addresses of this server; inputs that name them are its own files.",
    )
    folder: Annotated[
        Path, BeforeValidator(_folder_or_default), AfterValidator(Path.expanduser)
    ] = Field(
        default_factory=server_folder,
        description="Where the files and, without `database_url`, the database are kept.",
    )
    min_free_bytes: Count = Field(
        default=512 * MIB,
        description="Free bytes on the disk of `folder` below which `/readyz` answers 503.",
    )
    database_url: str | None = Field(
        default=None,
        description="SQLAlchemy URL of an SQLite or PostgreSQL database (extra `postgres`); "
        "SQLite in `folder` by default.",
    )
    blobs_url: str | None = Field(
        default=None,
        description="Bucket and prefix that keep the files in place of `folder`: `s3://`, `gs://` "
        "or `az://` (extra `objects`); the environment says how to sign in.",
    )
    blobs_copies_bytes: Count = Field(
        default=10_240 * MIB,
        description="Largest size of the copies in `folder` of files from `blobs_url`; beyond it "
        "those longest unused are removed.",
    )
    blobs_link_seconds: Count = Field(
        default=0,
        description="Downloads of outputs and uploads are redirected to links of the bucket, each "
        "valid for this time; 0 sends the bytes from here.",
    )
    no_auth: bool = Field(
        default=False, description="Ask for no token: every request is the account `local`."
    )
    bundle: str = Field(
        default=DEFAULT_BUNDLE,
        description="The weights that models run with: what `--model` of `tegula upscale` takes.",
    )
    controlnet: str | None = Field(
        default=None, description="Another tile ControlNet for `bundle`: name, path or hub id."
    )
    vae: str | None = Field(default=None, description="Another autoencoder for `bundle`.")
    loras: Texts = Field(
        default=(), description="LoRAs for `bundle`, each a name or path, with `:WEIGHT` if not 1."
    )
    few_step: str | None = Field(
        default=None, description="A LoRA for few steps, as `--few-step` of `tegula upscale`."
    )
    embeddings: Texts = Field(
        default=(), description="Embeddings for `bundle`, each a name or path."
    )
    precision: str = Field(
        default="auto", description="What to compute in: `auto`, `fp32`, `bf16` or `fp16`."
    )
    bundles: Annotated[Mapping[str, BundleSettings], BeforeValidator(_check_bundles)] = Field(
        default={},
        description="Bundles of their own for deployments and models, as a JSON object: under "
        "`owner/name`, or `owner/name:version`, an object with `bundle`, `controlnet`, `vae`, "
        "`loras`, `few_step`, `embeddings` and `precision`.",
    )
    devices: Texts = Field(
        default=(),
        description="Where models run, such as `cpu` or `cuda:0`; every GPU or the CPU if empty.",
    )
    engine: Literal["local", "ray"] = Field(
        default="local",
        description="What runs predictions: `local`, a process for each device of this machine, or "
        "`ray`, actors of the cluster at `RAY_ADDRESS` or of one of its own (extra `ray`).",
    )
    ray_min_actors: Count = Field(
        default=0, description="Actors that this server keeps, even while nothing waits."
    )
    ray_max_actors: Count = Field(
        default=0,
        description="Actors that it starts at most while predictions wait; 0 is as many as the "
        "cluster has room for when the server starts.",
    )
    ray_gpus: Share = Field(
        default=0.0,
        description="GPUs, or a share of one, for each actor; 0 is one where the cluster has any.",
    )
    ray_cpus: Share = Field(
        default=0.0,
        description="CPUs for each actor; 0 is one beside a GPU, and without GPUs those of the "
        "smallest machine.",
    )
    ray_resources: dict[str, Weight] = Field(
        default={},
        description="Further resources for each actor as the cluster names them, such as "
        '`{"accelerator_type:L4": 0.001}`.',
    )
    ray_shard_above: Share = Field(
        default=0.0,
        description="Megapixels of a result above which idle actors help with it: its windows and "
        "tiles are spread over them, and more are started, up to `ray_max_actors`; 0 is never.",
    )
    backend: str = Field(default="torch", description="`torch`, or `openvino` on processors.")
    compile: bool = Field(default=False, description="Let torch compile the networks.")
    retention_seconds: Count = Field(
        default=3600,
        description="How long a finished prediction keeps its data; 0 keeps it for good.",
    )
    history_seconds: Count = Field(
        default=0,
        description="How long a finished prediction is listed, with or without its data, before it "
        "is removed for good; shared ones stay, and 0 keeps all.",
    )
    upload_seconds: Count = Field(
        default=86_400, description="How long an uploaded file is kept; 0 keeps it for good."
    )
    creates_per_minute: Count = Field(
        default=600, description="Predictions that one token may create in a minute; 0 is no limit."
    )
    requests_per_minute: Count = Field(
        default=3000,
        description="Other requests that one token may make in a minute; 0 is no limit.",
    )
    max_waiting: Count = Field(
        default=1000,
        description="Unfinished predictions from which on new ones are refused with 429.",
    )
    max_waiting_seconds: Seconds = Field(
        default=7200.0, description="The same in estimated seconds of work."
    )
    max_account_waiting: Count = Field(
        default=0,
        description="Unfinished predictions of one account from which on its new ones are refused; "
        "0 is four fifths of `max_waiting`, which leaves room for other accounts.",
    )
    max_account_waiting_seconds: Seconds = Field(
        default=0.0,
        description="The same in estimated seconds of work; 0 is four fifths of "
        "`max_waiting_seconds`.",
    )
    max_account_bytes: Count = Field(
        default=0,
        description="Uploads that one account may keep together; beyond it 413; 0 is no limit.",
    )
    account_weights: dict[str, Weight] = Field(
        default={},
        description="Shares of the devices that accounts get while they wait for each other, by "
        "username, 1 where none is given: an account of 2 gets twice the seconds of one of 1.",
    )
    max_body_bytes: Count = Field(default=64 * MIB, description="Largest JSON body; beyond it 413.")
    max_upload_bytes: Count = Field(default=100 * MIB, description="Largest upload; beyond it 413.")
    max_bodies_bytes: Count = Field(
        default=256 * MIB,
        description="The large bodies of all requests together, and as much again for uploads; "
        "beyond it 503.",
    )
    least_body_rate: Count = Field(
        default=1024,
        description="Bytes a second that a body or an upload must come with, after half a minute "
        "of patience; below it 408.",
    )
    max_connections: Count = Field(
        default=4096,
        description="Connections at once; 0, or more than three quarters of the files that the "
        "process may open, counts as those.",
    )
    max_connections_per_address: Count = Field(
        default=512,
        description="Connections of one address at once; 0 is no limit. A proxy in front has one.",
    )
    header_seconds: Seconds = Field(
        default=15.0,
        description="Time for the headers of a request, and for a new connection to send some.",
    )
    max_fetch_bytes: Count = Field(
        default=100 * MIB, description="Largest input that is fetched from an address."
    )
    fetch_seconds: Seconds = Field(default=60.0, description="Time for fetching one input.")
    fetches_per_account: AtLeastOne = Field(
        default=8, description="Inputs of one account that are fetched at the same time."
    )
    fetches_per_host: AtLeastOne = Field(
        default=8, description="Inputs that are fetched from one host at the same time."
    )
    fetch_http: bool = Field(
        default=True, description="Fetch inputs and send webhooks over plain HTTP, too."
    )
    fetch_private: bool = Field(
        default=False, description="Fetch from and send to addresses in private networks, too."
    )
    fetch_ports: Numbers = Field(
        default=(80, 443),
        description="The only ports that inputs and webhooks may use; empty allows all.",
    )
    max_pixels: Count = Field(
        default=134_217_728, description="Largest picture that is taken or returned, in pixels."
    )
    max_output_bytes: Count = Field(default=1024 * MIB, description="Largest output file.")
    inline_output_bytes: Count = Field(
        default=16 * MIB,
        description="Outputs up to this size are returned as data URIs while `public_url` is plain "
        "HTTP; 0 always returns links.",
    )
    run_seconds: Seconds = Field(default=1800.0, description="A prediction that runs longer fails.")
    load_seconds: Seconds = Field(
        default=900.0,
        description="Silence after which a process that loads its models is replaced.",
    )
    hang_seconds: Seconds = Field(
        default=300.0,
        description="Silence after which a process that runs a prediction is replaced.",
    )
    cancel_seconds: Seconds = Field(
        default=15.0,
        description="Time after a cancel at which a process that still runs is replaced.",
    )
    lease_seconds: Seconds = Field(
        default=15.0,
        description="Silence of a worker after which its prediction goes to another worker.",
    )
    idle_unload_seconds: Seconds = Field(
        default=900.0,
        description="Time after their last use at which models are unloaded; 0 keeps them.",
    )
    default_model: str | None = Field(
        default=None,
        description="`owner/name` that a bare `latest` means where the inputs fit several models.",
    )
    strict_statuses: bool = Field(
        default=False,
        description="Report `aborted` as such and not as `canceled`; many clients cannot read it.",
    )
    safety_checker: bool = Field(
        default=False, description="Classify outputs and fail unsafe ones (extra `safety`)."
    )
    safety_threshold: Probability = Field(
        default=0.8, description="Probability, 0 to 1, from which an output counts as unsafe."
    )
    safety_optional: bool = Field(
        default=True, description="Honour the input `disable_safety_checker`."
    )
    cors_origins: Texts = Field(
        default=(), description="Origins whose web pages may call the API; `*` allows all."
    )
    webhook_seconds: Seconds = Field(default=20.0, description="Time-out of one webhook delivery.")
    webhooks_per_receiver: AtLeastOne = Field(
        default=4, description="Webhook deliveries to one host at the same time."
    )

    @field_validator("public_url")
    @classmethod
    def _is_a_web_address(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")):
            raise ValueError(f"public_url starts with http:// or https://, unlike {value!r}")
        # A gateway may take its path off or leave it on, and both must be told apart.
        if urlsplit(value).path.split("/")[1:2] in [[name] for name in _OWN_PATHS]:
            raise ValueError(f"public_url leads to {value!r}, which is a page of the server itself")
        return value.rstrip("/")

    @field_validator("blobs_url")
    @classmethod
    def _is_a_bucket(cls, value: str | None) -> str | None:
        address = urlsplit(value or "")
        # The value is not repeated: a secret in it would end in the log.
        if value and (address.scheme not in _STORES or not (address.netloc or address.path)):
            raise ValueError("blobs_url is s3://BUCKET/PREFIX, or the same of gs or az")
        if address.password is not None or address.query:
            raise ValueError("blobs_url holds no secrets; those are read from the environment")
        return value.rstrip("/") if value else None

    @property
    def models(self) -> BundleSettings:
        """The bundle of everything that has none of its own.

        Raises:
            OptionError: a part of it is wrong.
        """
        return BundleSettings(**{name: getattr(self, name) for name in BundleSettings.model_fields})

    @property
    def presets(self) -> tuple[Preset, ...]:
        """The presets that one at least of the bundles can tell apart."""
        bundles = (self.bundle, *(each.bundle for each in self.bundles.values()))
        offered = {preset for bundle in bundles for preset in offered_presets(bundle)}
        return tuple(preset for preset in PRESETS if preset in offered)

    def bundle_of(self, *references: str | None) -> str:
        """Return the first of these references that has a bundle of its own, or else ""."""
        return next((each for each in references if each in self.bundles), "") or ""

    @property
    def mounts(self) -> set[str]:
        """The paths at which gateways mount the server, such as ``/tile``."""
        bases = (self.public_url, *self.url_aliases)
        return {path for base in bases if (path := urlsplit(base).path.rstrip("/"))}

    @property
    def store_url(self) -> str:
        """The SQLAlchemy URL in use."""
        return self.database_url or f"sqlite:///{self.folder / 'tegula.sqlite3'}"

    @property
    def secure(self) -> bool:
        """Whether clients reach the server over TLS."""
        return self.public_url.startswith("https://")


def load_settings(file: Path | None = None, **given: Any) -> ServerSettings:
    """Return the settings of a JSON file, overlaid with the environment, overlaid with ``given``.

    Lists may be written as one text with commas between.

    Raises:
        PathError: the file cannot be read.
        OptionError: names are unknown or values wrong; the sentence lists all of them.
    """
    from_file = {} if file is None else _read_object(file)
    try:
        from_environment = EnvSettingsSource(ServerSettings)()
        settings = ServerSettings(**{**from_file, **from_environment, **given})
        _ = settings.models  # for its faults
        return settings
    except ValidationError as error:
        raise OptionError(faults(ServerSettings, error, "setting")) from error
    except SettingsError as error:  # of what is an object, and so JSON also in the environment
        name = str(error).partition('"')[2].partition('"')[0]
        raise OptionError(f"TEGULA_{name.upper()} is not JSON; give one object.") from error


def _read_object(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PathError(f"The settings file {file} cannot be read as JSON: {error}.") from error
    if not isinstance(values, dict):
        raise OptionError(f"The settings file {file} must hold one JSON object.")
    return values


@dataclass(frozen=True)
class SettingDescription:
    """One setting for people to read; ``default`` is its value as they would write it."""

    name: str
    default: str
    effect: str


def describe_settings() -> tuple[SettingDescription, ...]:
    """Return every setting in the order of the class."""
    return tuple(
        SettingDescription(name, _shown(name, field.default), field.description or "")
        for name, field in ServerSettings.model_fields.items()
    )


def _shown(name: str, default: Any) -> str:
    if name == "folder":
        return "~/.local/share/tegula"  # on Linux; it must not depend on where docs are generated
    if name == "public_url":
        return "the address listened on"
    if default is None or default in ((), {}):
        return "none"
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, tuple):
        return ", ".join(map(str, default))
    if name.endswith("_bytes"):
        return f"{default // MIB} MiB"
    return f"{default:g}" if isinstance(default, float) else str(default)
