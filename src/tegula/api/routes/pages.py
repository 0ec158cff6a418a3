"""The pages for people: the start, one prediction, and the documentation."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse

from tegula.api.dependencies import Serving
from tegula.api.documentation import documentation_page
from tegula.api.problems import not_found

router = APIRouter(include_in_schema=False)

_WEB = Path(__file__).parents[2] / "web"
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_POLICY = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    # Addresses of shared pages hold a secret.
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


@router.get("/")
def home() -> HTMLResponse:
    """Show the page that enlarges a photograph; it does so through the API."""
    return HTMLResponse(_page("home.html"), headers=_POLICY)


@router.get("/p/{prediction_id}")
def prediction_page(prediction_id: str) -> HTMLResponse:  # noqa: ARG001 - the script reads it
    """Show a prediction; the page itself holds no data and asks the API for it."""
    return HTMLResponse(_page("prediction.html"), headers=_POLICY)


@router.get("/docs")
def docs(request: Request) -> HTMLResponse:
    """Show the API for reading; needs nothing from elsewhere."""
    return HTMLResponse(documentation_page(request.app.openapi()), headers=_POLICY)


@router.get("/pages/{name}")
def asset(request: Request, name: str) -> Response:
    """Give a script, a style sheet or a picture of these pages.

    Browsers ask each time whether theirs is still right: after an update of the server, old
    scripts would not fit new pages.
    """
    kept = _assets().get(name)
    if kept is None:
        raise not_found()
    tag, content = kept
    headers = {"etag": tag, "cache-control": "no-cache"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=_TYPES[Path(name).suffix])


@router.get("/{owner}/{name}")
def model_page(service: Serving, owner: str, name: str) -> PlainTextResponse:
    """Show what a public model says of itself, at the address that its object gives."""
    return PlainTextResponse(service.library.entry(owner, name, None).readme)


@cache
def _page(name: str) -> str:
    return (_WEB / name).read_text(encoding="utf-8")


@cache
def _assets() -> dict[str, tuple[str, bytes]]:
    """Return each file by name, with a tag that changes when it does."""
    files = {path.name: path.read_bytes() for path in (_WEB / "assets").iterdir()}
    return {
        name: (f'"{hashlib.sha256(content).hexdigest()[:32]}"', content)
        for name, content in files.items()
        if Path(name).suffix in _TYPES
    }
