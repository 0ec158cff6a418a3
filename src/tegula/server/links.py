"""Links to what the server holds, and a prediction as the HTTP API shows it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Annotated, Any, overload
from urllib.parse import SplitResult, quote, urlencode, urlsplit

import itsdangerous
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from tegula.server.tables import FILE_KEY, WEBHOOK_EVENTS, Prediction, State

Inline = Callable[[Mapping[str, Any]], str | None]
"""Returns the data URI of a stored file, or None if it is to be given as a link."""


class _ShortHmac(itsdangerous.HMACAlgorithm):
    """HMAC-SHA256, of which 24 bytes are enough and make base64 without padding."""

    def __init__(self) -> None:
        super().__init__(hashlib.sha256)

    def get_signature(self, key: bytes, value: bytes) -> bytes:
        """Return the signature before it is encoded."""
        return super().get_signature(key, value)[:24]


@dataclass(frozen=True)
class Signer:
    """Signs names for one purpose each, so that a link to one thing opens no other."""

    key: bytes = field(repr=False)

    def token(self, purpose: str, name: str) -> str:
        """Return ``name.signature``, fit for the path of a URL."""
        return self._of(purpose).sign(name).decode()

    def name_of(self, purpose: str, token: str) -> str | None:
        """Return the name in a token, or None if we never signed it for this purpose."""
        try:
            return self._of(purpose).unsign(token).decode()
        except itsdangerous.BadSignature:
            return None

    def download(self, owner: str, file_id: str, expiry: int) -> str:
        """Return the signature of a file's download in the API's form: base64 of an HMAC.

        Args:
            owner: who may download it.
            file_id: the file.
            expiry: seconds since 1970.
        """
        key = self._of("download").derive_key()
        digest = hmac.digest(key, f"{owner} {file_id} {expiry}".encode(), hashlib.sha256)
        return base64.b64encode(digest).decode()

    def _of(self, purpose: str) -> itsdangerous.Signer:
        return itsdangerous.Signer(
            self.key,
            salt=purpose,
            key_derivation="hmac",
            digest_method=hashlib.sha256,
            algorithm=_ShortHmac(),
        )


_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_PORTS = {"http": 80, "https": 443}
_FILE_PATH = re.compile(r"(?:/v1)*/files/([0-9a-z]+)(?:/download)?/?")
_OUTPUT_PATH = re.compile(r"/o/([^/]+)/[^/]*")


@dataclass(frozen=True)
class Links:
    """Makes the URLs of one server, and tells what a URL of its own stands for.

    public_url: how clients reach it, without ``/v1``.
    aliases: other URLs that lead to it.
    """

    public_url: str
    signer: Signer
    aliases: tuple[str, ...] = ()

    def prediction(self, prediction_id: str) -> str:
        """Return the URL of a prediction."""
        return f"{self.public_url}/v1/predictions/{prediction_id}"

    def cancel(self, prediction_id: str) -> str:
        """Return the URL that cancels a prediction."""
        return f"{self.prediction(prediction_id)}/cancel"

    def web(self, prediction_id: str) -> str:
        """Return the URL of the page of a prediction."""
        return f"{self.public_url}/p/{prediction_id}"

    def stream(self, prediction_id: str) -> str:
        """Return where the events of a prediction are streamed, without authentication.

        JavaScript's client takes outputs for files only under ``/v1/files/``.
        """
        return f"{self.public_url}/v1/files/streams/{self.signer.token('stream', prediction_id)}"

    def file(self, file_id: str) -> str:
        """Return the URL of an upload's description, which its owner alone may read."""
        return f"{self.public_url}/v1/files/{file_id}"

    def download(self, file_id: str, owner: str, expiry: int) -> str:
        """Return a URL at which everybody who has it reads an upload, until ``expiry``.

        Args:
            file_id: the upload.
            owner: the username of its account.
            expiry: seconds since 1970.
        """
        signature = self.signer.download(owner, file_id, expiry)
        query = urlencode({"owner": owner, "expiry": expiry, "signature": signature})
        return f"{self.file(file_id)}/download?{query}"

    def output(self, file: Mapping[str, Any]) -> str:
        """Return a URL at which everybody who has it reads a stored file.

        Args:
            file: a file as inputs and outputs hold it, see ``FILE_KEY``.
        """
        token = self.signer.token("output", file[FILE_KEY])
        return f"{self.public_url}/o/{token}/{quote(file['name'])}"

    def session(self, token_id: str, expiry: int) -> str:
        """Return what a browser keeps in a cookie to stay signed in, until ``expiry``.

        It is good for as long as the token is, and shows nothing of it.
        """
        return self.signer.token("session", f"{token_id}-{expiry}")

    def session_of(self, cookie: str, now: float) -> str | None:
        """Return the id of the token that a cookie stands for, unless it is over by ``now``."""
        token_id, _, expiry = (self.signer.name_of("session", cookie) or "").rpartition("-")
        return token_id if expiry and now < int(expiry) else None

    def streamed(self, token: str) -> str | None:
        """Return the id of the prediction that a stream's token opens."""
        return self.signer.name_of("stream", token)

    def opened(self, token: str) -> str | None:
        """Return the id of the file that an output's token opens."""
        return self.signer.name_of("output", token)

    def resolve(self, value: Any, inline: Inline | None = None) -> Any:
        """Return a JSON value with each stored file in it replaced by its link.

        Args:
            value: an input or an output.
            inline: where it gives a data URI, that is used in place of the link.
        """
        if isinstance(value, Mapping):
            if FILE_KEY in value:
                return (inline and inline(value)) or self.output(value)
            return {key: self.resolve(item, inline) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.resolve(item, inline) for item in value]
        return value

    def own_file(self, url: str) -> tuple[str, bool] | None:
        """Return the id of the file of this server that a URL names, or None for other URLs.

        The second part tells whether the URL opens the file to everybody.
        """
        try:
            parts = urlsplit(url)
            if not any(_same_server(parts, urlsplit(base)) for base in self._bases):
                return None
        except ValueError:
            return None
        path = parts.path
        for base in self._bases:
            path = path.removeprefix(urlsplit(base).path.rstrip("/"))
        if match := _FILE_PATH.fullmatch(path):
            return match[1], False
        if (match := _OUTPUT_PATH.fullmatch(path)) and (name := self.opened(match[1])):
            return name, True
        return None

    @property
    def _bases(self) -> tuple[str, ...]:
        return (self.public_url, *self.aliases)


