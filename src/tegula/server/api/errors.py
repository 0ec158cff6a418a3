"""Errors as the HTTP API answers them: ``application/problem+json``, in Replicate's shape.

Whatever goes wrong becomes a ``ProblemError`` and is answered in one place, ``app.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ConfigDict, Field
from starlette.responses import JSONResponse

from tegula.catalog import InvalidField
from tegula.errors import TegulaError
from tegula.server.links import Answer

MEDIA_TYPE = "application/problem+json"
INPUT_FAILED = "Input validation failed"


class InvalidFieldAnswer(Answer):
    """What is wrong with one field of a request."""

    type: str = Field(description="The rule that is violated, such as `required`.")
    field: str = Field(description="Such as `input.scale`; empty for the body as a whole.")
    description: str = Field(description="What would be right.")


class ProblemAnswer(Answer):
    """What went wrong, as RFC 9457 has it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "title": INPUT_FAILED,
                    "detail": "- input: image is required\n",
                    "status": 422,
                    "invalid_fields": [
                        {"type": "required", "field": "input", "description": "image is required"}
                    ],
                }
            ]
        }
    )

    title: str = Field("", description="The kind of problem.")
    detail: str = Field(description="One sentence, or one line for each invalid field.")
    status: int = Field(description="The HTTP status.")
    invalid_fields: list[InvalidFieldAnswer] = Field([], description="All that is wrong.")


# Exceptions are compared by identity; eq=False leaves them hashable, which tracebacks need.
@dataclass(eq=False)
class ProblemError(TegulaError):
    """A request that is answered with an error.

    status: the HTTP status.
    detail: one sentence, or one line for each invalid field.
    title: the kind of problem.
    invalid_fields: what is wrong with the body, the query or a header.
    """

    status: int
    detail: str
    title: str | None = None
    invalid_fields: Sequence[InvalidField] = ()
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.detail

    def answer(self) -> ProblemAnswer:
        """Return the problem object."""
        more: dict[str, Any] = {"title": self.title} if self.title else {}
        if self.invalid_fields:
            more["invalid_fields"] = [
                InvalidFieldAnswer(type=one.type, field=one.field, description=one.description)
                for one in self.invalid_fields
            ]
        return ProblemAnswer(detail=self.detail, status=self.status, **more)

    def response(self) -> JSONResponse:
        """Return the answer; Replicate's clients repeat 409 and 5xx unless told not to."""
        final = self.status == 409 or self.status >= 500
        return JSONResponse(
            self.answer().as_json(),
            status_code=self.status,
            headers={**({"x-should-retry": "false"} if final else {}), **self.headers},
            media_type=MEDIA_TYPE,
        )


# For the documentation of routes.


def documented(description: str, form: Mapping[str, Any] | str | None = None) -> dict[str, Any]:
    """Return a header as the API's document describes it.

    Args:
        description: what it says.
        form: the schema of its value, or the only value, or several with ``|`` between.
    """
    schema = {"type": "string", "enum": form.split("|")} if isinstance(form, str) else form
    return {"description": description, "schema": schema or {"type": "string"}}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what a route documents of its problems; ``openapi`` completes it."""
    return {status: {"model": ProblemAnswer} for status in statuses}


def invalid(*fields: InvalidField) -> ProblemError:
    """Return the 422 that lists everything wrong with a request."""
    lines = [f"- {f'{wrong.field}: ' if wrong.field else ''}{wrong.description}\n"
             for wrong in fields]  # fmt: skip
    return ProblemError(422, "".join(lines), INPUT_FAILED, fields)


def invalid_header(name: str, expected: str) -> ProblemError:
    """Return the 422 for a header that cannot be read; ``expected`` says what would be right."""
    return invalid(InvalidField("pattern", f"header.{name}", expected))


def unauthenticated() -> ProblemError:
    """Return the 401 for a missing or unknown token."""
    return ProblemError(
        401,
        "You did not pass a valid authentication token",
        "Unauthenticated",
        headers={"www-authenticate": "Bearer"},
    )


def foreign_page() -> ProblemError:
    """Return the 403 for requests from pages of other sites, on a server without tokens."""
    return ProblemError(
        403,
        "This server asks for no token, so it answers only its own pages and programs; "
        "cors_origins may name others.",
        "Forbidden",
    )


def foreign_change() -> ProblemError:
    """Return the 403 for a change that a signed-in browser sends from a page of another server."""
    return ProblemError(
        403,
        "A signed-in browser may change things only from this server's own pages; programs send a "
        "token.",
        "Forbidden",
    )


def not_found(detail: str = "The requested resource could not be found.") -> ProblemError:
    """Return the 404 for something that does not exist or belongs to another account."""
    return ProblemError(404, detail, "Not found")


def bad_version(
    detail: str = "The specified version does not exist (or perhaps you don't have permission to "
    "use it?)",
) -> ProblemError:
    """Return the 422 for a version that does not exist."""
    return ProblemError(422, detail, "Invalid version or not permitted")


def throttled(seconds: int) -> ProblemError:
    """Return the 429 of the rate limits; ``seconds`` until the next request is allowed."""
    return ProblemError(
        429,
        f"Request was throttled. Your rate limit resets in ~{seconds}s.",
        "Too many requests",
        headers={"retry-after": str(seconds)},
    )


def stopping() -> ProblemError:
    """Return the 503 of a server that stops; what it refuses is safe to send again."""
    return ProblemError(
        503,
        "The server is stopping; send the request again.",
        "Service unavailable",
        headers={"retry-after": "1", "x-should-retry": "true"},
    )


def not_ready(detail: str) -> ProblemError:
    """Return the 503 of a server that cannot take new work, for a reason that may last."""
    return ProblemError(503, detail, "Service unavailable", headers={"retry-after": "30"})


def too_large(limit: int, what: str = "Request bodies") -> ProblemError:
    """Return the 413 for more than ``limit`` bytes."""
    size = f"{limit // 1_000_000}MB" if limit >= 1_000_000 else f"{limit} bytes"
    return ProblemError(413, f"{what} must be less than {size} in size", "Too large")
