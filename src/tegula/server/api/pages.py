"""Pages for people: the workbench, and the API's documentation.

Every page is ``web/layout.html`` around a fragment of its own, and runs the server's own files and
nothing else. A page holds no data: its script asks the API, as the account that the browser is
signed in to. The addresses in pages are relative, so that they work wherever a gateway mounts the
server. The documentation is written here, from the OpenAPI document: the ready-made viewers are
far larger than all of the pages together (Redoc's file has 1.1 MB and Scalar's 3.6 MB).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse

from tegula.server.api.errors import not_found
from tegula.server.api.gate import session_name
from tegula.server.api.service import CallerDep, ServiceDep

router = APIRouter(include_in_schema=False)

SIGNED_IN_FOR = timedelta(days=30)
_WEB = Path(__file__).parents[1] / "web"
_TYPES = {
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".webp": "image/webp",
}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    # Addresses of shared pages hold a secret.
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


# The pages.

_NO_SCRIPT = "<noscript><p>This page needs JavaScript.</p></noscript>"


@dataclass(frozen=True)
class Page:
    """What the layout is filled with.

    name: of its fragment in ``web/``, and of its script and style sheet if it has any.
    root: leads from its address to that of the start page.
    """

    name: str
    title: str
    heading: str
    lead: str = ""
    root: str = ""

    def html(self, main: str | None = None) -> str:
        """Return the page; ``main`` stands in place of the fragment."""
        files = _assets()
        sheets = [name for name in ("page.css", f"{self.name}.css") if name in files]
        lines = [f'<link rel="stylesheet" href="{self.root}pages/{name}">' for name in sheets]
        scripted = f"{self.name}.js" in files
        if scripted:
            address = f"{self.root}pages/{self.name}.js"
            lines.append(f'<script type="module" src="{address}"></script>')
        current = ' aria-current="page"'
        links = (
            f'<a href="{self.root}{address}"{current if name == self.name else ""}>{text}</a>'
            for name, address, text in _LINKS
        )
        return Template(_text("layout.html")).substitute(
            title=escape(self.title),
            heading=escape(self.heading),
            lead=f'<p class="soft">{self.lead}</p>' if self.lead else "",
            root=self.root,
            head="\n".join(lines),
            links="\n    ".join(links),
            noscript=_NO_SCRIPT if scripted else "",
            main=_text(f"{self.name}.html") if main is None else main,
        )


_LINKS = (
    ("home", "./", "Home"),
    ("history", "history", "History"),
    ("catalog", "catalog", "Models"),
    ("docs", "docs", "API"),
)
HOME = Page(
    "home",
    "Make a picture larger · tegula",
    "Make a picture larger",
    "It is sent to this server and nowhere else.",
)
HISTORY = Page("history", "History · tegula", "History", "What you made on this server.")
CATALOG = Page("catalog", "Models · tegula", "Models", "What this server runs.")
PREDICTION = Page(
    "prediction", "Prediction · tegula", "Prediction", '<code id="id"></code>', root="../"
)


@router.get("/")
def home() -> HTMLResponse:
    """Show the page that enlarges a picture; it uses the API as any client does."""
    return HTMLResponse(HOME.html(), headers=_HEADERS)


@router.get("/history")
def history() -> HTMLResponse:
    """Show what the account made."""
    return HTMLResponse(HISTORY.html(), headers=_HEADERS)


@router.get("/catalog")
def catalog() -> HTMLResponse:
    """Show the models; their own address, /models, is the API's."""
    return HTMLResponse(CATALOG.html(), headers=_HEADERS)


@router.get("/p/{prediction_id}")
def prediction_page(prediction_id: str) -> HTMLResponse:  # noqa: ARG001 - the script reads it
    """Show a prediction."""
    return HTMLResponse(PREDICTION.html(), headers=_HEADERS)


@router.get("/docs")
def docs(request: Request) -> HTMLResponse:
    """Show the documentation of the API."""
    return HTMLResponse(documentation_page(request.app.openapi()), headers=_HEADERS)


# A browser that is signed in sends a cookie, which scripts cannot read.


@router.post("/v1/session", status_code=204)
def sign_in(request: Request, service: ServiceDep, caller: CallerDep) -> Response:
    """Give the browser a cookie that stands for the token of this request."""
    answer = Response(status_code=204)
    if caller.token is None:
        return answer
    until = service.store.clock() + SIGNED_IN_FOR
    answer.set_cookie(
        session_name(service.settings),
        service.store.links.session(caller.token.id, int(until.timestamp())),
        max_age=int(SIGNED_IN_FOR.total_seconds()),
        httponly=True,
        samesite="strict",
        # By what the browser sees: a gateway may speak TLS before a server that does not.
        secure=request.headers.get("origin", "").startswith("https:"),
    )
    return answer


@router.delete("/v1/session", status_code=204)
def sign_out(service: ServiceDep, caller: CallerDep) -> Response:  # noqa: ARG001 - it is somebody
    """Take the cookie away."""
    answer = Response(status_code=204)
    answer.delete_cookie(session_name(service.settings), httponly=True, samesite="strict")
    return answer


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
def _text(name: str) -> str:
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
    api = Page(
        "docs", f"The API of {info['title']}", f"The API of {info['title']} {info['version']}"
    )
    return api.html(
        f'<div class="docs"><p>{_inline(info["description"])} For programs: '
        '<a href="openapi.json">openapi.json</a>.</p>'
        f"<pre>{escape(_EXAMPLE)}</pre>"
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav>{parts}</div>'
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
    return f'<div class="scroll" tabindex="0"><table>{cells}</table></div>'


def _types(field: Mapping[str, Any]) -> str:
    types = [one.get("type", "") for one in field.get("anyOf", [field])]
    return " or ".join(kind for kind in types if kind and kind != "null")


def _inline(text: str) -> str:
    """Return text as HTML, with what is between backquotes as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text.strip()))
