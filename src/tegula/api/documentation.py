"""The OpenAPI document as a page for reading, made without anything from elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; color: #222; background: #fff; }
h3 { margin-bottom: 0; } code, pre { font-family: ui-monospace, monospace; }
pre { background: #f4f4f4; padding: .75rem; overflow: auto; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: left;
       vertical-align: top; }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd; }
       pre { background: #252525; } a { color: #9cf; } }
"""


def documentation_page(document: Mapping[str, Any]) -> str:
    """Return the page as HTML."""
    info = document["info"]
    body = "".join(_sections(document))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>The API of {escape(info['title'])}</title><style>{_STYLE}</style>"
        f"<h1>The API of {escape(info['title'])} {escape(info['version'])}</h1>"
        f"<p>{_inline(info['description'])}</p>"
        '<p>For programs: <a href="/openapi.json">openapi.json</a>.</p>'
        f"{body}</html>"
    )


def _sections(document: Mapping[str, Any]) -> Iterator[str]:
    by_tag: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            tag = operation.get("tags", ["other"])[-1]
            by_tag.setdefault(tag, []).append(_operation(document, method, path, operation))
    for tag, parts in by_tag.items():
        yield f"<h2>{escape(tag.capitalize())}</h2>{''.join(parts)}"


def _operation(
    document: Mapping[str, Any], method: str, path: str, operation: Mapping[str, Any]
) -> str:
    rows = "".join(_parameter(parameter) for parameter in operation.get("parameters", ()))
    table = f"<table>{rows}</table>" if rows else ""
    text = _inline(operation.get("description", ""))
    title = f"<h3><code>{method.upper()} {escape(path)}</code></h3>"
    return f"{title}<p>{text}</p>{table}{_body(document, operation)}"


def _parameter(parameter: Mapping[str, Any]) -> str:
    needed = "required" if parameter.get("required") else ""
    about = _inline(parameter.get("description", ""))
    name = escape(parameter["name"])
    return f"<tr><td><code>{name}</code></td><td>{parameter['in']} {needed}</td><td>{about}</td>"


def _body(document: Mapping[str, Any], operation: Mapping[str, Any]) -> str:
    contents = operation.get("requestBody", {}).get("content", {})
    parts = []
    for kind, content in contents.items():
        schema = json.dumps(_resolved(document, content["schema"]), indent=2)
        about = f"<details><summary>Body, <code>{escape(kind)}</code></summary>"
        parts.append(f"{about}<pre>{escape(schema)}</pre></details>")
    return "".join(parts)


def _resolved(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Any:
    name = schema.get("$ref", "").rpartition("/")[2]
    return document["components"]["schemas"][name] if name else schema


def _inline(text: str) -> str:
    """Return text with what stands between backquotes as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text.strip()))
