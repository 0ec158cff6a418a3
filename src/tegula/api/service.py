"""What every route works with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeVar
from urllib.parse import parse_qsl, urlencode

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from tegula.api.estimates import UNKNOWN_S, UsualSeconds
from tegula.api.library import Library
from tegula.api.metrics import Metrics
from tegula.api.problems import not_found
from tegula.api.repeats import Repeats
from tegula.api.waiting import Watch
from tegula.calibration import usual_seconds
from tegula.errors import NotFoundError
from tegula.predictions.data_uris import encode_data_uri
from tegula.predictions.fetch import Policy
from tegula.predictions.records import FILE_KEY, Account, Deployment, Page, Prediction
from tegula.predictions.settings import ServerSettings
from tegula.predictions.store import Store
from tegula.predictions.wire import prediction_object

T = TypeVar("T")
_PRIVATE = ("webhook", "webhook_events_filter", "deployment")


@dataclass(frozen=True)
class Hardware:
    """A device that predictions run on; ``sku`` is its short name in the API."""

    sku: str
    name: str


class Background(Protocol):
    """Something that works while the server is up, such as the dispatcher of an engine."""

    def start(self) -> None:
        """Begin."""

    def stop(self) -> None:
        """Finish or hand back what is in hand, and end."""


@dataclass
class Service:
    """The server below its routes."""

    store: Store
    library: Library
    hardware: Sequence[Hardware]
    background: Sequence[Background] = ()
    metrics: Metrics = field(default_factory=Metrics)
    repeats: Repeats = field(default_factory=Repeats)
    ready: bool = True

    @property
    def settings(self) -> ServerSettings:
        """What the operator set."""
        return self.store.settings

    @cached_property
    def watch(self) -> Watch:
        """Wakes those who wait; made in the event loop that serves."""
        return Watch(self.store.changes)

    @cached_property
    def _seconds(self) -> UsualSeconds:
        measured = usual_seconds(self.settings.bundle)
        return UsualSeconds(self.store.usage, UNKNOWN_S if measured is None else measured)

    @cached_property
    def policy(self) -> Policy:
        """Where inputs may be fetched from and webhooks sent to."""
        return Policy.of(self.settings)

    @cached_property
    def local_account(self) -> Account:
        """Who asks when nobody is asked for a token."""
        return self.store.accounts.ensure("local", "Local")

    def told(self, prediction: Prediction, *, inline: bool = True) -> dict[str, Any]:
        """Return the JSON object of a prediction; ``inline`` allows outputs as data URIs."""
        return prediction_object(
            prediction,
            self.store.links,
            strict_statuses=self.settings.strict_statuses,
            inline=self.inline if inline else None,
        )

    def told_to_all(self, prediction: Prediction) -> dict[str, Any]:
        """Return the JSON object of a shared prediction, without what concerns its owner."""
        told = self.told(prediction, inline=False)
        return {key: value for key, value in told.items() if key not in _PRIVATE}

    def told_output(self, item: Any) -> Any:
        """Return one item of an output, as streams give it."""
        if isinstance(item, Mapping) and FILE_KEY in item:
            return self.inline(item) or self.store.links.output(item)
        return self.store.links.resolve(item)

    def inline(self, file: Mapping[str, Any]) -> str | None:
        """Return an output file as a data URI, where it is told so.

        Clients turn only ``https:`` and ``data:`` outputs into files; a program that
        writes an ``http:`` output to a file writes its address.
        """
        limit = 0 if self.settings.secure else self.settings.inline_output_bytes
        if int(file.get("size", limit + 1)) > limit:
            return None
        try:
            kept = self.store.files.get(str(file[FILE_KEY]))
            return encode_data_uri(self.store.files.path(kept).read_bytes(), kept.content_type)
        except (NotFoundError, OSError):
            return None

    async def run(self, call: Callable[..., T], *args: Any) -> T:
        """Call something that reads the database, outside the event loop."""
        return await run_in_threadpool(call, *args)

    def deployment(self, owner: str, name: str, account_id: str) -> Deployment:
        """Return a deployment of an account.

        Raises:
            ProblemError: there is none of this name, or it is somebody else's.
        """
        found = self.store.deployments.get(owner, name)
        if found is None or found.account_id != account_id:
            raise not_found()
        return found

    async def read(self, prediction_id: str) -> Prediction:
        """Return a prediction as it is now."""
        return await run_in_threadpool(self.store.predictions.get, prediction_id)

    def estimate(self, model: str) -> float:
        """Return the seconds of work that a prediction of a model is likely to be."""
        return self._seconds.get(model)

    def page(self, request: Request, page: Page[Any], results: Sequence[Any]) -> dict[str, Any]:
        """Return the JSON object of a page; its links keep the filters of the request."""
        return {
            "next": self._page_url(request, page.next),
            "previous": self._page_url(request, page.previous),
            "results": list(results),
        }

    def _page_url(self, request: Request, cursor: str | None) -> str | None:
        if cursor is None:
            return None
        kept = [pair for pair in parse_qsl(request.url.query) if pair[0] != "cursor"]
        query = urlencode([*kept, ("cursor", cursor)])
        return f"{self.settings.public_url}{request.url.path}?{query}"


def service_of(request: Request) -> Service:
    """Return the service of the app that a request came to."""
    service: Service = request.app.state.service
    return service
