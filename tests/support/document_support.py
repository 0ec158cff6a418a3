"""Checks answers of the server against its own OpenAPI document."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jsonschema_rs
from fastapi import FastAPI
from starlette.testclient import TestClient

from tegula.server.api.gate import normalise

UNDOCUMENTED = {
    # Of HTTP itself, or of the framework, and the same for every program.
    "allow",
    "connection",
    "content-length",
    "content-type",
    "transfer-encoding",
    "vary",
    # Of CORS, where an operator names other sites.
    "access-control-allow-credentials",
    "access-control-allow-headers",
    "access-control-allow-methods",
    "access-control-allow-origin",
    "access-control-expose-headers",
    "access-control-max-age",
}
PROBLEM = "application/problem+json"


class Document:
    """An OpenAPI document that answers are compared with."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = document
        self.seen: set[tuple[str, str]] = set()

    def check(self, method: str, path: str, answer: Any) -> None:
        """Raise AssertionError where an answer is not as the document has it.

        Args:
            method: of the request.
            path: of the request, as it was sent.
            answer: has ``status_code``, ``headers``, ``content`` and ``json()``.
        """
        template = self.template(normalise(path))
        if template is None or method == "OPTIONS":
            return
        operations = self.document["paths"][template]
        operation = operations.get("get" if method == "HEAD" else method.lower())
        where = f"{method} {path} {answer.status_code}"
        if operation is None:
            assert answer.status_code in (400, 401, 403, 405, 429), where
            assert answer.headers["content-type"].startswith(PROBLEM), where
            return
        status = str(answer.status_code)
        assert status in operation["responses"], f"{where}: not one of its statuses"
        self.seen.add((operation["operationId"], status))
        documented = self.resolved(operation["responses"][status])
        self._check_headers(where, documented.get("headers", {}), answer.headers)
        if method != "HEAD":
            self._check_body(where, documented.get("content", {}), answer)

    def template(self, path: str) -> str | None:
        """Return the path of the document that a path of a request is one of."""
        found = (name for pattern, name in self._templates if pattern.fullmatch(path))
        return next(found, None)

    def resolved(self, part: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a part of the document, or what it refers to."""
        if "$ref" not in part:
            return part
        found: Any = self.document
        for key in part["$ref"].removeprefix("#/").split("/"):
            found = found[key]
        return dict(found)

    @cached_property
    def _templates(self) -> list[tuple[re.Pattern[str], str]]:
        """Each path as a pattern; those without parameters come first."""
        paths = sorted(self.document["paths"], key=lambda path: path.count("{"))
        return [(re.compile(re.sub(r"\{\w+\}", "[^/]+", path)), path) for path in paths]

    def _check_headers(self, where: str, documented: Mapping[str, Any], sent: Any) -> None:
        known = {name.lower(): self.resolved(header) for name, header in documented.items()}
        unknown = {name.lower() for name in sent} - known.keys() - UNDOCUMENTED
        assert not unknown, f"{where}: sends {unknown}, which are not in the document"
        for name, header in known.items():
            if name not in sent:
                assert not header.get("required"), f"{where}: sends no {name}"
                continue
            kind = header["schema"].get("type")
            value = int(sent[name]) if kind == "integer" else sent[name]
            self.validate(f"{where}, {name}", header["schema"], value)

    def _check_body(self, where: str, documented: Mapping[str, Any], answer: Any) -> None:
        if not answer.content:
            assert not documented or "text/plain" in documented or "*/*" in documented, where
            return
        kind = answer.headers["content-type"].partition(";")[0]
        content = documented.get(kind) or documented.get("*/*")
        assert content is not None, f"{where}: {kind} is none of {list(documented)}"
        if kind.endswith("json") and kind in documented:
            self.validate(where, content["schema"], answer.json())
        if kind == "text/event-stream":
            for event in events(answer.text):
                self.validate(where, content["itemSchema"], event)

    def validate(self, where: str, schema: Mapping[str, Any], value: Any) -> None:
        """Raise AssertionError where a value is not as a schema of the document has it."""
        validator = self._validators.get(id(schema))
        if validator is None:
            whole = {**schema, "components": self.document["components"]}
            validator = jsonschema_rs.Draft202012Validator(whole, validate_formats=True)
            self._validators[id(schema)] = validator
        errors = [
            f"{list(one.instance_path)}: {one.message}" for one in validator.iter_errors(value)
        ]
        assert not errors, f"{where}: {errors}"

    @cached_property
    def _validators(self) -> dict[int, Any]:
        return {}


def events(text: str) -> list[dict[str, str]]:
    """Return the server-sent events in a text, without its comments."""
    found = []
    for block in text.split("\n\n"):
        lines = [line.partition(": ") for line in block.split("\n") if line[:1] not in ("", ":")]
        event: dict[str, str] = {}
        for name, _, value in lines:
            event[name] = f"{event[name]}\n{value}" if name in event else value
        if event and "retry" not in event:
            found.append(event)
    return found


_DOCUMENT: list[Document] = []


def own_document(app: FastAPI) -> Document:
    """Return the document of the server, made once: only its address differs between tests."""
    if not _DOCUMENT:
        _DOCUMENT.append(Document(app.openapi()))
    return _DOCUMENT[0]


def checked(client: TestClient) -> TestClient:
    """Return a client with every answer that it receives compared with the document."""

    def check(response: Any) -> None:
        response.read()
        request = response.request
        path = request.url.raw_path.decode("ascii").partition("?")[0]
        own_document(app).check(request.method, path, response)

    app: Any = client.app
    client.event_hooks = {"request": [], "response": [check]}
    return client
