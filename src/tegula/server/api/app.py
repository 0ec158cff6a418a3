"""The ASGI application: its routes, the middlewares before them, and errors as answers.

It runs in the server's parent process, which imports neither torch nor numpy: pictures pass it
as bytes only. What runs models is behind ``background``.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cache
from http import HTTPStatus

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute, Match

from tegula import __version__
from tegula.catalog import Catalog, packaged_fingerprint
from tegula.errors import (
    BusyError,
    ConflictError,
    InputError,
    NotFoundError,
    PathError,
    StorageError,
    TegulaError,
)
from tegula.server.api import (
    account,
    deployments,
    files,
    models,
    pages,
    predictions,
    streams,
    web,
)
from tegula.server.api.bodies import invalid_request
from tegula.server.api.counters import RateLimiter
from tegula.server.api.create import RetriedRequests
from tegula.server.api.errors import ProblemError, not_found, not_ready
from tegula.server.api.gate import CREATE, OTHER, Gate, OnePrefix, without_secrets
from tegula.server.api.library import Library
from tegula.server.api.openapi import Api
from tegula.server.api.receiving import BytesInFlight, UnstorableError
from tegula.server.api.service import Background, Hardware, Service
from tegula.server.store import Store

log = logging.getLogger("tegula.api")
CPU = Hardware("cpu", "CPU")

_ABOUT = """
The HTTP API of a tegula server. It is Replicate's, so that the official Replicate clients
work when they are given this server's address. Send a token of `tegula tokens create` as
`Authorization: Bearer TOKEN`. Every error is `application/problem+json`.
"""
_ROUTERS = (
    streams.router,
    predictions.router,
    models.router,
    files.router,
    deployments.router,
    account.router,
    account.operations_router,
    web.router,
    pages.router,
)
_CLOSE_CONNECTIONS_S = 5
_INTERNAL = "The server has a problem of its own; its log says more."


def create_app(
    store: Store,
    *,
    catalog: Catalog | None = None,
    hardware: Sequence[Hardware] = (CPU,),
    background: Sequence[Background] = (),
) -> FastAPI:
    """Return the server as an ASGI application.

    Args:
        store: where everything is kept; its settings are the server's.
        catalog: the models on offer; those over the packaged weights by default.
        hardware: the devices that predictions run on.
        background: what works while the server is up, started and stopped with it.
    """
    settings = store.settings
    library = Library(
        catalog or Catalog(packaged_fingerprint()),
        store.models,
        settings.default_model,
        settings.presets,
    )
    service = Service(store, library, hardware, background)
    app = Api(
        title="tegula",
        version=__version__,
        description=_ABOUT,
        servers=[{"url": settings.public_url}],
        root_path_in_servers=False,
        docs_url=None,
        redoc_url=None,
        lifespan=_lifespan,
        redirect_slashes=False,
    )
    app.state.service = service
    app.state.retried = RetriedRequests()
    # Not include_router, which would make every route anew for every app.
    app.router.routes.extend(_routes())
    _add_middleware(app, service)
    _add_handlers(app)
    return app


@cache
def _routes() -> Sequence[BaseRoute]:
    """Return all routes, and one for HEAD beside each for GET: the gate drops what it answers."""
    routes = [route for router in _ROUTERS for route in router.routes]
    heads = APIRouter(include_in_schema=False)
    for route in routes:
        if isinstance(route, APIRoute) and "GET" in (route.methods or ()):
            heads.add_api_route(route.path, route.endpoint, methods=["HEAD"])
    return (*routes, *heads.routes)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    for worker in service.background:
        await run_in_threadpool(worker.start)
    try:
        yield
    finally:
        await service.stop()


class GracefulServer(uvicorn.Server):
    """uvicorn, which by itself listens no longer as soon as it is asked to stop.

    This one goes on to answer until the service has stopped: its predictions run meanwhile, and
    their clients ask for them. Asking a second time ends it at once.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        on_listening: Callable[[], None] = lambda: None,
    ) -> None:
        """Take what is called once the server listens, and not where its port is taken."""
        super().__init__(config)
        self._service = service
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and tell of it."""
        await super().startup(sockets)
        if self.started:
            self._on_listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let the service stop, and then close the connections.

        ``timeout_graceful_shutdown`` bounds both: what it leaves of the time, but a few seconds at
        the least, is for answers that are on their way.
        """
        log.info("Stopping; what runs may finish, and new predictions are refused.")
        began = time.monotonic()
        stop = asyncio.ensure_future(self._service.stop())
        while not stop.done() and not self.force_exit:
            await asyncio.wait([stop], timeout=0.5)
            await self.on_tick(0)  # keeps the Date header right
        longest = self.config.timeout_graceful_shutdown
        if longest is not None:
            left = math.ceil(longest - (time.monotonic() - began))
            self.config.timeout_graceful_shutdown = max(left, _CLOSE_CONNECTIONS_S)
        await super().shutdown(sockets)