def _same_server(one: SplitResult, other: SplitResult) -> bool:
    """Whether both reach the same server; all names of the loopback are one."""
    if one.scheme not in _PORTS or _port(one) != _port(other):
        return False
    hosts = {one.hostname or "", other.hostname or ""}
    return len(hosts) == 1 or hosts <= _LOOPBACK


def _port(parts: SplitResult) -> int | None:
    return parts.port or _PORTS.get(parts.scheme)


# A prediction as the API and webhooks show it.


class Answer(BaseModel):
    """A JSON object that the server answers with; the API's document has its schema.

    Fields with a default may be left out of the answer: they are, unless they are set.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def as_json(self) -> dict[str, Any]:
        """Return the object as it is sent."""
        return self.model_dump(exclude_unset=True)


def one_of(words: Sequence[str]) -> WithJsonSchema:
    """Return the schema of a text that is one of these words."""
    return WithJsonSchema({"type": "string", "enum": list(words)})


Timestamp = Annotated[str, WithJsonSchema({"type": "string", "format": "date-time"})]
Address = Annotated[str, WithJsonSchema({"type": "string", "format": "uri"})]
WebhookEvent = Annotated[str, one_of(WEBHOOK_EVENTS)]


class PredictionUrls(Answer):
    """Where a prediction is read, cancelled, looked at and followed."""

    get: Address
    cancel: Address
    web: Address = Field(description="Its page.")
    stream: Address = Field(description="Its events; whoever has the address may follow them.")


class PredictionMetrics(Answer):
    """How far a prediction is, or how long it took."""

    progress: float = Field(0, ge=0, le=1, description="While it runs: the share that is done.")
    total_time: float = Field(0, ge=0, description="Seconds from its creation to its end.")
    predict_time: float = Field(0, ge=0, description="Seconds that it ran.")


class PredictionAnswer(Answer):
    """A prediction."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "01m8e2pw9qtqy968gncxmjskp5",
                    "model": "tegula/upscale",
                    "version": "5c7d" * 16,
                    "input": {"image": "https://tegula.example/o/01m8.c2ln/input.png", "scale": 2},
                    "output": ["https://tegula.example/o/01m9.bmF0/out-0.png"],
                    "logs": "100%|##########| 8/8 [00:05<00:00]\n",
                    "error": None,
                    "status": "succeeded",
                    "source": "api",
                    "data_removed": False,
                    "created_at": "2026-11-22T09:30:00.000Z",
                    "started_at": "2026-11-22T09:30:00.100Z",
                    "completed_at": "2026-11-22T09:30:05.600Z",
                    "metrics": {"total_time": 5.6, "predict_time": 5.5},
                    "urls": {
                        "get": "https://tegula.example/v1/predictions/01m8",
                        "cancel": "https://tegula.example/v1/predictions/01m8/cancel",
                        "web": "https://tegula.example/p/01m8",
                        "stream": "https://tegula.example/v1/files/streams/01m8.c2ln",
                    },
                }
            ]
        }
    )

    id: str
    model: str = Field(description="`owner/name`.")
    version: str
    input: dict[str, Any] = Field(description="As it was given; stored files as links.")
    output: Any = Field(description="What the model returned, or null; files as links.")
    logs: str | None
    error: str | None
    status: Annotated[str, one_of([state.value for state in State])]
    source: Annotated[str, one_of(("api", "web"))]
    data_removed: bool = Field(description="Whether input, output and logs are gone.")
    created_at: Timestamp
    started_at: Timestamp | None
    completed_at: Timestamp | None
    metrics: PredictionMetrics
    urls: PredictionUrls
    deployment: str | None = Field(None, description="`owner/name`, if it came through one.")
    deadline: Timestamp | None = Field(None, description="When it is given up.")
    webhook: str | None = None
    webhook_events_filter: list[WebhookEvent] | None = None


