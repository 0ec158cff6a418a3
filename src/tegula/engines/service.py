"""Everything that works in the background of a server, wired from its store."""

from __future__ import annotations

from collections.abc import Sequence

from tegula.catalog import Catalog
from tegula.engines.engine import Engine
from tegula.engines.local import LocalEngine, Patience
from tegula.engines.resolving import CatalogResolver
from tegula.engines.safety import open_checker
from tegula.engines.supervisor import Supervisor
from tegula.engines.upscaling import RunnerOptions, upscaling_spec
from tegula.predictions.fetch import Fetcher
from tegula.predictions.inputs import InputReader
from tegula.predictions.settings import ServerSettings
from tegula.predictions.store import Store


def local_engines(
    settings: ServerSettings, catalog: Catalog, devices: Sequence[str]
) -> list[Engine]:
    """Return one engine for each device; none of them has started anything yet."""
    options = RunnerOptions(
        settings.bundle, catalog.weights, settings.max_pixels, settings.backend, settings.compile
    )
    spec = upscaling_spec(options)
    patience = Patience(settings.load_seconds, settings.hang_seconds, settings.cancel_seconds)
    return [LocalEngine(spec, device, patience) for device in devices]


def open_supervisor(
    store: Store, catalog: Catalog, engines: Sequence[Engine], fetcher: Fetcher
) -> Supervisor:
    """Return what runs the predictions of a store on these engines, once started.

    Raises:
        MissingExtraError: the safety checker is wanted and not installed.
    """
    settings = store.settings
    inputs = InputReader(store.files, fetcher, settings.max_fetch_bytes, settings.fetch_seconds)
    resolver = CatalogResolver(catalog, store.models)
    return Supervisor(store, engines, resolver, inputs, open_checker(settings))
