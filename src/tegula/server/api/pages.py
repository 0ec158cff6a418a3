"""Pages for people: the start page, one for each prediction, and the API's documentation.

The pages run the server's own files and nothing else. The addresses in them are relative, so that
they work wherever a gateway mounts the server. The documentation is written here, from the OpenAPI
document: the ready-made viewers are far larger than all of the pages together (Redoc's file has
1.1 MB and Scalar's 3.6 MB, against 40 kB).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse

from tegula.server.api.errors import not_found
from tegula.server.api.service import ServiceDep

router = APIRouter(include_in_schema=False)

_WEB = Path(__file__).parents[1] / "web"
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
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
    """Show the page that enlarges a picture; it uses the API as any client does."""
    return HTMLResponse(_page("home.html"), headers=_HEADERS)


@router.get("/p/{prediction_id}")
def prediction_page(prediction_id: str) -> HTMLResponse:  # noqa: ARG001 - the script reads it
    """Show a prediction; the page holds no data and gets it from the API."""
    return HTMLResponse(_page("prediction.html"), headers=_HEADERS)


@router.get("/docs")
def docs(request: Request) -> HTMLResponse:
    """Show the documentation of the API."""
    return HTMLResponse(documentation_page(request.app.openapi()), headers=_HEADERS)


@router.get("/pages/{name}")
def asset(request: Request, name: str) -> Response:
    """Get a script, a style sheet or an icon of these pages.

    Browsers ask each time whether theirs is current: old scripts do not work with the pages of
    a newer server.
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
def model_page(service: ServiceDep, owner: str, name: str) -> PlainTextResponse:
    """Show the README of a public model, at the address that its JSON object names."""
    return PlainTextResponse(service.library.model(owner, name, None).page)


@cache
def _page(name: str) -> str:
    return (_WEB / name).read_text(encoding="utf-8")


@cache
def _assets() -> dict[str, tuple[str, bytes]]:
    """Return each file by name, with an entity tag that changes with its content."""
    files = {path.name: path.read_bytes() for path in (_WEB / "assets").iterdir()}
    return {
        name: (f'"{hashlib.sha256(content).hexdigest()[:32]}"', content)
        for name, content in files.items()
        if Path(name).suffix in _TYPES
    }


# The documentation.

_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>The API of tegula</title>
<link rel="icon" href="pages/icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="pages/page.css">
<header class="bar">
  <a class="brand" href="./">tegula</a>
  <a href="./">Make a picture larger</a>
</header>
<main class="docs">
"""
_EXAMPLE = """curl -s $URL/v1/predictions \\
  -H "Authorization: Bearer $TOKEN" -H "Prefer: wait" -H "Content-Type: application/json" \\
  -d '{"version": "tegula/upscale", "input": {"image": "data:image/png;base64,..."}}'"""


def documentation_page(document: Mapping[str, Any]) -> str:
    """Return an OpenAPI document as a page of HTML, its operations grouped by their last tag."""
    sections: dict[str, str] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            tag = escape(operation.get("tags", ["other"])[-1])
            text = _operation(document, method, path, operation)
            sections[tag] = sections.get(tag, "") + text
    contents = "".join(f'<li><a href="#{tag}">{tag.capitalize()}</a></li>' for tag in sections)
    parts = "".join(
        f'<section id="{tag}"><h2>{tag.capitalize()}</h2>{text}</section>'
        for tag, text in sections.items()
    )
    info = document["info"]
    return (
        f"{_HEAD}<h1>The API of {escape(info['title'])} {escape(info['version'])}</h1>"
        f"<p>{_inline(info['description'])} For programs: "
        '<a href="openapi.json">openapi.json</a>.</p>'
        f"<pre>{escape(_EXAMPLE)}</pre>"
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav>{parts}</main></html>'
    )


def _operation(
    document: Mapping[str, Any], method: str, path: str, operation: Mapping[str, Any]
) -> str:
    verb = f'<span class="verb">{method.upper()}</span>'
    text = f"<h3><code>{verb} {escape(path)}</code></h3>"
    text += f"<p>{_inline(operation.get('description', ''))}</p>"
    if parameters := operation.get("parameters", ()):
        text += _table(
            (one["name"], one["in"], one.get("required", False), one.get("description", ""))
            for one in parameters
        )
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = _resolved(document, content["schema"])
        text += f"<p>Body, <code>{escape(kind)}</code>:</p>" + _table(
            (name, _types(field), name in schema.get("required", ()), field.get("description", ""))
            for name, field in schema.get("properties", {}).items()
        )
        text += (
            "<details><summary>Schema</summary>"
            f"<pre>{escape(json.dumps(schema, indent=2))}</pre></details>"
        )
    answers = ((status, _resolved(document, one)) for status, one in operation["responses"].items())
    meanings = (
        f"{status}: {_inline(answer['description']).rstrip('.')}"
        for status, answer in answers
        if answer["description"] != "Successful Response"
    )
    return text + f'<p class="soft">{"; ".join(meanings)}</p>'


def _resolved(document: Mapping[str, Any], part: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a part of the document, or what it refers to."""
    if "$ref" not in part:
        return part
    for key in part["$ref"].removeprefix("#/").split("/"):
        document = document[key]
    return document


def _table(rows: Iterable[tuple[str, str, bool, str]]) -> str:
    """Return rows of (name, kind, whether required, description) as a table."""
    cells = "".join(
        f"<tr><td><code>{escape(name)}</code></td>"
        f'<td class="soft">{escape(kind)}{", required" if required else ""}</td>'
        f"<td>{_inline(description)}</td></tr>"
        for name, kind, required, description in rows
    )
    return f'<div class="scroll"><table>{cells}</table></div>'


def _types(field: Mapping[str, Any]) -> str:
    types = [one.get("type", "") for one in field.get("anyOf", [field])]
    return " or ".join(kind for kind in types if kind and kind != "null")


def _inline(text: str) -> str:
    """Return text as HTML, with what is between backquotes as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text.strip()))