@overload
def timestamp(time: datetime) -> str: ...
@overload
def timestamp(time: datetime | None) -> str | None: ...
def timestamp(time: datetime | None) -> str | None:
    """Return RFC 3339 in UTC with milliseconds, which every client can read."""
    if time is None:
        return None
    text = time.astimezone(timezone.utc).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def prediction_answer(
    prediction: Prediction,
    links: Links,
    *,
    strict_statuses: bool = False,
    inline: Inline | None = None,
    to_owner: bool = True,
) -> PredictionAnswer:
    """Return a prediction as it is shown.

    Args:
        prediction: the row.
        links: makes its URLs.
        strict_statuses: show ``aborted`` as such and not as ``canceled``.
        inline: makes data URIs of small outputs; without it all are links.
        to_owner: also show its deployment and its webhook.
    """
    status = prediction.status
    if status is State.ABORTED and not strict_statuses:
        status = State.CANCELED  # several clients know no "aborted" and would wait for ever
    private: dict[str, Any] = {}
    if to_owner and prediction.deployment is not None:
        private["deployment"] = prediction.deployment
    if prediction.deadline is not None:
        private["deadline"] = timestamp(prediction.deadline)
    if to_owner and prediction.webhook is not None:
        private["webhook"] = prediction.webhook
        private["webhook_events_filter"] = list(prediction.webhook_events)
    return PredictionAnswer(
        id=prediction.id,
        model=prediction.model,
        version=prediction.version,
        input=links.resolve(prediction.input),
        output=links.resolve(prediction.output, inline),
        logs=None if prediction.data_removed else prediction.logs,
        error=prediction.error,
        status=status.value,
        source=prediction.source,
        data_removed=prediction.data_removed,
        created_at=timestamp(prediction.created_at),
        started_at=timestamp(prediction.started_at),
        completed_at=timestamp(prediction.completed_at),
        metrics=_metrics(prediction),
        urls=PredictionUrls(
            get=links.prediction(prediction.id),
            cancel=links.cancel(prediction.id),
            web=links.web(prediction.id),
            stream=links.stream(prediction.id),
        ),
        **private,
    )


def _metrics(prediction: Prediction) -> PredictionMetrics:
    if prediction.completed_at is None:
        started = {"progress": round(prediction.progress, 4)} if prediction.started_at else {}
        return PredictionMetrics(**started)
    times = {"total_time": (prediction.completed_at - prediction.created_at).total_seconds()}
    if prediction.predict_seconds is not None:
        times["predict_time"] = prediction.predict_seconds
    return PredictionMetrics(**{name: round(seconds, 6) for name, seconds in times.items()})


def compact_json(value: Any) -> str:
    """Return JSON as JavaScript writes it.

    Receivers in JavaScript verify a webhook by what they parsed and wrote again.
    """
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
