"""Clients disagree whether their base URL includes ``/v1``; here both reach the API.

The same environment variable holds it with the prefix for one client and without it for
another, so ``/v1/v1/predictions`` and ``/predictions`` are rewritten, never redirected.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

PREFIX = "/v1"
_UNPREFIXED = frozenset(
    {
        "account",
        "collections",
        "deployments",
        "files",
        "hardware",
        "models",
        "predictions",
        "search",
        "streams",
        "trainings",
        "usage",
        "webhooks",
    }
)


def normalise(path: str) -> str:
    """Return the path with exactly one prefix.

    >>> normalise("/v1/v1/predictions"), normalise("/predictions"), normalise("/docs")
    ('/v1/predictions', '/v1/predictions', '/docs')
    """
    while path.startswith(PREFIX * 2 + "/"):
        path = path[len(PREFIX) :]
    first = path.split("/", 2)[1] if path.startswith("/") else ""
    return PREFIX + path if first in _UNPREFIXED else path


class OnePrefix:
    """ASGI middleware that puts ``normalise`` before the routes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on under its plain path."""
        if scope["type"] == "http":
            path = normalise(scope["path"])
            scope = {**scope, "path": path, "raw_path": path.encode()}
        await self._app(scope, receive, send)
