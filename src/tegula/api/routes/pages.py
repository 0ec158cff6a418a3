"""The pages for people: one prediction, and the documentation."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse

from tegula.api.dependencies import Serving
from tegula.api.documentation import documentation_page

router = APIRouter(include_in_schema=False)

_PAGES = Path(__file__).parents[1] / "templates"
_POLICY = {
    "content-security-policy": "default-src 'self'; img-src 'self' https: http: data: blob:; "
    "style-src 'self' 'unsafe-inline'; script-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
}


@router.get("/")
def home() -> RedirectResponse:
    """Lead to the documentation."""
    return RedirectResponse("/docs")


@router.get("/p/{prediction_id}")
def prediction_page(prediction_id: str) -> HTMLResponse:  # noqa: ARG001 - the script reads it
    """Show a prediction; the page itself holds no data and asks the API for it."""
    return HTMLResponse(_file("prediction.html"), headers=_POLICY)


@router.get("/pages/prediction.js")
def prediction_script() -> HTMLResponse:
    """Give the script of that page."""
    return HTMLResponse(_file("prediction.js"), media_type="text/javascript; charset=utf-8")


@router.get("/docs")
def docs(request: Request) -> HTMLResponse:
    """Show the API for reading; needs nothing from elsewhere."""
    return HTMLResponse(documentation_page(request.app.openapi()), headers=_POLICY)


@router.get("/{owner}/{name}")
def model_page(service: Serving, owner: str, name: str) -> PlainTextResponse:
    """Show what a public model says of itself, at the address that its object gives."""
    return PlainTextResponse(service.library.entry(owner, name, None).readme)


@cache
def _file(name: str) -> str:
    return (_PAGES / name).read_text(encoding="utf-8")
