"""Errors as the HTTP API tells them: ``application/problem+json``, in Replicate's shape.

Every refusal is a ``ProblemError``; one place turns it, a framework's error and any
``TegulaError`` into a response.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse

from tegula.errors import TegulaError

MEDIA_TYPE = "application/problem+json"
INPUT_FAILED = "Input validation failed"
_DO_NOT_RETRY = {"x-should-retry": "false"}


@dataclass(frozen=True)
class InvalidField:
    """One thing wrong with a request body.

    type: gojsonschema's name for the rule that was broken, as Replicate reports it.
    field: dotted path of the object that broke it; empty for the body itself.
    description: what would be right.
    """

    type: str
    field: str
    description: str


@dataclass
class ProblemError(TegulaError):
    """A request that is answered with an error.

    status: the HTTP status. detail: one sentence. title: the kind of problem.
    """

    status: int
    detail: str
    title: str | None = None
    invalid_fields: Sequence[InvalidField] = ()
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.detail

    def body(self) -> dict[str, Any]:
        """Return the problem object."""
        title = {"title": self.title} if self.title else {}
        body: dict[str, Any] = {**title, "detail": self.detail, "status": self.status}
        if self.invalid_fields:
            body["invalid_fields"] = [vars(wrong) for wrong in self.invalid_fields]
        return body

    def response(self) -> JSONResponse:
        """Return the answer; one that a client had better not send again says so."""
        final = _DO_NOT_RETRY if self.status == 409 or self.status >= 500 else {}
        return JSONResponse(
            self.body(),
            status_code=self.status,
            headers={**final, **self.headers},
            media_type=MEDIA_TYPE,
        )


def invalid(*fields: InvalidField) -> ProblemError:
    """Return the 422 that names what is wrong with a body."""
    lines = "".join(f"- {f'{wrong.field}: ' if wrong.field else ''}{wrong.description}\n"
                    for wrong in fields)  # fmt: skip
    return ProblemError(422, lines, INPUT_FAILED, fields)


def invalid_header(name: str, right: str) -> ProblemError:
    """Return the 422 for a header that cannot be read; ``right`` says what would do."""
    return invalid(InvalidField("pattern", f"header.{name}", right))


def unauthenticated() -> ProblemError:
    """Return the 401 for a missing or unknown token."""
    return ProblemError(
        401,
        "You did not pass a valid authentication token",
        "Unauthenticated",
        headers={"www-authenticate": "Bearer"},
    )


def stranger() -> ProblemError:
    """Return the 403 for pages of others, where no token is asked for."""
    return ProblemError(
        403,
        "This server asks for no token, so it answers only its own pages and programs; "
        "cors_origins may name others.",
        "Forbidden",
    )


def not_found(what: str = "The requested resource could not be found.") -> ProblemError:
    """Return the 404 for something that does not exist or is not the caller's."""
    return ProblemError(404, what, "Not found")


def bad_version(detail: str | None = None) -> ProblemError:
    """Return the 422 for a version that names nothing."""
    usual = "The specified version does not exist (or perhaps you don't have permission to use it?)"
    return ProblemError(422, detail or usual, "Invalid version or not permitted")


def throttled(seconds: int) -> ProblemError:
    """Return the 429 of the rate limits; ``seconds`` until a request fits again."""
    return ProblemError(
        429,
        f"Request was throttled. Your rate limit resets in ~{seconds}s.",
        "Too many requests",
        headers={"retry-after": str(seconds)},
    )


def too_large(limit: int, what: str = "Request bodies") -> ProblemError:
    """Return the 413 for more bytes than ``limit``."""
    size = f"{limit // 1_000_000}MB" if limit >= 1_000_000 else f"{limit} bytes"
    return ProblemError(413, f"{what} must be less than {size} in size", "Too large")