def _add_middleware(app: FastAPI, service: Service) -> None:
    """Add what every request passes; the last added comes first."""
    store, settings = service.store, service.settings
    per_minute = {CREATE: settings.creates_per_minute, OTHER: settings.requests_per_minute}
    app.add_middleware(
        Gate,
        settings=settings,
        authenticate=store.accounts.authenticate,
        resume=service.resume,
        anonymous=service.local_account if settings.no_auth else None,
        limits=RateLimiter(per_minute, store.clock, store.rates),
        metrics=service.metrics,
        is_stopping=lambda: service.stopping,
        bodies=BytesInFlight(settings.max_bodies_bytes),
        uploads=BytesInFlight(settings.max_bodies_bytes),
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Preference-Applied", "RateLimit-Remaining", "RateLimit-Reset"],
        )
    app.add_middleware(OnePrefix, mounts=settings.mounts)


def _add_handlers(app: FastAPI) -> None:
    """Answer every error, also the framework's, as a problem."""

    @app.exception_handler(TegulaError)
    def raised(request: Request, error: TegulaError) -> Response:
        return problem_of(error, request.url.path).response()

    @app.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> Response:
        errors = error.errors()
        if any(one["type"] == "json_invalid" for one in errors):
            detail = "The body is no JSON."
            if "content-type" not in request.headers:
                detail = (
                    "The body is no JSON, and has no Content-Type; send JSON with the header "
                    "Content-Type: application/json."
                )
            return ProblemError(400, detail, "Bad request").response()
        return invalid_request(errors).response()

    @app.exception_handler(UnstorableError)
    def unstorable(_request: Request, error: UnstorableError) -> Response:
        return error.problem().response()

    @app.exception_handler(HTTPException)
    def refused(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 405:
            # Starlette names the methods of the first route of the path alone.
            headers["Allow"] = ", ".join(_methods_at(request))
        title = HTTPStatus(error.status_code).phrase.capitalize()
        return ProblemError(error.status_code, error.detail, title, headers=headers).response()

    @app.exception_handler(Exception)
    def broken(_request: Request, _error: Exception) -> Response:
        return ProblemError(500, _INTERNAL, "Internal error").response()


def _methods_at(request: Request) -> Sequence[str]:
    """Return the methods that the path of a request answers, each once, in order."""
    matching = [route for route in _routes() if route.matches(request.scope)[0] != Match.NONE]
    return sorted({m for r in matching if isinstance(r, APIRoute) for m in r.methods or ()})


def problem_of(error: TegulaError, path: str) -> ProblemError:
    """Return the answer to an error that was raised in a route or below it."""
    if isinstance(error, ProblemError):
        return error
    if isinstance(error, NotFoundError):
        missing_file = path.startswith(("/v1/files", "/o/"))
        return ProblemError(404, "File not found") if missing_file else not_found()
    if isinstance(error, ConflictError):
        return ProblemError(409, str(error), "Conflict")
    if isinstance(error, BusyError):
        headers = {"retry-after": str(error.retry_after)}
        return ProblemError(429, str(error), "Too busy", headers=headers)
    if isinstance(error, InputError):
        return ProblemError(422, str(error), "Invalid request")
    if isinstance(error, StorageError):
        log.error("%s: %s", without_secrets(path), error)
        return not_ready(str(error))
    log.error("%s: %s", without_secrets(path), error, exc_info=error)
    if isinstance(error, PathError):  # a full disk, above all
        return not_ready("The server cannot keep files at the moment; try again later.")
    return ProblemError(500, _INTERNAL, "Internal error")
