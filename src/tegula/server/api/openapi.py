"""The OpenAPI document of the API: FastAPI's, completed by what all operations have in common.

FastAPI knows the bodies, the parameters and the answers of each route. What comes before the
routes it does not know: the gate, the rate limits, the bounds of bodies, and the shape and the
headers of problems. That is added here, once for all operations.

It is a document of OpenAPI 3.2. In 3.1 there is no place for the operation QUERY, which
Replicate's clients search with, nor for the events of a stream; an ``x-`` field would be read by
no program.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from tegula.server.api.errors import MEDIA_TYPE, ProblemAnswer, documented
from tegula.server.links import PredictionAnswer

VERSION = "3.2.0"

TAGS = {
    "predictions": "Run models: create, read, follow, list, cancel and remove predictions.",
    "sharing": "Open a prediction to whoever has its address.",
    "models": "Models, their versions, collections of them, and presets of your own.",
    "deployments": "A version under a name of its own, with inputs that it pins.",
    "files": "Upload inputs, and read the bytes of files.",
    "account": "The account of the token, what it used, and the devices here.",
    "webhooks": "The secret that signs webhooks, and what was sent.",
    "trainings": "Refused: no model here can be trained.",
    "operations": "For whoever runs the server.",
}

_WHOLE = {"type": "integer", "minimum": 0}
_HEADERS: Mapping[str, dict[str, Any]] = {
    "Cache-Control": documented("Whether the answer may be kept."),
    "X-Content-Type-Options": documented("That the content type is to be believed.", "nosniff"),
    "RateLimit-Remaining": documented("Requests that may follow at once.", _WHOLE),
    "RateLimit-Reset": documented("Seconds until there is room for one more, or for all.", _WHOLE),
    "Retry-After": documented("Seconds to wait before the request is sent again.", _WHOLE),
    "X-Should-Retry": documented("Whether to send it again; official clients obey.", "true|false"),
    "WWW-Authenticate": documented("How to authenticate.", "Bearer"),
    "Content-Range": documented("How many bytes there are: `bytes */n`."),
}
_EVERYWHERE = ("Cache-Control", "X-Content-Type-Options")
_LIMITED = ("RateLimit-Remaining", "RateLimit-Reset")

_PROBLEMS: Mapping[int, tuple[str, str, tuple[str, ...]]] = {
    400: ("BadRequest", "The request cannot be read.", ()),
    401: ("Unauthenticated", "There is no valid token.", ("WWW-Authenticate",)),
    403: ("Forbidden", "It is not yours to change, or a page of another site asks.", ()),
    404: ("NotFound", "There is no such thing, or it is another account's.", ()),
    408: ("TooSlow", "The body came too slowly.", ()),
    409: ("Conflict", "It contradicts what is there.", ("X-Should-Retry",)),
    413: ("TooLarge", "The body, or a file in it, is too large.", ()),
    415: ("WrongContentType", "The body has the wrong content type.", ()),
    416: ("NoSuchRange", "The file has none of the bytes that were asked for.", ("Content-Range",)),
    422: ("Invalid", "A field, a parameter or a header is wrong.", ()),
    429: ("TooMany", "Too many requests, or too much work is waiting.", ("Retry-After",)),
    500: ("InternalError", "The server has a problem of its own.", ("X-Should-Retry",)),
    503: ("Unavailable", "The server is stopping, or is receiving as much as it can hold.",
          ("Retry-After", "X-Should-Retry")),
}  # fmt: skip
"""The name of each problem, when it is answered, and the headers that it always has."""


class Api(FastAPI):
    """FastAPI with the completed document."""

    def openapi(self) -> dict[str, Any]:
        """Return the document; it is made when it is first asked for."""
        if self.openapi_schema is None:
            self.openapi_schema = _completed(
                get_openapi(
                    title=self.title,
                    version=self.version,
                    openapi_version=VERSION,
                    description=self.description,
                    routes=self.routes,
                    tags=[{"name": name, "description": text} for name, text in TAGS.items()],
                    servers=self.servers,
                )
            )
        return self.openapi_schema


def problem_name(status: int) -> str:
    """Return the name of the answer that all operations share for a status."""
    return _PROBLEMS[status][0]


def _completed(document: dict[str, Any]) -> dict[str, Any]:
    components = document["components"]
    for unused in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(unused, None)
    # FastAPI leaves out whatever is null, also in examples.
    shown = PredictionAnswer.model_json_schema()["examples"]
    components["schemas"][PredictionAnswer.__name__]["examples"] = shown
    components["headers"] = dict(_HEADERS)
    components["responses"] = {
        name: _problem(status, text, always)
        for status, (name, text, always) in _PROBLEMS.items()
    }  # fmt: skip
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["tags"] = operation["tags"][-1:]
            operation["responses"] = _responses(operation)
    return document


def _problem(status: int, text: str, always: tuple[str, ...]) -> dict[str, Any]:
    """Return the answer for a status; an error within the server passes the gate by."""
    sometimes = () if status == 500 else (*_EVERYWHERE, *_LIMITED)
    return {
        "description": text,
        "headers": {
            **{name: _header(name) for name in sometimes},
            **{name: {**_HEADERS[name], "required": True} for name in always},
        },
        "content": {
            MEDIA_TYPE: {"schema": {"$ref": f"#/components/schemas/{ProblemAnswer.__name__}"}}
        },
    }


def _responses(operation: Mapping[str, Any]) -> dict[str, Any]:
    """Return all answers of an operation: its own, and those that come before it."""
    secured, has_body = "security" in operation, "requestBody" in operation
    common = (*_EVERYWHERE, *_LIMITED) if secured else _EVERYWHERE
    headers = {name: _header(name) for name in common}
    problems = {400, 413, 500}  # by its length a body is refused, also where none is read
    if secured:
        problems |= {401, 403, 429}
    if has_body:
        problems |= {408, 415, 422, 503}
    responses: dict[str, Any] = {}
    for status, answer in operation["responses"].items():
        if int(status) < 400:
            own = answer.get("headers", {})
            responses[status] = {**answer, "headers": {**headers, **own}}
        elif int(status) != 422 or "parameters" not in operation or _can_be_wrong(operation):
            problems.add(int(status))
    for status in sorted(problems):
        responses[str(status)] = {"$ref": f"#/components/responses/{problem_name(status)}"}
    return responses


def _can_be_wrong(operation: Mapping[str, Any]) -> bool:
    """Whether there is a parameter beside those in the path, which take any text."""
    return any(one["in"] != "path" for one in operation["parameters"])


def _header(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/headers/{name}"}
