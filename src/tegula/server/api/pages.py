"""Pages for people: the start page, one for each prediction, and the API's documentation.

The pages run the server's own files and nothing else. The documentation is written here, from the
OpenAPI document: the ready-made viewers are far larger than all of the pages together (Redoc's file
has 1.1 MB and Scalar's 3.6 MB, against 40 kB).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
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
    return PlainTextResponse(service.library.model(owner, name, None).readme)


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

Operation = Mapping[str, Any]

_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>The API of tegula</title>
<link rel="icon" href="/pages/icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="/pages/page.css">
<header class="bar">
  <a class="brand" href="/">tegula</a>
  <a href="/">Make a picture larger</a>
</header>
<main class="docs">
"""
_EXAMPLE = """curl -s $URL/v1/predictions \\
  -H "Authorization: Bearer $TOKEN" -H "Prefer: wait" -H "Content-Type: application/json" \\
  -d '{"version": "tegula/upscale", "input": {"image": "data:image/png;base64,..."}}'"""


def documentation_page(document: Mapping[str, Any]) -> str:
    """Return an OpenAPI document as a page of HTML."""
    info, sections = document["info"], _sections(document)
    contents = "".join(f'<li><a href="#{tag}">{tag.capitalize()}</a></li>' for tag in sections)
    parts = "".join(
        f'<section id="{tag}"><h2>{tag.capitalize()}</h2>{"".join(operations)}</section>'
        for tag, operations in sections.items()
    )
    return (
        f"{_HEAD}<h1>The API of {escape(info['title'])} {escape(info['version'])}</h1>"
        f"<p>{_inline(info['description'])} For programs: "
        '<a href="/openapi.json">openapi.json</a>.</p>'
        f"<pre>{escape(_EXAMPLE)}</pre>"
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav>{parts}</main></html>'
    )


def _sections(document: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the operations by their last tag, in the order of the document."""
    by_tag: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            tag = escape(operation.get("tags", ["other"])[-1])
            by_tag.setdefault(tag, []).append("".join(_lines(document, method, path, operation)))
    return by_tag


def _lines(
    document: Mapping[str, Any], method: str, path: str, operation: Operation
) -> Iterator[str]:
    verb = f'<span class="verb">{method.upper()}</span>'
    yield f"<h3><code>{verb} {escape(path)}</code></h3>"
    yield f"<p>{_inline(operation.get('description', ''))}</p>"
    if rows := "".join(_parameter(one) for one in operation.get("parameters", ())):
        yield f'<div class="scroll"><table>{rows}</table></div>'
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        yield _body(document, kind, content["schema"])
    yield f'<p class="soft">{_answers(operation)}</p>'


def _parameter(parameter: Mapping[str, Any]) -> str:
    needed = ", required" if parameter.get("required") else ""
    text = _inline(parameter.get("description", ""))
    name = escape(parameter["name"])
    return (
        f'<tr><td><code>{name}</code></td><td class="soft">{parameter["in"]}{needed}</td>'
        f"<td>{text}</td></tr>"
    )


def _answers(operation: Operation) -> str:
    """Return what the statuses of an operation mean, without those that every operation has."""
    meanings = (
        f"{status}: {_inline(answer['description']).rstrip('.')}"
        for status, answer in operation["responses"].items()
        if status != "422" and answer["description"] != "Successful Response"
    )
    return "; ".join(meanings)


def _body(document: Mapping[str, Any], kind: str, schema: Mapping[str, Any]) -> str:
    """Return the fields of a body as a table, with the schema behind it."""
    resolved = _resolved(document, schema)
    required = resolved.get("required", ())
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td>"
        f'<td class="soft">{_type(field)}{", required" if name in required else ""}</td>'
        f"<td>{_inline(field.get('description', ''))}</td></tr>"
        for name, field in resolved.get("properties", {}).items()
    )
    text = escape(json.dumps(resolved, indent=2))
    return (
        f'<p>Body, <code>{escape(kind)}</code>:</p><div class="scroll"><table>{rows}</table></div>'
        f"<details><summary>Schema</summary><pre>{text}</pre></details>"
    )


def _type(field: Mapping[str, Any]) -> str:
    kinds = [one.get("type", "") for one in field.get("anyOf", [field])]
    return escape(" or ".join(kind for kind in kinds if kind and kind != "null"))


def _resolved(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    found: Mapping[str, Any] = document["components"]["schemas"][name] if name else schema
    return found


def _inline(text: str) -> str:
    """Return text as HTML, with what is between backquotes as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text.strip()))
